"""The native extensions, built in place from the checkout (setuptools and pybind11; nvcc for `_cuda`), then imported.

Result of `_C` and `_cuda`: seconds, built (False: a newer one was there), file, says (what the module tells of itself),
log (the end of the compiler's words). Of `imports`: package: version or why it does not import.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import REPO, Context, Skip, Task, start

MODULES = {
    "_C": ("GRPO_FAST_CPU", "GRPO_FAST_CUDA", ("*.cpp", "*.h"), "module.isa()"),
    "_cuda": (
        "GRPO_FAST_CUDA",
        "GRPO_FAST_CPU",
        ("*.cu", "*.h", "bindings_cuda.cpp", "nvcc.py"),
        "module.ARCHITECTURES",
    ),
}
"""Extension: the variable that makes its failure an error, the one that leaves the other out, sources, what it says."""
PACKAGES = (
    *("torch", "triton", "pybind11", "setuptools", "pytest", "transformers", "tokenizers", "omegaconf", "pydantic"),
    *("datasets", "peft", "gguf", "reasoning_gym", "trl", "liger_kernel", "cut_cross_entropy", "quack", "verl"),
)


def tasks(context: Context) -> Iterable[Task]:
    yield Task("imports", 5, imports)
    for name in MODULES:
        yield Task(name, 20, _task(context, name))


def _task(context: Context, name: str) -> Callable[[], dict[str, Any]]:
    return lambda: extension(context, name)


def imports() -> dict[str, str]:
    """What is installed; nothing is imported."""
    found = {}
    for package in PACKAGES:
        there = importlib.util.find_spec(package) is not None
        try:
            found[package] = importlib.metadata.version(package.replace("_", "-")) if there else "not installed"
        except importlib.metadata.PackageNotFoundError:
            found[package] = "installed"
    return found


def built_file(name: str) -> Path | None:
    """The extension's file in the checkout for this interpreter, newer than its sources, or None."""
    import sysconfig

    path = REPO / "grpo_fast" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        return None
    newest = max(source.stat().st_mtime for glob in MODULES[name][2] for source in (REPO / "csrc").glob(glob))
    return path if path.stat().st_mtime >= newest else None


def extension(context: Context, name: str) -> dict[str, Any]:
    """Build the extension unless that has been done, and ask it what it is."""
    strict, other, _, question = MODULES[name]
    file, log = built_file(name), ""
    built = file is None
    if built:
        if context.device.stand_in:
            raise Skip("the stand-in builds nothing")
        if name == "_cuda" and _nvcc() is None:
            raise Skip("there is no nvcc: neither on PATH nor below CUDA_HOME or /usr/local/cuda")
        lacking = [package for package in ("setuptools", "pybind11") if importlib.util.find_spec(package) is None]
        if lacking:
            raise Skip(f"{' and '.join(lacking)} not installed")
        command = [context.python, "setup.py", "build_ext", "--inplace", "--force"]
        code, printed = start(context, command, variables={strict: "1", other: "0"})
        log = printed[-3000:]
        if code != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log}")
        file = built_file(name)
    # In another process: this one may have looked for the module before it was there.
    code, said = start(context, [context.python, "-c", f"import grpo_fast.{name} as module; print({question})"])
    if code != 0:
        raise RuntimeError(f"grpo_fast.{name} does not import: {said[-2000:]}")
    return {"built": built, "file": None if file is None else file.name, "says": said.strip(), "log": log}


def _nvcc() -> str | None:
    import runpy

    found: str | None = runpy.run_path(str(REPO / "csrc" / "nvcc.py"))["find_nvcc"]()
    return found
