"""The `lean` backward: by blocks of the vocabulary, so that no float32 `[V, H]` accumulator exists.

Legend: n rows that are computed, H hidden size, V vocabulary, K columns of a block.

All n rows' logits of a block are held at once (`[n, K]`), so each block's dWeight is one GEMM that rounds by itself;
what accumulates across blocks is dHidden, `[n, H]` float32.
"""

from __future__ import annotations

from torch import Tensor

from grpo_fast.backends.base import RowChunk
from grpo_fast.ops.gradients import Gradients, Wanted, unscaled
from grpo_fast.ops.passes import scaled_slopes
from grpo_fast.ops.workspace import HeadCall

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
    n, (slopes, scale) = call.num_rows, scaled_slopes(call, lse, entropy, g, e)
    vocab, width = call.weight.shape
    hidden, targets, transform = call.gather(call.hidden), call.targets, call.transform
    grad_rows = hidden.new_empty(hidden.shape, dtype=call.accumulator) if want.hidden else None
    grad_weight = (
        call.weight.new_zeros((vocab, width), dtype=call.grad_dtype) if want.weight and want.main_grad is None else None
    )
    grad_bias = call.weight.new_zeros(vocab, dtype=call.grad_dtype) if want.bias else None
    step = min(block_columns(call), vocab)
    buffer = call.backend.new_buffer(hidden, (n * step,), call.accumulator)
    for start in range(0, vocab, step) if n else ():
        stop = min(start + step, vocab)
        weight, columns = call.weight[start:stop], transform.vocab_block(start, stop)
        logits = buffer[: n * (stop - start)].view(n, stop - start)
        call.backend.logits(hidden, weight, logits, n)
        dx = call.backend.gradient(RowChunk(logits, targets, columns, start), slopes, dtype=hidden.dtype)
        if grad_rows is not None:
            call.backend.grad_hidden(dx, weight, grad_rows, accumulate=start > 0)
        if grad_bias is not None:
            grad_bias[start:stop] = unscaled(dx.sum(0, dtype=call.accumulator), scale).to(grad_bias.dtype)
        if want.weight:
            whole = want.main_grad if grad_weight is None else grad_weight
            assert whole is not None
            _grad_weight_block(call, dx, hidden, whole[start:stop], scale, accumulate=grad_weight is None)
    grad_hidden = None
    if grad_rows is not None:
        grad_rows = unscaled(grad_rows, scale).to(call.grad_dtype)
        grad_hidden = grad_rows
        if call.rows is not None:
            grad_hidden = grad_rows.new_zeros(call.hidden.shape).index_copy_(0, call.rows, grad_rows)
    return Gradients(grad_hidden, grad_weight, grad_bias)


def _grad_weight_block(
    call: HeadCall, dx: Tensor, hidden: Tensor, out: Tensor, scale: float | Tensor, *, accumulate: bool
) -> None:
    """out (+)= dx^T hidden / scale."""
    if not call.scales_dx:
        call.backend.grad_weight(dx, hidden, out, out if accumulate else None)
        return
    wide = out.new_empty(out.shape, dtype=call.accumulator)
    call.backend.grad_weight(dx, hidden, wide, None)
    wide = unscaled(wide, scale)
    if accumulate:
        out.add_(wide)
    else:
        out.copy_(wide)
