"""NVIDIA's compute-sanitizer over small steps of every plan (sanitized.py).

Result of `<backend>-<tool>`: errors (what it counts), log (its end).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Context, Skip, Task, start

TOOLS = ("memcheck", "racecheck", "synccheck")


def find() -> str | None:
    """compute-sanitizer: on PATH, below $CUDA_HOME, or in its usual place."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    paths = [Path(home, *below, "compute-sanitizer")
             for home in homes if home for below in (("bin",), ("compute-sanitizer",))]  # fmt: skip
    return next(filter(None, map(shutil.which, ("compute-sanitizer", *map(str, paths)))), None)


def tasks(context: Context) -> Iterable[Task]:
    for tool in TOOLS:
        for backend in context.backends("triton", "cuda", slow=True):
            yield Task(f"{backend}-{tool}", 100, _task(context, backend, tool))


def _task(context: Context, backend: str, tool: str) -> Callable[[], dict[str, Any]]:
    return lambda: sanitize(context, backend, tool)


def sanitize(context: Context, backend: str, tool: str) -> dict[str, Any]:
    sanitizer = find()
    if sanitizer is None:
        raise Skip("compute-sanitizer is not installed: neither on PATH nor below CUDA_HOME or /usr/local/cuda")
    program = [context.python, "-m", "benchmarks.gpu.sanitized", backend]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *program]
    # Every tensor an allocation of its own, or what lies behind one is still the allocator's.
    code, printed = start(context, command, variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    log = printed[-3000:]
    if "Device not supported" in printed:
        raise Skip(f"compute-sanitizer does not support this device here: {log[-300:]}")
    counted = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", printed)
    if code != 0 or "sanitized: done" not in printed:
        raise RuntimeError(f"{tool} on {backend} ended with {code}:\n{log}")
    return {"errors": int(counted[1]) if counted else None, "log": log}
