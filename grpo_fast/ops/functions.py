"""torch.library operators around the passes, and the autograd functions around the operators.

Legend: T tokens, S sequences, H hidden size, V vocabulary. The operators are opaque to torch.compile (they carry fake
implementations); all of autograd is in two small functions: `Logprobs` (statistics now, gradients once g and e are
known) and `FusedObjective` (gradients in the forward, scaled in the backward, in place where the graph is not kept).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_fast.backends.base import Transform, get_backend
from grpo_fast.backends.devices import is_traced, traits
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.objectives import Tokens, objective, total_loss
from grpo_fast.ops.gradients import Gradients, Wanted
from grpo_fast.ops.lean import lean_backward_pass
from grpo_fast.ops.passes import backward_pass, forward_pass, objective_pass
from grpo_fast.ops.planner import row_budget
from grpo_fast.ops.workspace import HeadCall, active_rows
from grpo_fast.packing import Segments


class HeadArgs(NamedTuple):
    """What every operator is told besides hidden, weight and bias; plain values, in the operators' order.

    Attributes:
        targets: `[T]` int64.
        row_temperature: `[T]` float32, or None for the scalar `temperature`.
        active: `[T]` bool, the rows to compute, or None for all.
        rows: `[n]` int64, their numbers, or None where they are to be found from `active`.
    """

    targets: Tensor
    row_temperature: Tensor | None
    active: Tensor | None
    rows: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None
    backend: str
    workspace_bytes: int


def _head_call(hidden: Tensor, weight: Tensor, bias: Tensor | None, args: HeadArgs) -> HeadCall:
    temperature = args.temperature if args.row_temperature is None else args.row_temperature
    return HeadCall.of(
        get_backend(args.backend),
        row_budget(args.backend, *weight.shape, weight.dtype, weight.device, args.workspace_bytes),
        hidden,
        weight,
        args.targets,
        Transform(HeadConfig(logit_scale=args.logit_scale, softcap=args.softcap), bias, temperature),
        active_rows(args.active) if args.rows is None else args.rows,
    )


def _accumulator_zeros(hidden: Tensor) -> Tensor:
    return hidden.new_zeros(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))


def _or_nothing(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors, never None: an empty one stands for nothing."""
    return like.new_empty(0) if tensor is None else tensor


def _fake_gradients(
    hidden: Tensor, weight: Tensor, want: tuple[bool, bool, bool], has_main_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    wanted = (want[0], want[1] and not has_main_grad, want[2])
    sources = (hidden, weight, weight)
    grads = [s.new_empty(shape if w else (0,)) for s, shape, w in zip(sources, shapes, wanted, strict=True)]
    return grads[0], grads[1], grads[2]


def _gradient_tensors(gradients: Gradients, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _or_nothing(gradients.hidden, hidden),
        _or_nothing(gradients.weight, weight),
        _or_nothing(gradients.bias, weight),
    )


TAGS = (torch.Tag.cudagraph_unsafe,)
"""While a caller is compiled nobody has counted its rows: with a mask the operators wait for the device, which a graph
that is being captured (`torch.compile(mode="reduce-overhead")`) does not allow. Inductor leaves them out of its."""

# -- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("grpo_fast::forward", mutates_args=(), tags=TAGS)
def forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    active: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    workspace_bytes: int,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse `[T]` and the unit gradient `[T, H]` (of the plan `frozen_head`; else empty)."""
    args = HeadArgs(targets, row_temperature, active, rows, temperature, logit_scale, softcap, backend, workspace_bytes)
    with torch.autocast(hidden.device.type, enabled=False):
        call = _head_call(hidden, weight, bias, args)
        logprobs, entropy, lse, unit = forward_pass(call, plan)
    return logprobs, entropy, lse, _or_nothing(unit, hidden)


@forward_op.register_fake
def _(hidden, weight, bias, targets, *args):  # type: ignore[no-untyped-def]
    rows = [_accumulator_zeros(hidden) for _ in range(3)]
    return (*rows, torch.empty_like(hidden) if args[-1] == "frozen_head" else hidden.new_empty(0))


@torch.library.custom_op("grpo_fast::backward", mutates_args={"main_grad"}, tags=TAGS)
def backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    active: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    workspace_bytes: int,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    e: Tensor | None,
    main_grad: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    lean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in hidden, weight and bias (empty unless wanted) from g, e `[T]`; the logits are computed again."""
    args = HeadArgs(targets, row_temperature, active, rows, temperature, logit_scale, softcap, backend, workspace_bytes)
    with torch.autocast(hidden.device.type, enabled=False):
        call = _head_call(hidden, weight, bias, args)
        run = lean_backward_pass if lean else backward_pass
        gradients = run(call, lse, entropy, g, e, Wanted(want_hidden, want_weight, want_bias, main_grad))
    return _gradient_tensors(gradients, hidden, weight)


@backward_op.register_fake
def _(hidden, weight, bias, *args):  # type: ignore[no-untyped-def]
    main_grad, want = args[-5], args[-4:-1]
    return _fake_gradients(hidden, weight, want, main_grad is not None)


@torch.library.custom_op("grpo_fast::objective", mutates_args={"main_grad"}, tags=TAGS)
def objective_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    active: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    workspace_bytes: int,
    config_key: str,
    weights: Tensor,
    advantages: Tensor,
    bonus_count: Tensor,
    cu_seqlens: Tensor,
    row_counts: list[int] | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    importance: Tensor | None,
    main_grad: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logprobs and entropy `[T]`, and the loss's gradients in hidden, weight and bias (empty unless wanted)."""
    args = HeadArgs(targets, row_temperature, active, rows, temperature, logit_scale, softcap, backend, workspace_bytes)
    config = LossConfig.from_key(config_key)
    mask = torch.ones_like(targets, dtype=torch.bool) if active is None else active
    segments = Segments(cu_seqlens, targets.numel())
    tokens = Tokens(advantages, mask, segments, bonus_count, old_logprobs, ref_logprobs, sampling_logprobs, importance)
    want = Wanted(want_hidden, want_weight, want_bias, main_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        call = _head_call(hidden, weight, bias, args)
        logprobs, entropy, gradients = objective_pass(call, tokens, weights, config, row_counts, want)
        loss = total_loss(objective(logprobs, entropy, tokens, config), entropy, weights, config)
    return (loss, logprobs, entropy, *_gradient_tensors(gradients, hidden, weight))


@objective_op.register_fake
def _(hidden, weight, bias, *args):  # type: ignore[no-untyped-def]
    main_grad, want = args[-4], args[-3:]
    rows = [_accumulator_zeros(hidden) for _ in range(2)]
    loss = rows[0].new_empty(())
    return (loss, *rows, *_fake_gradients(hidden, weight, want, main_grad is not None))


# -- autograd ---------------------------------------------------------------------------------------------------------


class Logprobs(torch.autograd.Function):
    """(logprobs, entropy) `[T]` with their gradients; plans `frozen_head`, `recompute` and `lean`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, main_grad, plan, *args):  # type: ignore[no-untyped-def,override]
        logprobs, entropy, lse, unit = forward_op(hidden, weight, bias, *args, plan)
        ctx.save_for_backward(hidden, weight, bias, lse, entropy, unit, *args[:4])
        # Not a saved tensor: other micro-batches add to it before this one's backward runs.
        ctx.main_grad = main_grad
        ctx.plan, ctx.plain_args = plan, args[4:]
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, e):  # type: ignore[no-untyped-def,override]
        hidden, weight, bias, lse, entropy, unit, *tensor_args = ctx.saved_tensors
        nothing = (None,) * (2 + len(tensor_args) + len(ctx.plain_args))
        if g is None and e is None:
            return None, None, None, *nothing
        if ctx.plan == "frozen_head" and e is None:
            return (unit * g[:, None]).to(hidden.dtype), None, None, *nothing
        g = torch.zeros_like(lse) if g is None else g.contiguous()
        grads = backward_op(
            hidden, weight, bias, *tensor_args, *ctx.plain_args,
            lse, entropy, g, None if e is None else e.contiguous(), ctx.main_grad,
            *ctx.needs_input_grad[:3], ctx.plan == "lean",
        )  # fmt: skip
        return *_cast_gradients(grads, (hidden, weight, bias)), *nothing


class FusedObjective(torch.autograd.Function):
    """(loss, logprobs, entropy) with the loss's gradients computed on the way; plans `single_pass` and `resident`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, main_grad, *args):  # type: ignore[no-untyped-def,override]
        loss, logprobs, entropy, *grads = objective_op(
            hidden, weight, bias, *args, main_grad, *ctx.needs_input_grad[:3]
        )
        ctx.save_for_backward(*grads)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.has_main_grad, ctx.num_args = main_grad is not None, len(args)
        ctx.backend = HeadArgs(*args[: len(HeadArgs._fields)]).backend
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_logprobs, _grad_entropy):  # type: ignore[no-untyped-def,override]
        if ctx.has_main_grad:
            _require_unit_gradient(grad_loss)
        # Unless the graph is kept, autograd frees the saved gradients after this: they may be scaled in place, and
        # handed out as they are. Where it is kept, another backward reads them, and the caller owns what it was given.
        in_place = not is_traced(grad_loss) and not torch._C._autograd._get_current_graph_task_keep_graph()
        unit = in_place and not traits(grad_loss.device).asynchronous and grad_loss.item() == 1

        def scaled(grad: Tensor) -> Tensor:
            if unit:
                return grad
            return get_backend(ctx.backend).scale(grad, grad_loss) if in_place else grad * grad_loss

        grads = [
            None if grad.numel() == 0 and not wanted else scaled(grad).to(dtype)
            for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        ]
        if ctx.has_main_grad:
            grads[1] = None
        return *grads, *(None,) * (1 + ctx.num_args)


def _cast_gradients(grads, inputs):  # type: ignore[no-untyped-def]
    """Gradients in their inputs' dtypes; None for the empty stand-ins of those not wanted."""
    return [
        None if tensor is None or grad.shape != tensor.shape else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, inputs, strict=True)
    ]


def _require_unit_gradient(grad_loss: Tensor) -> None:
    """`main_grad` took the weight's gradient in the forward, so the loss must not be scaled afterwards."""
    message = "main_grad: expected backward with gradient 1 (put loss scaling into `normalizer`)"
    if not traits(grad_loss.device).asynchronous:
        if grad_loss.item() != 1:
            raise ValueError(f"{message}; got gradient {grad_loss.item()}")
    else:
        torch._assert_async(grad_loss == 1, message)
