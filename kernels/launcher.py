"""The one way in which kernels are launched: on the tensors' device, with what every launch states."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Compiler options of all kernels. Multiplications and additions are fused only where a kernel says so: otherwise its
bits would depend on what else is in it, and on the version of Triton, whose default changes with 3.10."""


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], device: torch.device) -> None:
    """Run `kernel[grid](**arguments)` on the current stream of `device`.

    Triton launches on the current device, whatever device the tensors are on: it is made current for the launch.

    Args:
        kernel: of `triton.jit`.
        arguments: all of the kernel's by name, and `num_warps` and `num_stages` where they are not Triton's.
        device: the tensors'; the CPU where kernels are interpreted.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **OPTIONS)
