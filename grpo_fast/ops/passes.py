"""The chunk loops: from hidden states to per-token numbers and gradients, one chunk of logits at a time.

Legend: T packed tokens, n rows that are computed (the others keep zeros), R rows of a chunk, r rows of a piece,
H hidden size, V vocabulary; dx is the loss's gradient in the raw products.

One row's way: its hidden state is gathered into a chunk -> `logits` -> `statistics` (and the objective) -> `gradient`
-> `grad_hidden` and `grad_weight`, all of the backend. Every plan is this loop, cut at a different place:

    forward       logits, statistics                                    (fused_forward: the two in one kernel)
    frozen_head   logits, statistics, unit gradient, grad_hidden        (the backward is a row scaling)
    single_pass,
    resident      logits, objective_rows, grad_hidden, grad_weight
    recompute     logits, statistics | backward: logits, gradient, grad_hidden, grad_weight
    lean          logits, statistics | backward, by vocabulary blocks: logits, gradient, grad_hidden, grad_weight

Where supports are given (`support.py`) rows of small ones are computed apart, all at once, by the same row functions on
rows of their own lengths (`sparse_*`), and of masked rows' logits the row functions see the support's.

What is known of tokens is gathered once a call into `[n]` tensors, of which chunks and pieces are slices; only hidden
states are gathered chunk by chunk. A piece is rows whose logits are held at once; a chunk is rows whose dx meet in one
pair of backward products. Where the budget stages dx, a chunk is many pieces, each one logits product of `tile_rows`
rows, and dx has a buffer of its own:

    logits   [tile_rows, V] float32, one or two     dx   [staged_rows, V] bf16, fp16 or float32

Otherwise a chunk is one piece of up to `chunk_rows` rows and dx is written over its logits. With two buffers of logits
row functions have a stream of their own (`row_stream.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.backends.base import (
    ObjectiveResults,
    RowChunk,
    RowObjective,
    RowSlopes,
    RowStatistics,
)
from grpo_fast.config import LossConfig
from grpo_fast.devices import TRAITS
from grpo_fast.objectives import Tokens, slope_beside_advantage
from grpo_fast.ops.call import HeadCall
from grpo_fast.ops.row_stream import RowStream
from grpo_fast.ops.sparse import SparseGradients, SparseRows
from grpo_fast.ops.support import Supported

SPARSE_CHUNK = 0.75
"""Rows found to have no gradient leave before the backward products when at most this share of a chunk is left."""


class Wanted(NamedTuple):
    """Which gradients to compute; `main_grad` `[V, H]` float32 takes the weight's by addition."""

    hidden: bool
    weight: bool
    bias: bool
    main_grad: Tensor | None

    @staticmethod
    def of(want: Sequence[bool], main_grad: Tensor | None = None) -> Wanted:
        """From what `HeadCall.wants` says."""
        return Wanted(want[0], want[1], want[2], main_grad)


class Gradients(NamedTuple):
    """Accumulated gradients; None where not asked for. hidden: `[T, H]`; weight: `[V, H]`; bias: `[V]`."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


# -- chunks and pieces ------------------------------------------------------------------------------------------------


@dataclass
class Piece:
    """Some rows of a chunk with their raw products; all of them masked, or none.

    Attributes:
        slice: which of the computed rows these are.
        dense: their raw products `[r, V]` and what belongs to them.
        dx: `[r, V]` where dx goes, over the logits or `staged` elsewhere.
        stream: a context in which the row functions run.
        masked: their supports, if only these count.
    """

    slice: slice
    dense: RowChunk
    dx: Tensor
    staged: bool
    stream: AbstractContextManager[Any]
    masked: Supported | None

    @property
    def out(self) -> Tensor | None:
        """What row functions take for where dx goes."""
        return self.dx if self.staged and self.masked is None else None

    @cached_property
    def rows(self) -> RowChunk:
        """As the row functions take them: masked ones' entries are gathered when this is first asked for."""
        if self.masked is None:
            return self.dense
        of = self.masked.of
        return self.masked.chunk(self.dense.logits[of.rows, of.ids], self.dense.transform)

    def write(self, dx: Tensor) -> None:
        """Put dx in its place: that of masked rows is `[N]`, that of others is there."""
        if self.masked is not None:
            of = self.masked.of
            self.dx.zero_()[of.rows, of.ids] = dx.to(self.dx.dtype)


RowFunction = Callable[[Piece], Tensor]
"""From a piece to its dx, `[r, V]` or `[N]`; which rows are live it writes down."""


@dataclass
class Chunk:
    """Computed rows `start:stop`, gathered; `hidden` `[R, H]` is padded to whole tiles, the first rows are real.

    `dx` `[stop - start, V]`, `staged` where it has memory of its own.
    """

    start: int
    stop: int
    hidden: Tensor
    dx: Tensor
    staged: bool


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
        device = call.hidden.device
        two = num_buffers > 1 and TRAITS[device.type].streams is not None
        self.row_stream = RowStream(device, num_buffers) if two else None

    def _rows(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        engine, vocab = self.call.engine, self.call.weight.shape[0]
        return engine.new_buffer(self.call.hidden, (num_rows, engine.row_pitch(vocab)), dtype)[:, :vocab]

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
        if self.staged is not None:
            return Chunk(start, stop, hidden, self.staged[:n], staged=True)
        return Chunk(start, stop, hidden, call.engine.dx_place(self.buffers[0][:n], call.hidden.dtype), staged=False)

    def pieces(self, chunk: Chunk) -> Iterator[Piece]:
        """The chunk's rows, with logits. Row functions run inside `piece.stream`. Buffers are used again."""
        call, second, n = self.call, self.row_stream, chunk.stop - chunk.start
        try:
            for turn, first in enumerate(range(0, n, self.piece_rows)):
                last, buffer = min(first + self.piece_rows, n), turn % len(self.buffers)
                rows = slice(chunk.start + first, chunk.start + last)
                hidden = chunk.hidden[first : first + self.piece_rows]
                logits = self.buffers[buffer][: hidden.shape[0]]
                if second is not None:
                    second.before_product(buffer)
                call.engine.logits(hidden, call.weight, logits, self.tile)
                for part, masked in of_one_kind(call, rows):
                    yield Piece(
                        part,
                        RowChunk(
                            logits[part.start - rows.start : part.stop - rows.start],
                            call.row_targets[part],
                            call.transform.rows(part),
                        ),
                        chunk.dx[part.start - chunk.start : part.stop - chunk.start],
                        chunk.staged,
                        nullcontext() if second is None else second.after_product(),
                        masked,
                    )
                if second is not None:
                    second.leave(buffer)
        finally:
            if second is not None:
                second.join()


def of_one_kind(call: HeadCall, rows: slice) -> Iterator[tuple[slice, Supported | None]]:
    """Which of the rows are whole, and which masked, with their supports."""
    cut = min(max(call.num_whole, rows.start), rows.stop)
    if rows.start < cut:
        yield slice(rows.start, cut), None
    if cut < rows.stop:
        assert call.masked is not None
        yield slice(cut, rows.stop), call.masked.part(cut - call.num_whole, rows.stop - call.num_whole)


def by_kind(call: HeadCall) -> tuple[HeadCall, SparseRows | None]:
    """(the call with the dense rows alone, the sparse rows or None)."""
    split = call.split()
    if split is None:
        return call, None
    sparse = None if split.sparse is None else SparseRows.among(call, split.sparse_rows, split.sparse)
    everything = split.num_whole == call.hidden.shape[0]
    dense = replace(call, support=None, rows=None if everything else split.dense, masked=split.masked)
    return dense, sparse


def _together(dense: HeadCall, values: Tensor, sparse: SparseRows | None, others: Tensor | None) -> Tensor:
    """`[T]`: values of the dense rows and those of the sparse ones; zero elsewhere."""
    whole = dense.scatter(values)
    if sparse is not None and others is not None:
        whole.index_copy_(0, sparse.index, others)
    return whole


# -- passes -----------------------------------------------------------------------------------------------------------


def forward_pass(call: HeadCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Statistics of the rows: (logprobs, entropy, lse) `[T]`; `frozen_head` adds d logprob_t / d hidden_t `[T, H]`."""
    call, sparse = by_kind(call)
    results = RowStatistics(*(call.new_rows() for _ in range(3)))
    unit_gradient = None

    def statistics(piece: Piece) -> RowStatistics:
        found = RowStatistics(*(whole[piece.slice] for whole in results))
        call.engine.statistics(piece.rows, found)
        return found

    others: Sequence[Tensor | None] = (None,) * 3
    of_sparse = None
    if sparse is not None:
        others = found = sparse.statistics()
        if call.plan == "frozen_head":
            slopes = RowSlopes(found.lse, found.entropy, torch.ones_like(found.lse), None)
            of_sparse = sparse.gradients(slopes, wants_hidden=True)
    if call.plan == "fused_forward":
        results = call.engine.fused_forward(call.gather(call.hidden), call.weight, call.row_targets, call.transform)
    elif call.plan == "frozen_head":
        ones = torch.ones_like(results.logprobs)
        live = torch.ones_like(ones, dtype=torch.bool)

        def unit(piece: Piece) -> Tensor:
            found = statistics(piece)
            slopes = RowSlopes(found.lse, found.entropy, ones[piece.slice], None)
            return call.engine.gradient(piece.rows, slopes, dtype=call.hidden.dtype, out=piece.out)

        want = Wanted.of((True, False, False))
        unit_gradient = _gradient_pass(call, unit, live, want, sparse=of_sparse).hidden
    else:
        by_tile, rows = call.budget.staged_rows > 0, call.budget.rows_at_once
        workspace = Workspace(call, min(call.num_rows, rows), by_tile=by_tile, with_dx=False)
        for start, stop in boundaries(call.num_rows, rows):
            for piece in workspace.pieces(workspace.chunk(start, stop)):
                with piece.stream:
                    statistics(piece)
    logprobs, entropy, lse = (
        _together(call, values, sparse, other) for values, other in zip(results, others, strict=True)
    )
    return logprobs, entropy, lse, unit_gradient


def backward_pass(call: HeadCall, lse: Tensor, entropy: Tensor, g: Tensor, e: Tensor | None, want: Wanted) -> Gradients:
    """Gradients from the slopes g = dloss/dlogprob and e = dloss/dentropy `[T]`, computing the logits again."""
    whole = RowSlopes(lse, entropy, g, e)
    call, sparse = by_kind(call)
    slopes, scale = scaled_slopes(call, whole)
    live = slopes.g != 0 if slopes.e is None else (slopes.g != 0) | (slopes.e != 0)

    def rows(piece: Piece) -> Tensor:
        return call.engine.gradient(piece.rows, slopes.part(piece.slice), dtype=call.hidden.dtype, out=piece.out)

    of_sparse = None if sparse is None else sparse.backward(whole, wants_hidden=want.hidden)
    return _gradient_pass(call, rows, live, want, scale, sparse=of_sparse)


def scaled_slopes(call: HeadCall, slopes: RowSlopes) -> tuple[RowSlopes, Tensor | None]:
    """The computed rows' slopes `[n]` from `[T]`, multiplied by the scale that comes beside them, if there is one."""
    lse, entropy, g = (call.gather(values) for values in (slopes.lse, slopes.entropy, slopes.g))
    e = None if slopes.e is None else call.gather(slopes.e)
    if not call.scales_dx:
        return RowSlopes(lse, entropy, g, e), None
    scale = call.grad_scale(g, e)
    return RowSlopes(lse, entropy, g * scale, None if e is None else e * scale), scale


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
    call, sparse = by_kind(call)
    results = ObjectiveResults(call.new_rows(), call.new_rows(), call.new_rows(torch.bool))
    others = of_sparse = None
    if sparse is not None:
        others, of_sparse = sparse.objective(tokens, weights, config, wants_hidden=want.hidden)
    if call.rows is not None:
        tokens, weights = tokens.rows(call.rows, row_counts), weights[call.rows]
    scale = None
    if call.scales_dx:
        scale = call.grad_scale(
            weights * tokens.advantages,
            weights * slope_beside_advantage(config),
            config.entropy_coef / tokens.bonus_count if config.entropy_coef else None,
        )

    def rows(piece: Piece) -> Tensor:
        part = tokens.part(piece.slice.start, piece.slice.stop, row_counts)
        own = RowObjective(part, weights[piece.slice], config, scale)
        place = ObjectiveResults(*(whole[piece.slice] for whole in results))
        return call.engine.objective_rows(piece.rows, own, place, dtype=call.hidden.dtype, out=piece.out)

    gradients = _gradient_pass(call, rows, results.live, want, scale, row_counts, of_sparse)
    logprobs = _together(call, results.logprobs, sparse, others and others.logprobs)
    entropy = _together(call, results.entropy, sparse, others and others.entropy)
    return logprobs, entropy, gradients


def _gradient_pass(
    call: HeadCall,
    rows: RowFunction,
    live: Tensor,
    want: Wanted,
    scale: Tensor | None = None,
    row_counts: list[int] | None = None,
    sparse: SparseGradients | None = None,
) -> Gradients:
    """Chunk by chunk: logits and row function of every piece, then the backward products.

    Args:
        live: `[n]` bool, known for a piece's rows once the row function has run: whether their dx is not zero.
        scale: by which dx is larger than it is.
        row_counts: computed rows of each sequence where a chunk must hold whole sequences.
        sparse: of the rows that are not dense.
    """
    by_tile = call.budget.staged_rows > 0 and row_counts is None
    rows_at_once = call.budget.rows_at_once if by_tile else call.budget.chunk_rows
    limits = list(boundaries(call.num_rows, rows_at_once, row_counts))
    largest = max((stop - start for start, stop in limits), default=0)
    sink = GradientSink(call, largest, len(limits), want, scale)
    workspace = Workspace(call, largest, by_tile=by_tile, with_dx=True)
    for start, stop in limits:
        chunk = workspace.chunk(start, stop)
        for piece in workspace.pieces(chunk):
            with piece.stream:
                piece.write(rows(piece))
        sink.add(chunk, live[start:stop])
    return sink.finish(sparse)


# -- where chunks of dx come together ---------------------------------------------------------------------------------


class GradientSink:
    """Where chunks' dx go: the backward products, a float32 sum over chunks, one rounding at the end.

    dHidden `[T, H]`: a row is one product. dWeight `[V, H]`: the last chunk's product rounds the sum; float16's is
    scaled, so that it stays float32 until the scale is taken out. `main_grad` takes the sum by addition.

    Args:
        largest: rows of the largest chunk.
    """

    def __init__(self, call: HeadCall, largest: int, num_chunks: int, want: Wanted, scale: Tensor | None) -> None:
        self.call, self.want, self.scale = call, want, scale
        self.chunks_left = num_chunks
        hidden, vocab = call.hidden, call.weight.shape[0]
        self.hidden = hidden.new_zeros(hidden.shape, dtype=call.grad_dtype) if want.hidden else None
        self.rows = hidden.new_empty((largest, hidden.shape[1]), dtype=call.accumulator) if want.hidden else None
        self.bias = hidden.new_zeros(vocab, dtype=call.accumulator) if want.bias else None
        self.weight = want.main_grad if scale is None else None

    def add(self, chunk: Chunk, live: Tensor) -> None:
        """Take in dx `[R, V]` of a chunk; rows that are not `live` `[R]` are zero."""
        call, dx, hidden = self.call, chunk.dx, chunk.hidden[: chunk.stop - chunk.start]
        whole = slice(chunk.start, chunk.stop)
        index: Tensor | slice = whole if call.rows is None else call.rows[whole]
        self.chunks_left -= 1
        if not TRAITS[dx.device.type].asynchronous:  # counting the rows would make a GPU wait
            index, hidden, dx = _without_idle_rows(index, hidden, dx, live)
        if self.bias is not None:
            self.bias += dx.sum(0, dtype=call.accumulator)
        if self.want.weight:
            self._add_weight(dx, hidden)
        if self.hidden is not None and self.rows is not None:
            sums = self.rows[: dx.shape[0]]
            call.engine.grad_hidden(dx, call.weight, sums)
            sums = unscaled(sums, self.scale)
            if isinstance(index, slice):
                self.hidden[index].copy_(sums)
            else:
                self.hidden.index_copy_(0, index, sums.to(self.hidden.dtype))

    def _add_weight(self, dx: Tensor, hidden: Tensor) -> None:
        call, base = self.call, self.weight
        rounds = self.chunks_left == 0 and self.want.main_grad is None
        if rounds or base is None:
            dtype = call.grad_dtype if rounds else call.accumulator
            self.weight = call.engine.new_buffer(dx, tuple(call.weight.shape), dtype)
        assert self.weight is not None
        call.engine.grad_weight(dx, hidden, self.weight, base)

    def finish(self, sparse: SparseGradients | None = None) -> Gradients:
        """The gradients in the inputs' dtypes, with those of sparse rows; the weight's is None if `main_grad` took it.

        An id that both kinds of rows touch is rounded twice: the dense product rounds its own sum.
        """
        call, want, weight, main_grad = self.call, self.want, self.weight, self.want.main_grad
        bias = None if self.bias is None else unscaled(self.bias, self.scale)
        if weight is not None and weight is not main_grad:
            weight = unscaled(weight, self.scale)
            if main_grad is not None:
                main_grad.add_(weight)
        elif want.weight and main_grad is None:  # no dense rows at all
            weight = call.engine.new_buffer(call.weight, tuple(call.weight.shape), call.grad_dtype).zero_()
        if sparse is not None:
            sparse.add_to(self.hidden, weight if main_grad is None else main_grad, bias)
        return Gradients(
            self.hidden, None if main_grad is not None else weight, None if bias is None else bias.to(call.grad_dtype)
        )


def unscaled(values: Tensor, scale: Tensor | None) -> Tensor:
    """values / scale, in place."""
    return values if scale is None else values.div_(scale)


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
