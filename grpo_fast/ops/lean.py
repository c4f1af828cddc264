"""The `lean` backward: by blocks of the vocabulary, so that no float32 `[V, H]` accumulator exists.

Legend: n rows that are computed, H hidden size, V vocabulary, K columns of a block.

All n rows' logits of a block are held at once (`[n, K]`), so each block's dWeight is one product that rounds by itself;
what accumulates across blocks is dHidden, `[n, H]` float32.
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor

from grpo_fast.backends.base import RowChunk, RowSlopes
from grpo_fast.ops.call import HeadCall
from grpo_fast.ops.passes import Gradients, Piece, Wanted, by_kind, of_one_kind, scaled_slopes, unscaled

MIN_BLOCK = 128
"""Columns of a block at least; with H >= 128 a block's logits are then no larger than the n rows' hidden states."""


def block_columns(call: HeadCall) -> int:
    """Columns of a block: what the workspace holds of all rows."""
    held = call.budget.chunk_rows * call.weight.shape[0]
    return max(MIN_BLOCK, held // max(call.num_rows, 1) // MIN_BLOCK * MIN_BLOCK)


def lean_backward_pass(
    call: HeadCall, lse: Tensor, entropy: Tensor, g: Tensor, e: Tensor | None, want: Wanted
) -> Gradients:
    """The same result as `passes.backward_pass`, up to summation order."""
    whole = RowSlopes(lse, entropy, g, e)
    call, sparse = by_kind(call)
    engine, n = call.engine, call.num_rows
    slopes, scale = scaled_slopes(call, whole)
    vocab, width = call.weight.shape
    hidden, dtype = call.gather(call.hidden), call.grad_dtype
    grad_rows = hidden.new_empty(hidden.shape, dtype=call.accumulator) if want.hidden else None
    grad_weight = want.main_grad
    if want.weight and grad_weight is None:
        grad_weight = call.weight.new_zeros((vocab, width), dtype=dtype)
    grad_bias = call.weight.new_zeros(vocab, dtype=dtype) if want.bias else None
    step = min(block_columns(call), vocab)
    buffer = engine.new_buffer(hidden, (n * step,), call.accumulator)
    for start in range(0, vocab, step) if n else ():
        stop = min(start + step, vocab)
        weight, columns = call.weight[start:stop], call.transform.vocab_block(start, stop)
        logits = buffer[: n * (stop - start)].view(n, stop - start)
        engine.logits(hidden, weight, logits, n)
        dx = engine.dx_place(logits, hidden.dtype)
        for rows, masked in of_one_kind(call, slice(0, n)):
            targets, transform = call.row_targets[rows], columns.rows(rows)
            piece = Piece(
                rows,
                RowChunk(logits[rows], targets, transform, start),
                dx[rows],
                False,
                nullcontext(),
                None if masked is None else masked.block(start, stop, targets),
            )
            piece.write(engine.gradient(piece.rows, slopes.part(rows), dtype=hidden.dtype))
        if grad_rows is not None:
            engine.grad_hidden(dx, weight, grad_rows, accumulate=start > 0)
        if grad_bias is not None:
            grad_bias[start:stop] = unscaled(dx.sum(0, dtype=call.accumulator), scale).to(dtype)
        if want.weight:
            assert grad_weight is not None
            out, accumulate = grad_weight[start:stop], want.main_grad is not None
            if scale is None:
                engine.grad_weight(dx, hidden, out, out if accumulate else None)
            else:
                wide = out.new_empty(out.shape, dtype=call.accumulator)
                engine.grad_weight(dx, hidden, wide, None)
                (out.add_ if accumulate else out.copy_)(unscaled(wide, scale))
                del wide  # before the next block's
    grad_hidden = None
    if grad_rows is not None:
        grad_hidden = call.scatter(unscaled(grad_rows, scale).to(dtype))
    if sparse is not None:
        sparse.backward(whole, wants_hidden=want.hidden).add_to(grad_hidden, grad_weight, grad_bias)
    return Gradients(grad_hidden, None if want.main_grad is not None else grad_weight, grad_bias)
