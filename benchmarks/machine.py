"""What a number needs beside it: the machine, the versions, the commit; and how memory and time are read on it."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

PACKAGES = ("grpo-fast", "trl", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl", "triton")
SOURCES = ("grpo_fast", "kernels", "csrc")
REPO = Path(__file__).resolve().parent.parent
Result = TypeVar("Result")


def device_name() -> str:
    """Where to measure: the GPU if there is one (hide it with CUDA_VISIBLE_DEVICES= to measure the CPU)."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _output(*command: str) -> str | None:
    """What a command prints, or None if it cannot run."""
    try:
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _proc_value(path: str, key: str) -> int | None:
    """Bytes of a `key: n kB` line of a /proc file, or None where there is no such file."""
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> tuple[str | None, bool | None, str]:
    """(commit, whether tracked files differ from it or None if that is not known, who says so)."""
    commit = _output("git", "rev-parse", "HEAD")
    if commit is not None:
        dirty = _output("git", "status", "--porcelain", "--untracked-files=no")
        return commit, None if dirty is None else bool(dirty), "git"
    told = os.environ.get("GRPO_FAST_COMMIT", "").strip()
    if told:
        return told, None, "GRPO_FAST_COMMIT"
    with suppress(OSError):
        return (REPO / "COMMIT").read_text().strip(), None, "the file COMMIT"
    return None, None, "nothing: no git, no GRPO_FAST_COMMIT, no file COMMIT"


def sources_digest() -> str:
    """What the library's sources are, in twelve hexadecimal digits, wherever they come from."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((REPO / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu"):
                digest.update(f"{path.relative_to(REPO)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def machine_facts() -> dict[str, Any]:
    """CPU, threads, memory, versions, commit and whether tracked files differ from it; a GPU's name and driver.

    Where there is no git, the commit is what GRPO_FAST_COMMIT or a file COMMIT says; `commit_from` says which.
    """
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    memory = _proc_value("/proc/meminfo", "MemTotal")
    commit, dirty, commit_from = _commit()
    facts: dict[str, Any] = {
        "device": device_name(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "commit": commit,
        "dirty": dirty,
        "commit_from": commit_from,
        "sources": sources_digest(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def available_bytes() -> int | None:
    """Memory that is free for tensors on the measured device, or None where that is not known."""
    if torch.cuda.is_available():
        # Free on the card, or kept by the allocator and used by nobody.
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return _proc_value("/proc/meminfo", "MemAvailable")


class PeakMemory:
    """The most memory that a call takes beyond what was there before it.

    On a GPU the allocator's peak. On Linux the peak of resident memory (VmHWM), reset by writing 5 to
    /proc/self/clear_refs, which nothing else in the process may do at the same time. Elsewhere None.
    """

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.method: str | None = "torch.cuda allocator" if self.cuda else "VmHWM"
        if not self.cuda and not self._reset():
            self.method = None
        self.before = 0

    def _reset(self) -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return _proc_value("/proc/self/status", "VmHWM") is not None

    def start(self) -> None:
        gc.collect()
        if self.cuda:
            # What the allocator keeps, it keeps: allocating anew would be timed with the call.
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif self.method:
            # Freed memory that malloc keeps would hide what the next call takes.
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            self._reset()
            self.before = _proc_value("/proc/self/status", "VmRSS") or 0

    def stop(self) -> int | None:
        """Bytes since `start`."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        peak = _proc_value("/proc/self/status", "VmHWM") if self.method else None
        return None if peak is None else max(peak - self.before, 0)


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """(result, seconds): CUDA events on a GPU, the monotonic clock elsewhere."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        result = function()
        return result, time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    result = function()
    end.record()
    torch.cuda.synchronize()
    return result, begin.elapsed_time(end) / 1000
