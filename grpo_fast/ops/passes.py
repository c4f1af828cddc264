"""The chunk loops: from hidden states to per-token numbers and gradients, one chunk of logits at a time.

Legend: T tokens, n rows that are computed (the others keep zeros), H hidden size, V vocabulary.

One token's way: its hidden state is gathered into a chunk -> `backend.logits` -> `backend.statistics` (and the
objective) -> `backend.gradient` -> `backend.grad_hidden` and `grad_weight`. Every plan is this loop, cut at a different
place (workspace.py says what a chunk and a piece of it are):

    forward       logits, statistics                                    (fused_forward: the two in one kernel)
    frozen_head   logits, statistics, unit gradient, grad_hidden        (the backward is a row scaling)
    single_pass,
    resident      logits, objective_rows, grad_hidden, grad_weight
    recompute     logits, statistics | backward: logits, gradient, grad_hidden, grad_weight
    lean          logits, statistics | backward, by vocabulary blocks: logits, gradient, grad_hidden, grad_weight
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.objectives import Tokens
from grpo_fast.ops.backend import RowObjective, RowSlopes
from grpo_fast.ops.gradients import Gradients, GradientSink, Wanted
from grpo_fast.ops.workspace import HeadCall, Piece, Workspace, boundaries
from grpo_fast.packing import Segments

RowFunction = Callable[[Piece], tuple[Tensor, Tensor]]
"""From a piece to its dx `[r, V]` and which of its rows are live `[r]`."""


def forward_pass(call: HeadCall, plan: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Statistics of the rows: (logprobs, entropy, lse) `[T]`; `frozen_head` adds d logprob_t / d hidden_t `[T, H]`."""
    dtype = call.accumulator
    whole = [call.hidden.new_zeros(call.hidden.shape[0], dtype=dtype) for _ in range(3)]
    logprobs, entropy, lse = whole

    def statistics(piece: Piece) -> None:
        parts = call.backend.statistics(piece.rows)
        for result, part in zip(whole, parts, strict=True):
            result[piece.index] = part

    if plan == "fused_forward":
        index = call.select(0, call.num_rows)
        transform = call.transform.rows(index)
        parts = call.backend.fused_forward(call.hidden[index], call.weight, call.targets[index], transform)
        for result, part in zip(whole, parts, strict=True):
            result[index] = part
        return logprobs, entropy, lse, None

    if plan != "frozen_head":
        by_tile, rows = call.budget.staged_rows > 0, call.budget.rows_at_once
        workspace = Workspace(call, min(call.num_rows, rows), by_tile=by_tile, with_dx=False)
        for start, stop in boundaries(call.num_rows, rows):
            for piece in workspace.pieces(workspace.chunk(start, stop), start):
                statistics(piece)
        return logprobs, entropy, lse, None

    def unit(piece: Piece) -> tuple[Tensor, Tensor]:
        statistics(piece)
        ones = logprobs.new_ones(piece.stop - piece.start)
        return _gradient(call, piece, lse, entropy, ones, None), ones != 0

    wanted = Wanted(hidden=True, weight=False, bias=False)
    return logprobs, entropy, lse, _gradient_pass(call, unit, wanted, 1.0).hidden


def backward_pass(call: HeadCall, lse: Tensor, entropy: Tensor, g: Tensor, e: Tensor | None, want: Wanted) -> Gradients:
    """Gradients from g = dloss/dlogprob and e = dloss/dentropy `[T]`, computing the logits again."""
    scale = call.grad_scale(g)

    def rows(piece: Piece) -> tuple[Tensor, Tensor]:
        g_rows = g[piece.index] * scale
        e_rows = None if e is None else e[piece.index] * scale
        dx = _gradient(call, piece, lse, entropy, g_rows, e_rows)
        return dx, g_rows != 0 if e_rows is None else (g_rows != 0) | (e_rows != 0)

    return _gradient_pass(call, rows, want, scale)


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
    scale = call.grad_scale()

    def rows(piece: Piece) -> tuple[Tensor, Tensor]:
        chunk = take_tokens(tokens, piece.index, piece.start, piece.stop, row_counts)
        dx, logprobs[piece.index], entropy[piece.index], live = call.backend.objective_rows(
            piece.rows,
            RowObjective(chunk, weights[piece.index], config, scale),
            dtype=call.hidden.dtype,
            out=piece.out,
        )
        return dx, live

    gradients = _gradient_pass(call, rows, want, scale, row_counts)
    return logprobs, entropy, gradients


def _gradient_pass(
    call: HeadCall, rows: RowFunction, want: Wanted, scale: float | Tensor, row_counts: list[int] | None = None
) -> Gradients:
    """Chunk by chunk: logits and row function of every piece, then the backward GEMMs.

    Args:
        row_counts: computed rows of each sequence where a chunk must hold whole sequences.
    """
    by_tile = call.budget.staged_rows > 0 and row_counts is None
    rows_at_once = call.budget.rows_at_once if by_tile else call.budget.chunk_rows
    limits = list(boundaries(call.num_rows, rows_at_once, row_counts))
    sink = GradientSink(call, len(limits), want, scale)
    largest = max((stop - start for start, stop in limits), default=0)
    workspace = Workspace(call, largest, by_tile=by_tile, with_dx=True)
    for start, stop in limits:
        chunk, live = workspace.chunk(start, stop), []
        for piece in workspace.pieces(chunk, start):
            dx, live_rows = rows(piece)
            live.append(live_rows)
        sink.add(chunk, dx if chunk.dx is None else chunk.dx, live[0] if len(live) == 1 else torch.cat(live))
    return sink.finish()


def _gradient(
    call: HeadCall, piece: Piece, lse: Tensor, entropy: Tensor, g_rows: Tensor, e_rows: Tensor | None
) -> Tensor:
    """dx of a piece, from `[T]` statistics and `[r]` gradients."""
    slopes = RowSlopes(lse[piece.index], entropy[piece.index], g_rows, e_rows)
    return call.backend.gradient(piece.rows, slopes, dtype=call.hidden.dtype, out=piece.out)


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
