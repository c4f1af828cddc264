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

import torch
from torch import Tensor

from grpo_fast.backends.base import ObjectiveResults, RowObjective, RowSlopes, RowStatistics
from grpo_fast.config import LossConfig
from grpo_fast.objectives import Tokens, slope_beside_advantage
from grpo_fast.ops.gradients import Gradients, GradientSink, Wanted
from grpo_fast.ops.workspace import HeadCall, Piece, Workspace, boundaries

RowFunction = Callable[[Piece], Tensor]
"""From a piece to its dx `[r, V]`; which rows are live it writes down."""


def forward_pass(call: HeadCall, plan: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Statistics of the rows: (logprobs, entropy, lse) `[T]`; `frozen_head` adds d logprob_t / d hidden_t `[T, H]`."""
    results = RowStatistics(*(call.new_rows() for _ in range(3)))
    unit_gradient = None

    def statistics(piece: Piece) -> RowStatistics:
        return call.backend.statistics(piece.rows, RowStatistics(*(whole[piece.slice] for whole in results)))

    if plan == "fused_forward":
        given = (call.gather(call.hidden), call.weight, call.targets, call.transform)
        results = RowStatistics(*call.backend.fused_forward(*given))
    elif plan == "frozen_head":
        ones = torch.ones_like(results.logprobs)
        live = torch.ones_like(ones, dtype=torch.bool)

        def unit(piece: Piece) -> Tensor:
            found = statistics(piece)
            slopes = RowSlopes(found.lse, found.entropy, ones[piece.slice], None)
            return call.backend.gradient(piece.rows, slopes, dtype=call.hidden.dtype, out=piece.out)

        wanted = Wanted(hidden=True, weight=False, bias=False)
        unit_gradient = _gradient_pass(call, unit, live, wanted, 1.0).hidden
    else:
        by_tile, rows = call.budget.staged_rows > 0, call.budget.rows_at_once
        workspace = Workspace(call, min(call.num_rows, rows), by_tile=by_tile, with_dx=False)
        for start, stop in boundaries(call.num_rows, rows):
            for piece in workspace.pieces(workspace.chunk(start, stop)):
                with piece.stream:
                    statistics(piece)
    logprobs, entropy, lse = (call.scatter(values) for values in results)
    return logprobs, entropy, lse, unit_gradient


def backward_pass(call: HeadCall, lse: Tensor, entropy: Tensor, g: Tensor, e: Tensor | None, want: Wanted) -> Gradients:
    """Gradients from g = dloss/dlogprob and e = dloss/dentropy `[T]`, computing the logits again."""
    slopes, scale = scaled_slopes(call, lse, entropy, g, e)
    live = slopes.g != 0 if slopes.e is None else (slopes.g != 0) | (slopes.e != 0)

    def rows(piece: Piece) -> Tensor:
        return call.backend.gradient(piece.rows, slopes.part(piece.slice), dtype=call.hidden.dtype, out=piece.out)

    return _gradient_pass(call, rows, live, want, scale)


def scaled_slopes(
    call: HeadCall, lse: Tensor, entropy: Tensor, g: Tensor, e: Tensor | None
) -> tuple[RowSlopes, float | Tensor]:
    """The computed rows' slopes `[n]` from `[T]`, with g and e multiplied by the scale that comes beside them."""
    lse, entropy, g = (call.gather(values) for values in (lse, entropy, g))
    e = None if e is None else call.gather(e)
    if not call.scales_dx:
        return RowSlopes(lse, entropy, g, e), 1.0
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
    results = ObjectiveResults(call.new_rows(), call.new_rows(), call.new_rows(torch.bool))
    if call.rows is not None:
        tokens, weights = tokens.rows(call.rows, row_counts), weights[call.rows]
    scale: float | Tensor = 1.0
    if call.scales_dx:
        scale = call.grad_scale(
            weights * tokens.advantages,
            weights * slope_beside_advantage(config),
            config.entropy_coef / tokens.bonus_count if config.entropy_coef else None,
        )

    def rows(piece: Piece) -> Tensor:
        own = RowObjective(tokens.part(piece.start, piece.stop, row_counts), weights[piece.slice], config, scale)
        place = ObjectiveResults(*(whole[piece.slice] for whole in results))
        dtype = call.hidden.dtype
        return call.backend.objective_rows(piece.rows, own, dtype=dtype, out=piece.out, results=place)[0]

    gradients = _gradient_pass(call, rows, results.live, want, scale, row_counts)
    return call.scatter(results.logprobs), call.scatter(results.entropy), gradients


def _gradient_pass(
    call: HeadCall,
    rows: RowFunction,
    live: Tensor,
    want: Wanted,
    scale: float | Tensor,
    row_counts: list[int] | None = None,
) -> Gradients:
    """Chunk by chunk: logits and row function of every piece, then the backward GEMMs.

    Args:
        live: `[n]` bool, known for a piece's rows once the row function has run: whether their dx is not zero.
        row_counts: computed rows of each sequence where a chunk must hold whole sequences.
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
                dx = rows(piece)
        sink.add(chunk, dx if chunk.dx is None else chunk.dx, live[start:stop])
    return sink.finish()
