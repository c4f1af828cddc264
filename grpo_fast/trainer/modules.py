"""Python of the user's, named in a recipe: rewards, and losses that register themselves."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_module(name: str) -> ModuleType:
    """The module `package.module`, or the file `path/to/file.py`.

    A file runs once, under a name of its own; it is not made importable, nor are its neighbours.

    Raises:
        ImportError: no such file, or whatever the module raised, in one line.
    """
    file = Path(name).expanduser().resolve() if name.endswith(".py") else None
    if file is not None and not file.is_file():
        raise ImportError(f"no such file: {name} (looked in {Path.cwd()})")
    try:
        return importlib.import_module(name) if file is None else _run_file(file)
    except Exception as error:  # the module runs code of its own
        hint = ""
        if isinstance(error, ModuleNotFoundError) and Path(*name.split(".")).with_suffix(".py").is_file():
            hint = f"; for a file that is not installed write {name.replace('.', '/')}.py"
        raise ImportError(f"cannot import {name} ({type(error).__name__}: {error}){hint}") from error


def _run_file(path: Path) -> ModuleType:
    # Named after the path, so that what names one file shares its module and two files of one name do not.
    name = f"_grpo_fast_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as import does: dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
