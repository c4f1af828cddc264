"""torch.library operators around the passes, and the autograd functions around the operators.

Legend: T tokens, H hidden size, V vocabulary. The operators are opaque to torch.compile (they carry fake
implementations) and take a `HeadCall` as `to_wire` takes it apart. All of autograd is in two small functions:
`Logprobs` (statistics now, gradients once the slopes are known) and `KnownGradients` (gradients found together with the
statistics, scaled in the backward, in place where the graph is not kept).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_fast.backends.base import get_backend
from grpo_fast.config import LossConfig
from grpo_fast.devices import TRAITS, is_traced
from grpo_fast.objectives import Tokens
from grpo_fast.ops.call import HeadCall, grad_dtype
from grpo_fast.ops.lean import lean_backward_pass
from grpo_fast.ops.passes import Gradients, Wanted, backward_pass, forward_pass, objective_pass

TAGS = (torch.Tag.cudagraph_unsafe,)
"""While a caller is compiled nobody has counted its rows: with a mask the operators wait for the device, which a graph
that is being captured (`torch.compile(mode="reduce-overhead")`) does not allow. Inductor leaves them out of its."""
WIRE = "Tensor hidden, Tensor weight, Tensor? bias, Tensor?[] tensors, float[] numbers, SymInt[] budget, str names"
"""Of every operator: `HeadCall.to_wire`."""
GRADIENTS = "Tensor, Tensor, Tensor"
"""In hidden, weight and bias; an empty one stands for none, as operators return tensors."""


def _operator(name: str, arguments: str, results: str, *, mutates: tuple[str, ...] = ()) -> Any:
    """A decorator: an operator of a `HeadCall` and `arguments`."""
    schema = f"({WIRE}{arguments}) -> ({results})"
    return torch.library.custom_op(f"grpo_fast::{name}", mutates_args=mutates, schema=schema, tags=TAGS)


@contextmanager
def _call(*wire: Any) -> Iterator[HeadCall]:
    """The call, to be computed in the dtypes that it has."""
    with torch.autocast(wire[0].device.type, enabled=False):
        yield HeadCall.from_wire(*wire)


@_operator("forward", "", "Tensor, Tensor, Tensor, Tensor")
def forward_op(*wire):  # type: ignore[no-untyped-def]
    """logprobs, entropy, lse `[T]` and the unit gradient `[T, H]` (of the plan `frozen_head`; else empty)."""
    with _call(*wire) as call:
        *statistics, unit = forward_pass(call)
    return (*statistics, call.hidden.new_empty(0) if unit is None else unit)


@forward_op.register_fake
def _(hidden, *wire):  # type: ignore[no-untyped-def]
    unit = _fake_gradient(hidden, hidden.shape) if wire[-1].endswith(" frozen_head") else hidden.new_empty(0)
    return (*_fake_rows(hidden, 3), unit)


@_operator("backward", ", Tensor?[] rows, Tensor(a!)? main_grad, bool[] want", GRADIENTS, mutates=("main_grad",))
def backward_op(*given):  # type: ignore[no-untyped-def]
    """Gradients from `rows`, which are lse, entropy, g, and e or None, `[T]`; the logits are computed again."""
    *wire, rows, main_grad, want = given
    with _call(*wire) as call:
        run = lean_backward_pass if call.plan == "lean" else backward_pass
        lse, entropy, g, e = rows
        return _tensors(run(call, lse, entropy, g, e, Wanted.of(want, main_grad)), call)


@backward_op.register_fake
def _(hidden, weight, *given):  # type: ignore[no-untyped-def]
    return tuple(_fake_gradients(hidden, weight, *given[-2:]))


@_operator(
    "objective",
    ", Tensor?[] tokens, Tensor weights, str config, SymInt[]? row_counts, Tensor(a!)? main_grad, bool[] want",
    f"Tensor, Tensor, {GRADIENTS}",
    mutates=("main_grad",),
)
def objective_op(*given):  # type: ignore[no-untyped-def]
    """logprobs and entropy `[T]`, and the loss's gradients.

    Given besides the call: `Tokens.to_wire`, the weights `[T]` of their terms, the config's key, and computed rows of
    each sequence where the objective couples a sequence's tokens.
    """
    *wire, tokens, weights, config, row_counts, main_grad, want = given
    with _call(*wire) as call:
        logprobs, entropy, gradients = objective_pass(
            call, Tokens.from_wire(tokens), weights, LossConfig.from_key(config), row_counts, Wanted.of(want, main_grad)
        )
        return (logprobs, entropy, *_tensors(gradients, call))


@objective_op.register_fake
def _(hidden, weight, *given):  # type: ignore[no-untyped-def]
    return (*_fake_rows(hidden, 2), *_fake_gradients(hidden, weight, *given[-2:]))


def _tensors(gradients: Gradients, call: HeadCall) -> tuple[Tensor, ...]:
    return tuple(call.hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_rows(hidden: Tensor, count: int) -> list[Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return [hidden.new_zeros(hidden.shape[0], dtype=dtype) for _ in range(count)]


def _fake_gradients(hidden: Tensor, weight: Tensor, main_grad: Tensor | None, want: Sequence[bool]) -> list[Tensor]:
    wanted = (want[0], want[1] and main_grad is None, want[2])
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return [
        _fake_gradient(hidden, shape) if wants else hidden.new_empty(0)
        for shape, wants in zip(shapes, wanted, strict=True)
    ]


def _fake_gradient(hidden: Tensor, shape: Sequence[int]) -> Tensor:
    return hidden.new_empty(shape, dtype=grad_dtype(hidden.dtype))


# -- autograd ---------------------------------------------------------------------------------------------------------


def head_logprobs(call: HeadCall, main_grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) `[T]`, differentiable unless the plan is `forward` or `fused_forward`."""
    hidden, weight, bias, tensors, *rest = call.to_wire()
    if call.plan.endswith("forward"):
        with torch.no_grad():
            return forward_op(hidden, weight, bias, tensors, *rest)[:2]
    result: tuple[Tensor, Tensor] = Logprobs.apply(hidden, weight, bias, main_grad, *tensors, *rest)
    return result


def head_objective(
    call: HeadCall,
    tokens: Tokens,
    weights: Tensor,
    config: LossConfig,
    row_counts: list[int] | None,
    main_grad: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(logprobs, entropy, the loss's gradients), all found in one pass; for `with_gradients`."""
    want = call.wants()
    with torch.no_grad():
        logprobs, entropy, *gradients = objective_op(
            *call.to_wire(), tokens.to_wire(), weights, config.key, row_counts, main_grad, want
        )
    return logprobs, entropy, gradients


def with_gradients(loss: Tensor, call: HeadCall, gradients: list[Tensor], main_grad: Tensor | None) -> Tensor:
    """The loss, whose gradients in the call's operands are known."""
    result: Tensor = KnownGradients.apply(
        loss, call.hidden, call.weight, call.bias, *gradients, main_grad is not None, call.backend
    )
    return result


class Logprobs(torch.autograd.Function):
    """(logprobs, entropy) `[T]` with their gradients; plans `frozen_head`, `recompute` and `lean`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, main_grad, *wire):  # type: ignore[no-untyped-def,override]
        *tensors, numbers, budget, names = wire
        rest = (numbers, budget, names)
        logprobs, entropy, lse, unit = forward_op(hidden, weight, bias, tensors, *rest)
        ctx.save_for_backward(hidden, weight, bias, *tensors, lse, entropy, unit)
        # Not a saved tensor: other micro-batches add to it before this one's backward runs.
        ctx.main_grad = main_grad
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, e):  # type: ignore[no-untyped-def,override]
        hidden, weight, bias, *tensors, lse, entropy, unit = ctx.saved_tensors
        nothing = (None,) * (1 + len(tensors) + len(ctx.rest))
        if g is None and e is None:
            return None, None, None, *nothing
        if ctx.rest[-1].endswith(" frozen_head") and e is None:
            return (unit * g[:, None]).to(hidden.dtype), None, None, *nothing
        g = torch.zeros_like(lse) if g is None else g.contiguous()
        rows = [lse, entropy, g, None if e is None else e.contiguous()]
        grads = backward_op(
            hidden, weight, bias, tensors, *ctx.rest, rows, ctx.main_grad, list(ctx.needs_input_grad[:3])
        )
        return *(
            None if tensor is None or grad.shape != tensor.shape else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, (hidden, weight, bias), strict=True)
        ), *nothing


class KnownGradients(torch.autograd.Function):
    """A loss whose gradients were found in the forward; plans `single_pass` and `resident`."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx, loss, hidden, weight, bias, of_hidden, of_weight, of_bias, has_main_grad, backend
    ):
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.has_main_grad, ctx.backend = has_main_grad, backend
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def,override]
        if ctx.has_main_grad:
            _require_unit_gradient(grad_loss)
        # Unless the graph is kept, autograd frees the saved gradients after this: they may be scaled in place, and
        # handed out as they are. Where it is kept, another backward reads them, and the caller owns what it was given.
        in_place = not is_traced(grad_loss) and not torch._C._autograd._get_current_graph_task_keep_graph()
        unit = in_place and not TRAITS[grad_loss.device.type].asynchronous and grad_loss.item() == 1

        def scaled(grad: Tensor) -> Tensor:
            if unit:
                return grad
            return get_backend(ctx.backend).scale(grad, grad_loss) if in_place else grad * grad_loss

        grads = [
            None if grad.numel() == 0 and not wanted else scaled(grad).to(dtype)
            for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1:4], strict=True)
        ]
        if ctx.has_main_grad:
            grads[1] = None
        return None, *grads, None, None, None, None, None


def _require_unit_gradient(grad_loss: Tensor) -> None:
    """`main_grad` took the weight's gradient in the forward, so the loss must not be scaled afterwards."""
    message = "main_grad: expected backward with gradient 1 (put loss scaling into `normalizer`)"
    if not TRAITS[grad_loss.device.type].asynchronous:
        if grad_loss.item() != 1:
            raise ValueError(f"{message}; got gradient {grad_loss.item()}")
    else:
        torch._assert_async(grad_loss == 1, message)
