"""Bytes that Triton kernels load and store under the interpreter, by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

ELSEWHERE = "elsewhere"  # the memory of no tensor that was named


@dataclass
class Traffic:
    """Bytes moved between a tensor's memory and unmasked lanes."""

    loads: int = 0
    stores: int = 0

    def per(self, count: int) -> dict[str, float]:
        """Bytes for each of `count` elements, to be compared with a kernel module's BYTES_PER_LOGIT."""
        return {"loads": self.loads / count, "stores": self.stores / count}


@contextmanager
def count_traffic(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Traffic]]:
    """Count what interpreted kernels move by tl.load, tl.store and descriptors (not by atomics) while this is entered.

    Yields one Traffic for each of `tensors`, told apart by address, and one for ELSEWHERE. A lane counts each time it
    loads, as it does where a cache serves it.

    Raises:
        ValueError: two of the tensors overlap, or one is not on the CPU, where the interpreter works on a copy.
    """
    spans = {name: _span(name, tensor) for name, tensor in tensors.items()}
    ordered = sorted(spans.values())
    if any(end > start for (_, end), (start, _) in pairwise(ordered)):
        raise ValueError(f"tensors must not overlap in memory, got {spans}")
    traffic = {name: Traffic() for name in [*spans, ELSEWHERE]}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def record(kind: str, pointers: TensorHandle, mask: TensorHandle | np.ndarray) -> None:
        # Block pointers bring their mask as a plain array, whose `data` is a buffer.
        addresses = pointers.data[np.broadcast_to(np.asarray(mask.data), pointers.data.shape).astype(bool)]
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = {name: int(((addresses >= a) & (addresses < b)).sum()) for name, (a, b) in spans.items()}
        for name, lanes in {**inside, ELSEWHERE: addresses.size - sum(inside.values())}.items():
            setattr(traffic[name], kind, getattr(traffic[name], kind) + lanes * itemsize)

    # The builder's other loads and stores end in these two; the signatures differ between versions in the rest.
    def counting_load(self, ptrs, mask, *args, **kwargs):
        record("loads", ptrs, mask)
        return load(self, ptrs, mask, *args, **kwargs)

    def counting_store(self, ptrs, value, mask, *args, **kwargs):
        record("stores", ptrs, mask)
        return store(self, ptrs, value, mask, *args, **kwargs)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield traffic


def _span(name: str, tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor's memory and the one after its last."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor on the CPU, got one on {tensor.device}")
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    elements = elements if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
