"""Where the gradients of the head come together, chunk by chunk of dx.

Legend: T tokens, n rows of a chunk, H hidden size, V vocabulary; dx is the loss's gradient in the raw products.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grpo_fast.backends.devices import traits
from grpo_fast.ops.workspace import Chunk, HeadCall

SPARSE_CHUNK = 0.75
"""Rows found to have no gradient leave before the backward GEMMs when at most this share of a chunk is left."""


@dataclass
class Wanted:
    """Which gradients to compute; `main_grad` `[V, H]` float32 takes the weight's by addition."""

    hidden: bool
    weight: bool
    bias: bool
    main_grad: Tensor | None = None


@dataclass
class Gradients:
    """Accumulated gradients; None where not asked for. hidden: `[T, H]`; weight: `[V, H]`; bias: `[V]`."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class GradientSink:
    """Where chunks' dx go: the backward GEMMs, a float32 sum over chunks, one rounding at the end.

    Args:
        largest: rows of the largest chunk.
    """

    def __init__(
        self, call: HeadCall, largest: int, num_chunks: int, want: Wanted, scale: float | Tensor = 1.0
    ) -> None:
        self.call = call
        self.scale = scale
        self.chunks_left = num_chunks
        self.hidden = _HiddenGradient(call, largest) if want.hidden else None
        self.weight = _WeightGradient(call, want.main_grad) if want.weight else None
        self.bias = call.weight.new_zeros(call.weight.shape[0], dtype=call.accumulator) if want.bias else None

    def add(self, chunk: Chunk, dx: Tensor, live: Tensor) -> None:
        """Take in dx `[n, V]` of a chunk; rows that are not `live` `[n]` are zero."""
        call, hidden = self.call, chunk.hidden[: chunk.n]
        whole = slice(chunk.start, chunk.stop)
        index: Tensor | slice = whole if call.rows is None else call.rows[whole]
        self.chunks_left -= 1
        if not traits(dx.device).asynchronous:  # counting the rows would make a GPU wait
            index, hidden, dx = _without_idle_rows(index, hidden, dx, live)
        if self.bias is not None:
            self.bias += dx.sum(0, dtype=call.accumulator)
        if self.weight is not None:
            self.weight.add(dx, hidden, last=self.chunks_left == 0)
        if self.hidden is not None:
            self.hidden.add(dx, index, self.scale)

    def finish(self) -> Gradients:
        """The gradients in the inputs' dtypes; the weight's is None if `main_grad` took it."""
        bias = None if self.bias is None else unscaled(self.bias, self.scale).to(self.call.grad_dtype)
        weight = None if self.weight is None else self.weight.finish(self.scale)
        return Gradients(None if self.hidden is None else self.hidden.result, weight, bias)


class _HiddenGradient:
    """The gradient of hidden `[T, H]`: a row is one product, summed in float32 and rounded once."""

    def __init__(self, call: HeadCall, largest: int) -> None:
        self.call = call
        self.result = call.hidden.new_zeros(call.hidden.shape, dtype=call.grad_dtype)
        self.sums = call.hidden.new_empty((largest, call.hidden.shape[1]), dtype=call.accumulator)

    def add(self, dx: Tensor, index: Tensor | slice, scale: float | Tensor) -> None:
        """Take in dx `[r, V]` of rows `index` `[r]` of the T."""
        sums = self.sums[: dx.shape[0]]
        self.call.backend.grad_hidden(dx, self.call.weight, sums)
        sums = unscaled(sums, scale)
        if isinstance(index, slice):
            self.result[index].copy_(sums)
        else:
            self.result.index_copy_(0, index, sums.to(self.result.dtype))


class _WeightGradient:
    """The weight's gradient `[V, H]`, chunk by chunk: a float32 sum, which the last chunk's product rounds.

    float16's is scaled, so that it stays float32 until the scale is taken out. `main_grad` takes the sum by addition.
    """

    def __init__(self, call: HeadCall, main_grad: Tensor | None) -> None:
        self.call, self.main_grad = call, main_grad
        self.scaled = call.scales_dx
        self.sum = None if self.scaled else main_grad
        self.result: Tensor | None = None

    def add(self, dx: Tensor, hidden: Tensor, *, last: bool) -> None:
        call, base = self.call, self.sum
        shape = tuple(call.weight.shape)
        if last and self.main_grad is None:
            out = self.result = call.backend.new_buffer(dx, shape, call.grad_dtype)
        else:
            out = self.sum = call.backend.new_buffer(dx, shape, call.accumulator) if base is None else base
        call.backend.grad_weight(dx, hidden, out, base)

    def finish(self, scale: float | Tensor) -> Tensor | None:
        if self.main_grad is not None:
            if self.scaled and self.sum is not None:
                self.main_grad.add_(unscaled(self.sum, scale))
            return None
        if self.result is None:  # no rows at all
            return self.call.weight.new_zeros(self.call.weight.shape, dtype=self.call.grad_dtype)
        return unscaled(self.result, scale)


def unscaled(values: Tensor, scale: float | Tensor) -> Tensor:
    """values / scale, in place; a scale that is no tensor is 1."""
    return values.div_(scale) if isinstance(scale, Tensor) else values


def _without_idle_rows(
    index: Tensor | slice, hidden: Tensor, dx: Tensor, live: Tensor
) -> tuple[Tensor | slice, Tensor, Tensor]:
    """Leave out the rows of a chunk that are not live, if there are enough of them; moves dx rows up in place."""
    kept = live.nonzero()[:, 0]
    if kept.numel() > SPARSE_CHUNK * live.numel():
        return index, hidden, dx
    for to, source in enumerate(kept.tolist()):
        if to != source:
            dx[to].copy_(dx[source])
    index = kept + index.start if isinstance(index, slice) else index[kept]
    return index, hidden[kept], dx[: kept.numel()]
