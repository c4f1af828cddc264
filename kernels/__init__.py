"""Triton kernels of grpo-fast, installed and imported as `grpo_fast.kernels`.

A kernel file imports torch, triton and its siblings, nothing else. This file imports neither, so that asking whether
kernels are there costs nothing.

As plain `kernels` this directory stands in the way of Hugging Face's package of that name whenever the repository root
is on `sys.path` (`python -m pytest` or `python -c` in the root put it there). Imported under that name it loads the
real package in its own place, and refuses where there is none.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NoReturn

_REFUSAL = (
    "`kernels` is the source directory of grpo-fast here, and Hugging Face's `kernels` is not installed: "
    "import `grpo_fast.kernels`, or `pip install kernels` for the latter"
)


def _hugging_face_spec() -> ModuleSpec | None:
    """The first regular package `kernels` that is not this one, or None."""
    here = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != here.parent]
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec("kernels", elsewhere) if find_spec else None
        # No loader: a namespace package, that is, some directory that happens to be called `kernels`.
        if spec and spec.loader and spec.origin and Path(spec.origin).resolve().parent != here:
            return spec
    return None


def _refuse(name: str) -> NoReturn:
    """Module `__getattr__` of the stand-in: dunders are absent, anything else is an ImportError that says why."""
    raise (AttributeError(name) if name.startswith("__") else ImportError(_REFUSAL))


def _stand_aside() -> None:
    """Put Hugging Face's package in the place of this one, or refuse.

    Raises:
        ImportError: there is no such package. Not while transformers is loaded: its probe for optional packages imports
            `kernels` without a guard, so an error here would break `import transformers` in the repository root. It is
            given what the probe takes for "not installed": a module with neither version nor file.
    """
    spec = _hugging_face_spec()
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = module  # the import system returns what it finds here
        spec.loader.exec_module(module)
    elif "transformers" in sys.modules:
        stand_in = globals()
        del stand_in["__file__"]
        stand_in.update(__path__=[], __getattr__=_refuse)
    else:
        raise ImportError(_REFUSAL)


if __name__ == "kernels":
    _stand_aside()
