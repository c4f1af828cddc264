"""What a kind of device can do, as far as this library asks. Nothing else looks at `device.type` to decide how to work.

To serve another kind of device, add a row to `TRAITS`. Tests put a GPU's row in the place of the CPU's
(`tests/stand_in.py`), so that every branch that a GPU takes runs without one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _cuda_memory(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True)
class DeviceTraits:
    """One kind of device.

    Attributes:
        wide_products: the library's matrix products give float32 from bf16 and fp16 operands (`aten::mm.dtype_out`);
            otherwise operands are widened, a block at a time.
        asynchronous: the host runs ahead, so that reading a value back makes it wait.
        streams: has torch.cuda's `current_stream`, `Stream` and `stream`; None where work is done in one order.
        tile_rows: rows of one logits product that fill the device.
        row_block_elements: of the blocks of rows that torch's row functions work through.
        vector_products: products of fewer than four rows are vector products, which sum straight over the vocabulary.
        float32_switch: its `fp32_precision` says what the process allows in the place of float32 products: "tf32",
            "bf16", or something else for nothing.
        total_memory: bytes of a device; None where that is not a bound of its own.
    """

    wide_products: bool
    asynchronous: bool
    streams: Any
    tile_rows: int
    row_block_elements: int
    vector_products: bool = False
    float32_switch: Any = None
    total_memory: Callable[[torch.device], int] | None = None


class _Table(dict[str, DeviceTraits]):
    def __missing__(self, kind: str) -> DeviceTraits:
        return _OTHERS


_OTHERS = DeviceTraits(wide_products=False, asynchronous=True, streams=None, tile_rows=128, row_block_elements=2**19)
TRAITS = _Table(
    # Blocks near the caches. (2^19 float32 are 2 MiB.)
    cpu=DeviceTraits(
        wide_products=False,
        asynchronous=False,
        streams=None,
        tile_rows=128,
        row_block_elements=2**19,
        vector_products=True,
        float32_switch=torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    ),
    # Blocks that fill 132 multiprocessors: 2^23 float32 are 32 MiB.
    cuda=DeviceTraits(
        wide_products=True,
        asynchronous=True,
        streams=torch.cuda,
        tile_rows=1024,
        row_block_elements=2**23,
        float32_switch=torch.backends.cuda.matmul,
        total_memory=_cuda_memory,
    ),
)
"""By `device.type`."""


def is_traced(tensor: Tensor) -> bool:
    """Whether there are no values to read or to hand to native code: a compiler or a fake mode is looking on."""
    return torch.compiler.is_compiling() or torch._guards.detect_fake_mode(tensor) is not None


def checks_values(tensor: Tensor) -> bool:
    """Whether checks may read values of `tensor` back: always on the CPU, elsewhere with GRPO_FAST_DEBUG=1."""
    if is_traced(tensor):
        return False
    return not TRAITS[tensor.device.type].asynchronous or os.environ.get("GRPO_FAST_DEBUG", "0") not in ("", "0")


PITCH = 64
"""Elements that a row of logits or dx is padded to on a GPU: 128 bytes of bf16, and 16-byte accesses for every V."""


def padded(vocab: int) -> int:
    """Elements from one row to the next on a GPU."""
    return -(-vocab // PITCH) * PITCH


def old_gpu(device: torch.device) -> str | None:
    """Why kernels for sm_80 and up do not run on a CUDA device, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: it is built without CUDA, or there is no driver or GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    return f"needs compute capability 8.0 or higher; this device has {capability[0]}.{capability[1]}"
