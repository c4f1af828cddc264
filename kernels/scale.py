"""A tensor times one number on the device, in place and without any traffic where the number is 1.

    x_i = round(float32(x_i) factor)

What multiplies gradients in a backward is 1 in most calls, and a host that looked would wait for the device. Every
program reads the factor and ends there where it is 1. Else: each element read once and written once; program b has
elements [b BLOCK, (b + 1) BLOCK). NaN is not 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_fast.kernels.configuration import Configuration
from grpo_fast.kernels.launcher import launch

# 16 KB a program of float32: 160 thousand of them for a `[V, H]` of 152 thousand by 4096. Not measured.
BLOCK = 4096
NUM_WARPS = 8


@triton.jit(do_not_specialize=["num_elements"], do_not_specialize_on_alignment=["factor"])
def _scale_kernel(
    values,  # [N] float32, bf16 or fp16, in and out
    factor,  # one float32
    num_elements,
    BLOCK: tl.constexpr,
):
    number = tl.load(factor)
    if number != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        places = values + start + tl.arange(0, BLOCK)
        left = num_elements - start
        if left >= BLOCK:  # without a mask, accesses are 16 bytes wide
            scaled = tl.load(places).to(tl.float32) * number
            tl.store(places, scaled.to(values.dtype.element_ty))
        else:
            mask = tl.arange(0, BLOCK) < left
            scaled = tl.load(places, mask=mask).to(tl.float32) * number
            tl.store(places, scaled.to(values.dtype.element_ty), mask=mask)


def scale_unless_one(tensor: Tensor, factor: Tensor) -> None:
    """Multiply `tensor` in place, in float32 arithmetic; safe to capture in a CUDA graph.

    Args:
        tensor: contiguous, float32, bf16 or fp16, any number of elements.
        factor: one float32 on the same device.

    Raises:
        ValueError: either is something else.
    """
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not tensor.is_contiguous():
        raise ValueError(
            f"tensor: expected contiguous float32, bfloat16 or float16; got {tensor.dtype}, {list(tensor.shape)} with "
            f"strides {list(tensor.stride())}"
        )
    if factor.numel() != 1 or factor.dtype != torch.float32 or factor.device != tensor.device:
        found = f"{list(factor.shape)} {factor.dtype} on {factor.device}"
        raise ValueError(f"factor: expected one float32 on {tensor.device}; got {found}")
    if tensor.numel():
        launch(_scale_kernel, (triton.cdiv(tensor.numel(), BLOCK),), _arguments(tensor, factor), tensor.device)


def _arguments(tensor: Tensor, factor: Tensor) -> dict[str, Any]:
    return {
        "values": tensor,
        "factor": factor,
        "num_elements": tensor.numel(),
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }


def aot_configurations() -> Iterator[Configuration]:
    """Every dtype; from 2^31 elements their number is a 64-bit argument."""
    factor = torch.empty((), device="meta")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (2**20, 2**31):
            tensor = torch.empty(size, dtype=dtype, device="meta")
            label = f"scale {str(dtype).removeprefix('torch.')}{', 64-bit size' if size > 2**20 else ''}"
            yield Configuration.of_launch(label, _scale_kernel, _arguments(tensor, factor))
