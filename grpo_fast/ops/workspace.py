"""Where rows live on their way: gathered into chunks, multiplied piece by piece into buffers of logits.

Legend: T tokens, n rows that are computed (the others keep zeros), R rows of a chunk, r rows of a piece, H hidden size,
V vocabulary.

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

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.ops.backend import Backend, RowChunk, Transform
from grpo_fast.ops.planner import RowBudget


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
    """Some rows, gathered; R is padded to whole tiles, the first `n` rows are real. `dx` `[n, V]` once it is known."""

    index: Tensor | slice
    n: int
    hidden: Tensor
    dx: Tensor | None = None


@dataclass
class Piece:
    """Some rows of a chunk with their raw products.

    Attributes:
        start, stop: which of the computed rows these are. index: the same among the T rows.
        rows: their raw products `[r, V]` and what belongs to them.
        out: `[r, V]` where dx goes, or None for over the logits.
    """

    start: int
    stop: int
    index: Tensor | slice
    rows: RowChunk
    out: Tensor | None


def active_rows(active: Tensor | None, num_rows: int = -1) -> Tensor | None:
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


class RowStream:
    """A second stream for row functions, beside the GEMMs of the caller's: see the module."""

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        self.caller = torch.cuda.current_stream(device)
        self.stream = torch.cuda.Stream(device)
        self.free: list[torch.cuda.Event | None] = [None] * num_buffers

    def before_product(self, buffer: int) -> None:
        """The caller's stream waits until the row functions have left a buffer of logits."""
        event = self.free[buffer]
        if event is not None:
            self.caller.wait_event(event)

    def enter(self) -> AbstractContextManager[None]:
        """A context in which kernels run on the second stream, after all that the caller's has been given."""
        self.stream.wait_event(self.caller.record_event())
        context: AbstractContextManager[None] = torch.cuda.stream(self.stream)
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
        two = num_buffers > 1 and call.hidden.device.type == "cuda"
        self.row_stream = RowStream(call.hidden.device, num_buffers) if two else None

    def _rows(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        call = self.call
        vocab = call.weight.shape[0]
        return call.backend.new_buffer(call.hidden, (num_rows, call.backend.row_pitch(vocab)), dtype)[:, :vocab]

    def chunk(self, start: int, stop: int) -> Chunk:
        """Gather computed rows `start:stop`."""
        call, n = self.call, stop - start
        index = call.select(start, stop)
        hidden = call.hidden.new_zeros((-(-n // self.tile) * self.tile, call.hidden.shape[1]))
        hidden[:n] = call.hidden[index]
        return Chunk(index, n, hidden, None if self.staged is None else self.staged[:n])

    def pieces(self, chunk: Chunk, start: int) -> Iterator[Piece]:
        """The chunk's rows, with logits; the chunk begins at computed row `start`. Buffers are used again."""
        call, second = self.call, self.row_stream
        for turn, first in enumerate(range(0, chunk.n, self.piece_rows)):
            last, buffer = min(first + self.piece_rows, chunk.n), turn % len(self.buffers)
            hidden = chunk.hidden[first : first + self.piece_rows]
            logits = self.buffers[buffer][: hidden.shape[0]]
            if second is not None:
                second.before_product(buffer)
            call.backend.logits(hidden, call.weight, logits, self.tile)
            with nullcontext() if second is None else second.enter():
                index = call.select(start + first, start + last)
                yield Piece(
                    start + first,
                    start + last,
                    index,
                    RowChunk(logits[: last - first], call.targets[index], call.transform.rows(index)),
                    None if chunk.dx is None else chunk.dx[first:last],
                )
                if second is not None:
                    second.leave(buffer)
        if second is not None:
            second.join()
