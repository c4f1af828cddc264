"""Where rows live on their way: gathered into chunks, multiplied piece by piece into buffers of logits.

Legend: T packed tokens, n rows that are computed (the others keep zeros), R rows of a chunk, r rows of a piece,
H hidden size, V vocabulary. What is known of tokens is gathered once a call into `[n]` tensors, of which chunks and
pieces are slices; only hidden states are gathered chunk by chunk.

A piece is rows whose logits are held at once; a chunk is rows whose dx meet in one pair of backward GEMMs. Where the
budget stages dx, a chunk is many pieces, each one logits GEMM of `tile_rows` rows, and dx has a buffer of its own:

    logits   [tile_rows, V] float32, one or two     dx   [staged_rows, V] bf16, fp16 or float32

Otherwise a chunk is one piece of up to `chunk_rows` rows and dx is written over its logits.

With two buffers of logits the row functions of one piece run on a second stream of the GPU beside the logits GEMM of
the next. Events order the two, the host never waits; what a row function allocates belongs to its stream, and
everything has come back to the caller's stream when the chunk is done, so that the caching allocator and graph capture
see one stream forking and joining.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from grpo_fast.backends.base import Backend, RowChunk, Transform
from grpo_fast.backends.devices import traits
from grpo_fast.ops.planner import RowBudget


@dataclass
class HeadCall:
    """The LM head applied to the rows that are computed.

    Attributes:
        hidden: `[T, H]`. weight: `[V, H]`, same dtype.
        targets: `[n]` int64. transform: bias, scale, soft cap; its temperature is a float or `[n]`.
        rows: `[n]` int64 increasing, the rows to compute, or None for all.
    """

    backend: Backend
    budget: RowBudget
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    transform: Transform
    rows: Tensor | None

    @staticmethod
    def of(
        backend: Backend,
        budget: RowBudget,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        transform: Transform,
        rows: Tensor | None,
    ) -> HeadCall:
        """The call on `[T]` targets and temperatures."""
        if rows is not None:
            targets, transform = targets[rows], transform.rows(rows)
        return HeadCall(backend, budget, hidden, weight, targets, transform, rows)

    @property
    def num_rows(self) -> int:
        return self.targets.numel()

    @property
    def accumulator(self) -> torch.dtype:
        """float32, or float64 for float64 inputs."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of the gradients handed back: the inputs' own, but float32 for float16, which a loss scaler multiplies."""
        return torch.float32 if self.hidden.dtype == torch.float16 else self.hidden.dtype

    def gather(self, values: Tensor) -> Tensor:
        """The computed rows `[n, ...]` of `[T, ...]` values."""
        return values if self.rows is None else values[self.rows]

    def scatter(self, values: Tensor) -> Tensor:
        """`[T]` values from those of the computed rows; zero elsewhere."""
        if self.rows is None:
            return values
        return values.new_zeros(self.hidden.shape[0]).index_copy_(0, self.rows, values)

    def new_rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """Memory `[n]` for a result of the row functions, in the accumulator's dtype by default."""
        return self.hidden.new_empty(self.num_rows, dtype=self.accumulator if dtype is None else dtype)

    @property
    def scales_dx(self) -> bool:
        """Whether dx is held larger than it is, by `grad_scale`: float16, where a weight of 1/T would underflow."""
        return self.hidden.dtype == torch.float16

    def grad_scale(self, *slopes: Tensor | None) -> Tensor:
        """The power of two by which dx is held larger, 0-dim float32.

        It brings the largest of the rows' |dloss/dlogprob| and |dloss/dentropy| (of what is known of them), times the
        largest d z / d x, to between 1 and 2: 2^15 is left for ratios above 1.
        """
        largest = self.hidden.new_zeros((), dtype=torch.float32)
        if self.num_rows == 0:
            return largest + 1
        for slope in slopes:
            if slope is not None:
                known = torch.where(slope.isfinite(), slope.abs(), 0.0)
                largest = torch.maximum(largest, known.amax().float())
        temperature = self.transform.temperature
        sharpest = temperature.amin().float() if isinstance(temperature, Tensor) else temperature
        largest = largest * abs(self.transform.head.logit_scale) / sharpest
        return torch.where(largest > 0, _power_of_two_over(largest), 1.0)


def _power_of_two_over(largest: Tensor) -> Tensor:
    """The power of two s with 1 <= s largest < 2, exactly, within 2^-100 and 2^100; float32."""
    exponent = torch.frexp(largest).exponent  # largest = m 2^exponent, m in [1/2, 1)
    return ((128 - exponent.clamp(-99, 101)).to(torch.int32) << 23).view(torch.float32)


@dataclass
class Chunk:
    """Computed rows `start:stop`, gathered; `hidden` `[R, H]` is padded to whole tiles, the first rows are real.

    `dx` `[stop - start, V]` where it has memory of its own.
    """

    start: int
    stop: int
    hidden: Tensor
    dx: Tensor | None = None

    @property
    def n(self) -> int:
        return self.stop - self.start


@dataclass
class Piece:
    """Some rows of a chunk with their raw products.

    Attributes:
        start, stop: which of the computed rows these are.
        rows: their raw products `[r, V]` and what belongs to them.
        out: `[r, V]` where dx goes, or None for over the logits.
        stream: a context in which the row functions run.
    """

    start: int
    stop: int
    rows: RowChunk
    out: Tensor | None
    stream: AbstractContextManager[Any]

    @property
    def slice(self) -> slice:
        """Of the `[n]` tensors."""
        return slice(self.start, self.stop)


def active_rows(active: Tensor | None, num_rows: int = -1) -> Tensor | None:
    """Indices of the true entries of `active`, increasing.

    Args:
        active: `[T]` bool, or None for all rows.
        num_rows: their number where the host knows it (then a GPU need not be waited for), else -1.
    """
    if active is None:
        return None
    if num_rows < 0 or not traits(active.device).asynchronous:
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


@cache
def _side_stream(streams: Any, device: torch.device) -> Any:
    """One stream a device: each has a pool of the allocator's memory to itself. Whoever shares it waits by events."""
    return streams.Stream(device)


class RowStream:
    """A second stream for row functions, beside the GEMMs of the caller's: see the module."""

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        self.streams = traits(device).streams
        self.caller = self.streams.current_stream(device)
        self.stream = _side_stream(self.streams, device)
        self.free: list[Any] = [None] * num_buffers

    def before_product(self, buffer: int) -> None:
        """The caller's stream waits until the row functions have left a buffer of logits."""
        event = self.free[buffer]
        if event is not None:
            self.caller.wait_event(event)

    def after_product(self) -> AbstractContextManager[Any]:
        """A context in which kernels run on the second stream, after all that the caller's has been given by now."""
        self.stream.wait_event(self.caller.record_event())
        context: AbstractContextManager[Any] = self.streams.stream(self.stream)
        return context

    def leave(self, buffer: int) -> None:
        """The row functions of a buffer have all been given."""
        self.free[buffer] = self.stream.record_event()

    def join(self) -> None:
        """The caller's stream goes on when the second one is done."""
        self.caller.wait_stream(self.stream)


class Workspace:
    """The buffers of a pass.

    Args:
        largest_chunk: rows.
        by_tile: whether pieces are single tiles, so that dx needs memory of its own, or whole chunks.
        with_dx: whether there will be a dx at all.
    """

    def __init__(self, call: HeadCall, largest_chunk: int, *, by_tile: bool, with_dx: bool) -> None:
        self.call, self.tile = call, call.budget.tile_rows
        num_tiles = -(-largest_chunk // self.tile)
        padded = num_tiles * self.tile
        self.piece_rows = min(self.tile, padded) if by_tile else padded
        num_buffers = max(min(call.budget.num_buffers, num_tiles), 1) if by_tile else 1
        self.buffers = [self._rows(self.piece_rows, call.accumulator) for _ in range(num_buffers)]
        self.staged = self._rows(padded, call.hidden.dtype) if by_tile and with_dx else None
        two = num_buffers > 1 and traits(call.hidden.device).streams is not None
        self.row_stream = RowStream(call.hidden.device, num_buffers) if two else None

    def _rows(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        call = self.call
        vocab = call.weight.shape[0]
        return call.backend.new_buffer(call.hidden, (num_rows, call.backend.row_pitch(vocab)), dtype)[:, :vocab]

    def chunk(self, start: int, stop: int) -> Chunk:
        """Gather computed rows `start:stop`."""
        call, n = self.call, stop - start
        padded = -(-n // self.tile) * self.tile
        if call.rows is None and padded == n:
            hidden = call.hidden[start:stop]
        else:
            hidden = call.hidden.new_empty(padded, call.hidden.shape[1])
            if call.rows is None:
                hidden[:n] = call.hidden[start:stop]
            else:
                torch.index_select(call.hidden, 0, call.rows[start:stop], out=hidden[:n])
            hidden[n:] = 0
        return Chunk(start, stop, hidden, None if self.staged is None else self.staged[:n])

    def pieces(self, chunk: Chunk) -> Iterator[Piece]:
        """The chunk's rows, with logits. Row functions run inside `piece.stream`. Buffers are used again."""
        call, second = self.call, self.row_stream
        try:
            for turn, first in enumerate(range(0, chunk.n, self.piece_rows)):
                last, buffer = min(first + self.piece_rows, chunk.n), turn % len(self.buffers)
                rows = slice(chunk.start + first, chunk.start + last)
                hidden = chunk.hidden[first : first + self.piece_rows]
                logits = self.buffers[buffer][: hidden.shape[0]]
                if second is not None:
                    second.before_product(buffer)
                call.backend.logits(hidden, call.weight, logits, self.tile)
                yield Piece(
                    rows.start,
                    rows.stop,
                    RowChunk(logits[: last - first], call.targets[rows], call.transform.rows(rows)),
                    None if chunk.dx is None else chunk.dx[first:last],
                    nullcontext() if second is None else second.after_product(),
                )
                if second is not None:
                    second.leave(buffer)
        finally:
            if second is not None:
                second.join()
