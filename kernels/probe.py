"""Whether kernels can run on a device at all; that Triton is installed says nothing about it.

Triton builds its launcher with the host's C compiler and Python's headers at the first launch, and the driver loads
what it compiled. Each of these may be missing, or the device too old, where training runs.
"""

from __future__ import annotations

import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes


@cache
def why_not_runnable(device: torch.device) -> str | None:
    """Why no kernel runs on `device`, or None where one has: compiled, launched, its result read. Found out once.

    The first time waits for the device, so not while a CUDA graph is captured. The CPU runs kernels under Triton's
    interpreter only (TRITON_INTERPRET=1).
    """
    try:
        found = _doubled(device)
    except Exception as error:  # whatever it is, it is the answer
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return f"{type(error).__name__}: {first_line}{_hint(error)}"
    return None if found == 2.0 else f"a kernel that doubles 1.0 gave {found}"


def _doubled(device: torch.device) -> float:
    """Twice 1, by the smallest of the kernels."""
    from grpo_fast.kernels.scale import scale_unless_one

    with _disable_current_modes():  # real tensors, also where the caller's are fake
        number, factor = torch.ones(1, device=device), torch.full((1,), 2.0, device=device)
        scale_unless_one(number, factor)
        return number.item()


def _hint(error: Exception) -> str:
    """What to install, where a compiler or Python's headers are what fails."""
    if "C compiler" in str(error):
        return "; install gcc or clang, or name one in CC"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if isinstance(error, subprocess.CalledProcessError) and not header.exists():
        return f"; {header} is missing: install Python's headers (python3-dev)"
    return ""
