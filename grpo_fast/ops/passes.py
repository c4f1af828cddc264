"""The chunk loops: from hidden states to per-token numbers and gradients, one chunk of logits at a time.

Legend: T tokens, n rows that are computed (the others keep zeros), R rows of a chunk, H hidden size, V vocabulary.

One token's way: its hidden state is gathered into a chunk -> `backend.logits` -> `backend.statistics` (and the
objective) -> `backend.gradient` over the same buffer -> `backend.grad_hidden` and `grad_weight`. Every plan is this
loop, cut at a different place:

    forward       logits, statistics
    frozen_head   logits, statistics, unit gradient, grad_hidden        (the backward is a row scaling)
    single_pass,
    resident      logits, objective_rows, grad_hidden, grad_weight
    recompute     logits, statistics | backward: logits, gradient, grad_hidden, grad_weight
    lean          logits, statistics | backward, by vocabulary blocks: logits, gradient, grad_hidden, grad_weight
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.objectives import Tokens
from grpo_fast.ops.backend import Backend, Transform
from grpo_fast.ops.planner import RowBudget
from grpo_fast.packing import Segments

SPARSE_CHUNK = 0.75
"""Rows found to have no gradient leave before the backward GEMMs when at most this share of a chunk is left."""


@dataclass
class HeadCall:
    """The LM head applied to the rows that are computed.

    Attributes:
        hidden: `[T, H]`. weight: `[V, H]`, same dtype. targets: `[T]` int64.
        transform: bias, scale, soft cap; its temperature is a float or `[T]`.
        rows: `[n]` int64 increasing, the rows to compute, or None for all.
    """

    backend: Backend
    budget: RowBudget
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    transform: Transform
    rows: Tensor | None

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0] if self.rows is None else self.rows.numel()

    @property
    def accumulator(self) -> torch.dtype:
        """float32, or float64 for float64 inputs."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of the gradients handed back: the inputs' own, but float32 for float16, which a loss scaler multiplies."""
        return torch.float32 if self.hidden.dtype == torch.float16 else self.hidden.dtype

    def grad_scale(self, g: Tensor | None = None) -> float | Tensor:
        """Power of two by which float16 dx is held larger, as a weight of 1/T would underflow; 1 for other dtypes.

        From the largest |g| where g is known, else from the number of rows.
        """
        if self.hidden.dtype != torch.float16:
            return 1.0
        if g is None:
            return 2.0 ** math.ceil(math.log2(max(self.num_rows, 1)))
        largest = g.abs().amax() if g.numel() else g.new_ones(())
        return torch.exp2(-torch.log2(largest.clamp(min=1e-30)).floor())

    def select(self, start: int, stop: int) -> Tensor | slice:
        """Index of computed rows `start:stop` among the T rows."""
        return slice(start, stop) if self.rows is None else self.rows[start:stop]


@dataclass
class Chunk:
    """Some rows with their raw products `[R, V]`; R is padded to whole tiles, the first `n` rows are real."""

    index: Tensor | slice
    n: int
    hidden: Tensor
    logits: Tensor
    targets: Tensor
    transform: Transform


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


def active_rows(active: Tensor | None, num_rows: int) -> Tensor | None:
    """Indices of the true entries of `active`, increasing.

    Args:
        active: `[T]` bool, or None for all rows.
        num_rows: their number where the host knows it (then a GPU need not be waited for), else -1.
    """
    if active is None:
        return None
    if num_rows < 0 or active.device.type == "cpu":
        return active.nonzero()[:, 0]
    return torch.nonzero_static(active, size=num_rows)[:, 0]


def boundaries(num_rows: int, chunk_rows: int, row_counts: list[int] | None = None) -> Iterator[tuple[int, int]]:
    """Chunks of `num_rows` rows: as full as they get, or of whole sequences when `row_counts` is given."""
    if row_counts is None:
        for start in range(0, num_rows, chunk_rows):
            yield start, min(start + chunk_rows, num_rows)
        return
    start = stop = 0
    for count in row_counts:
        if stop + count - start > chunk_rows:
            yield start, stop
            start = stop
        stop += count
    if stop > start:
        yield start, stop


class Workspace:
    """The one buffer that chunks of logits live in."""

    def __init__(self, call: HeadCall, largest_chunk: int) -> None:
        tile = call.budget.tile_rows
        rows = -(-largest_chunk // tile) * tile
        self.buffer = call.backend.new_buffer(call.hidden, (rows, call.weight.shape[0]), call.accumulator)

    def chunk(self, call: HeadCall, start: int, stop: int) -> Chunk:
        """Gather computed rows `start:stop` and multiply them into the buffer."""
        index, n, tile = call.select(start, stop), stop - start, call.budget.tile_rows
        padded = -(-n // tile) * tile
        hidden = call.hidden.new_zeros((padded, call.hidden.shape[1]))
        hidden[:n] = call.hidden[index]
        targets = call.targets.new_zeros(padded)
        targets[:n] = call.targets[index]
        transform = call.transform.rows(index)
        if isinstance(transform.temperature, Tensor):
            temperature = transform.temperature.new_ones(padded)
            temperature[:n] = transform.temperature
            transform = Transform(transform.head, transform.bias, temperature)
        logits = self.buffer[:padded]
        call.backend.logits(hidden, call.weight, logits, tile)
        return Chunk(index, n, hidden, logits, targets, transform)


class GradientSink:
    """Where chunks' dx go: the backward GEMMs, a float32 sum over chunks, one rounding at the end."""

    def __init__(
        self,
        call: HeadCall,
        num_chunks: int,
        want: Wanted,
        scale: float | Tensor = 1.0,
    ) -> None:
        self.call = call
        self.scale = scale
        self.chunks_left = num_chunks
        self.hidden = call.hidden.new_zeros(call.hidden.shape, dtype=call.grad_dtype) if want.hidden else None
        self.weight = _WeightGradient(call, want.main_grad) if want.weight else None
        self.bias = call.weight.new_zeros(call.weight.shape[0], dtype=call.accumulator) if want.bias else None

    def add(self, chunk: Chunk, dx: Tensor, live: Tensor) -> None:
        """Take in dx `[n, V]` of a chunk; rows that are not `live` `[n]` are zero."""
        call, index, hidden = self.call, chunk.index, chunk.hidden[: chunk.n]
        self.chunks_left -= 1
        if dx.device.type == "cpu":  # counting the rows would make a GPU wait
            index, hidden, dx = _without_idle_rows(index, hidden, dx, live)
        if self.bias is not None:
            self.bias += dx.sum(0, dtype=call.accumulator)
        if self.weight is not None:
            self.weight.add(dx, hidden, last=self.chunks_left == 0)
        if self.hidden is not None:
            rows = call.hidden.new_zeros(hidden.shape, dtype=call.accumulator)
            call.backend.grad_hidden(dx, call.weight, rows)
            self.hidden[index] = rows.div_(self.scale).to(self.hidden.dtype)

    def finish(self) -> Gradients:
        """The gradients in the inputs' dtypes; the weight's is None if `main_grad` took it."""
        bias = None if self.bias is None else self.bias.div_(self.scale).to(self.call.grad_dtype)
        weight = None if self.weight is None else self.weight.finish(self.scale)
        return Gradients(self.hidden, weight, bias)


class _WeightGradient:
    """The weight's gradient `[V, H]`, chunk by chunk: a float32 sum, which the last chunk's product rounds.

    float16's is scaled, so that it stays float32 until the scale is taken out. `main_grad` takes the sum by addition.
    """

    def __init__(self, call: HeadCall, main_grad: Tensor | None) -> None:
        self.call, self.main_grad = call, main_grad
        self.scaled = call.hidden.dtype == torch.float16
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
                self.main_grad.add_(self.sum.div_(scale))
            return None
        if self.result is None:  # no rows at all
            return self.call.weight.new_zeros(self.call.weight.shape, dtype=self.call.grad_dtype)
        return self.result.div_(scale) if self.scaled else self.result


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


def forward_pass(call: HeadCall, *, unit_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Statistics of the rows: (logprobs, entropy, lse) `[T]`, and u `[T, H]` = d logprob_t / d hidden_t if asked."""
    tokens, dtype = call.hidden.shape[0], call.accumulator
    logprobs, entropy, lse = (call.hidden.new_zeros(tokens, dtype=dtype) for _ in range(3))
    sink = GradientSink(call, 1, Wanted(hidden=unit_gradient, weight=False, bias=False))
    workspace = Workspace(call, min(call.num_rows, call.budget.chunk_rows))
    for start, stop in boundaries(call.num_rows, call.budget.chunk_rows):
        chunk = workspace.chunk(call, start, stop)
        statistics = call.backend.statistics(chunk.logits, chunk.targets, chunk.transform)
        for whole, part in zip((logprobs, entropy, lse), statistics, strict=True):
            whole[chunk.index] = part[: chunk.n]
        if unit_gradient:
            ones = logprobs.new_ones(chunk.n)
            sink.add(chunk, _gradient(call, chunk, lse, entropy, ones, None), ones != 0)
    return logprobs, entropy, lse, sink.hidden


def backward_pass(call: HeadCall, lse: Tensor, entropy: Tensor, g: Tensor, e: Tensor | None, want: Wanted) -> Gradients:
    """Gradients from g = dloss/dlogprob and e = dloss/dentropy `[T]`, computing the logits again."""
    limits = list(boundaries(call.num_rows, call.budget.chunk_rows))
    sink = GradientSink(call, len(limits), want, call.grad_scale(g))
    workspace = Workspace(call, min(call.num_rows, call.budget.chunk_rows))
    for start, stop in limits:
        chunk = workspace.chunk(call, start, stop)
        g_rows, e_rows = g[chunk.index] * sink.scale, None if e is None else e[chunk.index] * sink.scale
        dx = _gradient(call, chunk, lse, entropy, g_rows, e_rows)
        sink.add(chunk, dx, g_rows != 0 if e_rows is None else (g_rows != 0) | (e_rows != 0))
    return sink.finish()


def _gradient(
    call: HeadCall, chunk: Chunk, lse: Tensor, entropy: Tensor, g_rows: Tensor, e_rows: Tensor | None
) -> Tensor:
    """dx `[n, V]` over a chunk's logits, from `[T]` statistics and `[n]` gradients."""
    real = slice(0, chunk.n)
    return call.backend.gradient(
        chunk.logits[real],
        chunk.targets[real],
        lse[chunk.index],
        entropy[chunk.index],
        g_rows,
        e_rows,
        chunk.transform.rows(real),
        dtype=call.hidden.dtype,
    )


def objective_pass(
    call: HeadCall,
    tokens: Tokens,
    weights: Tensor,
    config: LossConfig,
    row_counts: list[int] | None,
    want: Wanted,
) -> tuple[Tensor, Tensor, Gradients]:
    """Everything in one pass over the logits: (logprobs, entropy) `[T]` and the gradients of the loss.

    Args:
        tokens, weights: of all T tokens.
        row_counts: computed rows of each sequence, for objectives that couple a sequence's tokens; else None.
    """
    logprobs, entropy = (call.hidden.new_zeros(call.hidden.shape[0], dtype=call.accumulator) for _ in range(2))
    limits = list(boundaries(call.num_rows, call.budget.chunk_rows, row_counts))
    sink = GradientSink(call, len(limits), want, call.grad_scale())
    workspace = Workspace(call, max((stop - start for start, stop in limits), default=0))
    for start, stop in limits:
        chunk = workspace.chunk(call, start, stop)
        dx, logprobs[chunk.index], entropy[chunk.index], live = call.backend.objective_rows(
            chunk.logits,
            chunk.targets,
            chunk.transform,
            take_tokens(tokens, chunk.index, start, stop, row_counts),
            weights[chunk.index],
            config,
            dtype=call.hidden.dtype,
            grad_scale=sink.scale,
        )
        sink.add(chunk, dx, live)
    return logprobs, entropy, sink.finish()


def take_tokens(tokens: Tokens, index: Tensor | slice, start: int, stop: int, row_counts: list[int] | None) -> Tokens:
    """The tokens of computed rows `start:stop`, with the sequences among them (one, where none is needed)."""
    if row_counts is None:
        cu_seqlens = torch.arange(2, device=tokens.mask.device) * (stop - start)
    else:
        ends = sorted({end for end in accumulate(row_counts) if start < end <= stop})
        cu_seqlens = torch.tensor([0, *(end - start for end in ends)], device=tokens.mask.device)
    segments = Segments(cu_seqlens, stop - start)
    return Tokens(
        advantages=tokens.advantages[index],
        mask=tokens.mask[index],
        segments=segments,
        num_active=tokens.num_active,
        **tokens.optional(lambda values: values[index]),
    )
