"""Checks of what callers hand over, and the one layout everything behind works on: packed tokens.

Legend: T packed tokens, S sequences, B x L the padded layout (then T = B L and S = B), H hidden size, V vocabulary.
Errors name the argument, what was expected and what came. Checks that read values back would make a GPU wait: they
always run for CPU tensors, elsewhere with GRPO_FAST_DEBUG=1.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeGuard, cast

import torch
from torch import Tensor

from grpo_fast.backends.base import group_functions, resolve_backend
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.devices import checks_values
from grpo_fast.head import Head
from grpo_fast.objectives import (
    Scope,
    Segments,
    Tokens,
    aggregation_name,
    default_normalizer,
    importance_weight,
    needs_every_row,
    slope_scope,
    token_weights,
)
from grpo_fast.ops.call import ActiveRows

PLAIN_HEAD = HeadConfig()
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    tensor: object,
    *,
    shapes: Sequence[tuple[Sequence[int], str]],
    device: torch.device | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """Raise ValueError unless `tensor` has one of the (shape, meaning) pairs, the device and one of the dtypes."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor; got {type(tensor).__name__}")
    if all(tuple(tensor.shape) != tuple(shape) for shape, _ in shapes):
        expected = " or ".join(f"{list(shape)} ({meaning})" for shape, meaning in shapes)
        raise ValueError(f"{name}: expected shape {expected}; got {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, that of the first argument; got {tensor.device}")
    if dtypes is not None and tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected dtype {expected}; got {str(tensor.dtype).removeprefix('torch.')}")


def check_config(config: object) -> None:
    """A LossConfig."""
    if not isinstance(config, LossConfig):
        raise ValueError(f"config: expected a LossConfig; got {_named(config)}")


def check_whole_number(name: str, value: object) -> None:
    """None, or an integer that torch takes."""
    if torch.compiler.is_compiling() or value is None:
        return
    if not isinstance(value, numbers.Integral) or not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits or None; got {_named(value)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Log-probabilities and entropies: neither integers nor complex numbers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype; got {tensor.dtype}")


def split_head(
    weight: Tensor | Head | None, bias: Tensor | None, head: Head | HeadConfig | None
) -> tuple[Tensor, Tensor | None, HeadConfig]:
    """(weight, bias, config) from what may stand for them: tensors and a HeadConfig, or a Head in either place."""
    if head is not None and not isinstance(head, HeadConfig) and not _is_head(head):
        raise ValueError(f"head: expected a HeadConfig, or a Head as head_of(model) gives it; got {_named(head)}")
    whole = weight if _is_head(weight) else head
    if not _is_head(whole):
        if weight is None:
            raise ValueError("weight: expected a tensor [V, H], or a Head in its place or as head=; got None")
        return cast(Tensor, weight), bias, cast(HeadConfig, whole or PLAIN_HEAD)
    if whole is weight and head is not None and head is not whole:
        raise ValueError("head: expected none besides the Head that stands for weight, bias and config; got one")
    if whole is not weight and weight is not None and weight is not whole.weight:
        raise ValueError("weight: expected None or the weight of the Head that is given as head=; got another tensor")
    if bias is not None and bias is not whole.bias:
        raise ValueError("bias: expected None or the bias of the Head that is given; got another tensor")
    return whole.weight, whole.bias, whole.config


def _is_head(value: object) -> TypeGuard[Head]:
    return not isinstance(value, Tensor) and all(hasattr(value, name) for name in ("weight", "bias", "config"))


def head_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The LM head's operands, checked, and cast as a linear layer's would be under autocast."""
    if not isinstance(hidden, Tensor) or hidden.dim() < 1:
        raise ValueError("hidden: expected a tensor [..., H]; got " + _describe(hidden))
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError("weight: expected a tensor [V, H]; got " + _describe(weight))
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if (placements := getattr(tensor, "placements", None)) is not None:
            raise ValueError(
                f"{name}: expected a tensor that is whole on this rank; got a DTensor placed {placements}; "
                "gather it first, for example by full_tensor(), through which gradients flow"
            )
    kind, device = hidden.device.type, hidden.device
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if hidden.dtype not in FLOATS:
        raise ValueError(f"hidden: expected dtype float32, bfloat16, float16 or float64; got {hidden.dtype}")
    vocab, width = weight.shape
    if width != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected [V, {hidden.shape[-1]}] to match the last dimension of hidden; got {[vocab, width]}"
        )
    if vocab == 0:
        raise ValueError("weight: expected a vocabulary of at least 1; got [0, ...]")
    check_tensor("weight", weight, shapes=[((vocab, width), "")], device=device, dtypes=[hidden.dtype])
    if bias is not None:
        check_tensor("bias", bias, shapes=[((vocab,), "vocabulary")], device=device, dtypes=[hidden.dtype])
    return hidden, weight, bias


def _describe(value: object) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _named(value: object) -> str:
    """A value and its type, or a type."""
    if isinstance(value, type):
        return f"the type {value.__name__}"
    if isinstance(value, (str, int, float)):
        return f"{type(value).__name__} {value!r}"
    return f"{type(value).__name__}"


def check_targets(targets: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Integer token ids of the expected shape."""
    check_tensor("targets", targets, shapes=[(tuple(shape), "one token id a row of hidden")], device=device)
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: expected dtype int64 or int32; got {targets.dtype}")


def token_mask(
    loss_mask: Tensor | None, targets: Tensor | None, ignore_index: int | None, shape: Sequence[int], like: Tensor
) -> tuple[Tensor, bool]:
    """(which tokens carry loss `[T]` bool, whether any may not).

    Args:
        loss_mask: of `shape`: bool, integers, or floating-point zeros and ones; None: all.
        targets: of `shape`, checked; those that are `ignore_index` carry none. None: there are no targets.
        like: a tensor of the device.
    """
    check_whole_number("ignore_index", ignore_index)
    mask = None
    if loss_mask is not None:
        check_tensor("loss_mask", loss_mask, shapes=[(tuple(shape), "one a token")], device=like.device)
        if loss_mask.is_complex():
            raise ValueError(f"loss_mask: expected bool, integers, or zeros and ones; got {loss_mask.dtype}")
        flat = loss_mask.reshape(-1)
        mask = flat != 0
        if flat.is_floating_point() and checks_values(flat):
            others = flat[mask & (flat != 1)]
            if others.numel():
                raise ValueError(
                    "loss_mask: expected only zeros and ones where it is floating-point (it is no weight); "
                    f"got {float(others[0])}"
                )
    if targets is not None and ignore_index is not None:
        kept = targets.reshape(-1) != ignore_index
        # Where looking costs nothing: none is ignored, as in most calls, so that all rows are known to be wanted.
        if not checks_values(targets) or not bool(kept.all()):
            mask = kept if mask is None else mask & kept
    if mask is None:
        return torch.ones(math.prod(shape), dtype=torch.bool, device=like.device), False
    return mask, True


def check_target_range(targets: Tensor, mask: Tensor | None, vocab: int) -> None:
    """Targets of unmasked rows lie in [0, V)."""
    if not checks_values(targets):
        return
    wrong = (targets < 0) | (targets >= vocab)
    if mask is not None:
        wrong = wrong & mask
    if bool(wrong.any()):
        row = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"targets: expected token ids in [0, {vocab}) on unmasked rows; got {int(targets[row])} at {list(row)}"
        )


def check_main_grad(main_grad: Tensor | None, weight: Tensor) -> None:
    """A float32 buffer of the weight's shape."""
    if main_grad is None:
        return
    dtype = torch.promote_types(weight.dtype, torch.float32)
    check_tensor(
        "main_grad", main_grad, shapes=[(weight.shape, "that of weight")], device=weight.device, dtypes=[dtype]
    )
    if not main_grad.is_contiguous():
        raise ValueError(
            f"main_grad: expected contiguous memory; got shape {list(main_grad.shape)} with strides "
            f"{list(main_grad.stride())}"
        )
    if not torch.compiler.is_compiling() and main_grad.untyped_storage()._cdata == weight.untyped_storage()._cdata:
        raise ValueError("main_grad: expected memory of its own; got the weight's, which it would overwrite")
    if main_grad.requires_grad or not weight.requires_grad:
        raise ValueError(
            "main_grad: expected a buffer without requires_grad, for a weight that requires a gradient; got "
            f"requires_grad {main_grad.requires_grad} and, of the weight, {weight.requires_grad}"
        )


def check_temperature(temperature: float | Tensor, shape: Sequence[int], device: torch.device) -> None:
    """A positive finite float, or such floats, one a row."""
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return
    check_tensor("temperature", temperature, shapes=[(tuple(shape), "one a row")], device=device)
    if temperature.is_complex():
        raise ValueError(f"temperature: expected real numbers; got {temperature.dtype}")
    if temperature.requires_grad:
        raise ValueError("temperature: expected a tensor without requires_grad; got one that requires it")
    if checks_values(temperature) and not bool(((temperature > 0) & (temperature < math.inf)).all()):
        raise ValueError(f"temperature: expected finite numbers > 0; got {temperature}")


@dataclass
class TokenInputs:
    """The per-token arguments in the packed layout; what stands at masked positions is zeroed.

    Attributes:
        tokens: with `mask` True at every token that carries loss.
        weights: `[T]` weight of each token's term in the loss.
        active: the rows to compute, or None for all.
        scope: whose log-probabilities a row's slopes depend on.
        token_advantages: whether advantages came one a token.
        normalizer_given: whether the caller replaced the loss type's denominator.
    """

    tokens: Tokens
    weights: Tensor
    active: ActiveRows | None
    scope: Scope
    token_advantages: bool
    normalizer_given: bool


def _check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError("cu_seqlens: expected a tensor [S+1]; got " + _describe(cu_seqlens))
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"cu_seqlens: expected dtype int32 or int64; got {cu_seqlens.dtype}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected device {device}; got {cu_seqlens.device}")
    if not checks_values(cu_seqlens):
        return
    limits = cu_seqlens.tolist()
    if limits[0] != 0 or limits[-1] != num_tokens or any(a > b for a, b in pairwise(limits)):
        raise ValueError(f"cu_seqlens: expected 0 = c[0] <= c[1] <= ... <= c[S] = T = {num_tokens}; got {limits}")


def token_inputs(
    like: Tensor,
    shape: tuple[int, ...],
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None,
    loss_mask: Tensor | None,
    config: LossConfig,
    normalizer: Tensor | float | None,
    entropy_normalizer: Tensor | float | None = None,
    quantile_group: torch.distributed.ProcessGroup | None = None,
    targets: Tensor | None = None,
    ignore_index: int | None = None,
    backend: str | None = None,
    **logprobs: Tensor | None,
) -> TokenInputs:
    """Check the per-token arguments and bring them into the packed layout.

    Args:
        like: a tensor of the device and dtype (after promotion to float32) to work in.
        shape: `(T,)` or `(B, L)`.
        normalizer, entropy_normalizer: replace the denominators of the terms and of the bonus.
        backend: the resolved name of the one that computes the rows; None: what "auto" is on the device.
        logprobs: `old_logprobs`, `ref_logprobs`, `sampling_logprobs`, each of `shape` or None.

    Raises:
        ValueError: shapes, devices, missing log-probabilities, malformed `cu_seqlens`.
    """
    device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
    check_positive("normalizer", normalizer)
    check_positive("entropy_normalizer", entropy_normalizer)
    normalizer = normalizer.detach() if isinstance(normalizer, Tensor) else normalizer
    segments = _segments(cu_seqlens, shape, device)
    flat_advantages, per_token = _advantages(advantages, shape, segments, device)
    if cu_seqlens is None and len(shape) == 1 and per_token and shape[0] > 1 and looks_at_sequences(config):
        raise ValueError(
            "cu_seqlens: expected [S+1], as the loss looks at whole sequences and advantages one a token do not say "
            f"where they end; got None ([0, {shape[0]}] is one sequence)"
        )
    mask, masked = token_mask(loss_mask, targets, ignore_index, shape, like)
    _check_needed(config, logprobs)
    flat: dict[str, Tensor | None] = {}
    for name, tensor in logprobs.items():
        if tensor is not None:
            check_tensor(name, tensor, shapes=[(shape, "one a token")], device=device)
            check_floating(name, tensor)
            # Whatever stands at masked positions (padding, NaN) must not reach a sum.
            tensor = torch.where(mask, tensor.detach().reshape(-1).to(dtype), 0.0)
        flat[name] = tensor
    tokens = Tokens(
        flat_advantages.to(dtype),
        mask,
        segments,
        _bonus_count(entropy_normalizer, mask),
        **flat,
        bonus_count_given=entropy_normalizer is not None,
        quantile_group=quantile_group,
    )
    if tokens.old_logprobs is not None:
        tokens.importance = importance_weight(tokens.old_logprobs, tokens, config)
    backend = resolve_backend("auto", device) if backend is None else backend
    scope = slope_scope(config, has_old=tokens.old_logprobs is not None)
    weights, tokens.advantages, active = token_rows(
        tokens, config, normalizer, scope, masked=masked, per_token=per_token, backend=backend
    )
    return TokenInputs(tokens, weights, active, scope, per_token, normalizer is not None)


def _segments(cu_seqlens: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Segments:
    """The sequences of the packed or padded layout."""
    if len(shape) == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: expected None in the padded layout (rows are sequences); got a tensor")
        cu_seqlens = torch.arange(shape[0] + 1, device=device) * shape[1]
    elif cu_seqlens is None:
        cu_seqlens = torch.arange(2, device=device) * shape[0]  # one sequence
    _check_cu_seqlens(cu_seqlens, math.prod(shape), device)
    return Segments(cu_seqlens, math.prod(shape))


def _advantages(
    advantages: Tensor, shape: tuple[int, ...], segments: Segments, device: torch.device
) -> tuple[Tensor, bool]:
    """(advantages `[S]` or `[T]`, whether they are one a token)."""
    num_sequences, num_tokens = segments.num_sequences, segments.num_tokens
    if isinstance(advantages, Tensor) and advantages.is_complex():
        raise ValueError(f"advantages: expected real numbers; got {advantages.dtype}")
    if isinstance(advantages, Tensor) and advantages.dim() == 2:
        columns = [((num_sequences, 1), False)] + [((1, num_tokens), True)] * (len(shape) == 1)
        for unambiguous, per_token in columns:
            if tuple(advantages.shape) == unambiguous:
                check_tensor("advantages", advantages, shapes=[(unambiguous, "")], device=device)
                return advantages.detach().reshape(-1), per_token
    accepted = [((num_sequences,), "one a sequence"), (shape, "one a token")]
    check_tensor("advantages", advantages, shapes=accepted, device=device)
    if shape == (num_sequences,) and checks_values(segments.cu_seqlens) and bool((segments.lengths != 1).any()):
        raise ValueError(
            f"advantages: [{num_sequences}] is one a sequence as well as one a token here; expected "
            f"[{num_sequences}, 1] for one a sequence or [1, {num_tokens}] for one a token"
        )
    return advantages.detach().reshape(-1), tuple(advantages.shape) != (num_sequences,)


def _bonus_count(entropy_normalizer: Tensor | float | None, mask: Tensor) -> Tensor:
    """What the entropies' sum is divided by, 0-dim on the device."""
    if entropy_normalizer is None:
        return mask.sum().clamp(min=1)
    if isinstance(entropy_normalizer, Tensor):
        return entropy_normalizer.detach().reshape(()).to(mask.device)
    return torch.full((), float(entropy_normalizer), dtype=torch.float64, device=mask.device)


def check_positive(name: str, value: Tensor | float | None) -> None:
    """None, or one finite number above 0."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"{name}: expected one number; got shape {list(value.shape)} of {value.dtype}")
        if not checks_values(value):
            return
        value = float(value.detach())
    elif not torch.compiler.is_compiling() and not isinstance(value, (numbers.Real, type(None))):
        raise ValueError(f"{name}: expected a number; got {_named(value)}")
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0; got {float(value)}")


def _check_needed(config: LossConfig, logprobs: dict[str, Tensor | None]) -> None:
    if config.beta != 0 and logprobs.get("ref_logprobs") is None:
        raise ValueError(f"ref_logprobs: expected a tensor, as beta is {config.beta}; got None")
    if config.importance_sampling_mode is not None and logprobs.get("sampling_logprobs") is None:
        raise ValueError(
            f"sampling_logprobs: expected a tensor, as importance_sampling_mode is "
            f"{config.importance_sampling_mode!r}; got None"
        )


# -- what each token carries, and which rows of the LM head are computed ----------------------------------------------


def looks_at_sequences(config: LossConfig) -> bool:
    """Whether the loss depends on where sequences end."""
    return (
        aggregation_name(config) != "token_mean"
        or slope_scope(replace(config, top_entropy_quantile=1.0), has_old=True) != "row"
        or (config.importance_sampling_mode or "").startswith("sequence")
    )


def token_rows(
    tokens: Tokens,
    config: LossConfig,
    normalizer: Tensor | float | None,
    scope: Scope,
    *,
    masked: bool,
    per_token: bool,
    backend: str,
) -> tuple[Tensor, Tensor, ActiveRows | None]:
    """Weights `[T]` and advantages `[T]` of the tokens, 0 where masked, and the rows to compute, None for all.

    Left out are masked rows and, unless something needs them, rows whose gradient is known to be zero: zero advantage,
    or a masked train/inference correction. An objective that couples a sequence's tokens keeps or drops it whole; the
    others a backend may serve in one pass of native code, by the same arithmetic.

    Args:
        tokens: with advantages as the caller gave them: `[S]`, or if `per_token` `[T]` with anything where masked.
        normalizer: replaces the loss type's denominator.
        masked: whether `tokens.mask` can hold a False at all.
        backend: the name of the one that computes the rows.
    """
    advantages, mask, segments = tokens.advantages, tokens.mask, tokens.segments
    every_row = needs_every_row(config)
    ambiguous = per_token and segments.num_sequences == segments.num_tokens  # native code goes by sizes
    native = None
    if scope == "row" and segments.num_tokens and not ambiguous:
        native = group_functions(advantages, backend)
    if native is not None:
        if normalizer is None and config.record.aggregation == "constant_length":
            normalizer = default_normalizer(config, mask, segments).clamp(min=1)
        if normalizer is not None and not (isinstance(normalizer, Tensor) and normalizer.device == mask.device):
            # A fill: copying the host's number over would wait for a GPU.
            normalizer = torch.full((), float(normalizer), dtype=torch.float64, device=mask.device)
        weights, spread = (advantages.new_empty(segments.num_tokens) for _ in range(2))
        rows, count = torch.empty_like(mask, dtype=torch.int64), mask.new_empty((), dtype=torch.int64)
        active = ActiveRows(torch.empty_like(mask), (rows, count))
        native.token_rows(
            advantages.contiguous(),
            segments.cu_seqlens.contiguous(),
            mask=mask if masked else None,
            importance=tokens.importance,
            normalizer=normalizer,
            aggregation=aggregation_name(config),
            every_row=every_row,
            weights=weights,
            token_advantages=spread,
            active=active.mask,
            rows=rows,
            num_active=count,
        )
    else:
        spread = torch.where(mask, advantages if per_token else segments.spread(advantages), 0.0)
        weights = token_weights(config, mask, segments, normalizer, spread.dtype)
        active = ActiveRows(_active_mask(tokens, spread, config, every_row=every_row, scope=scope))
    return weights, spread, active if masked or not every_row else None


def _active_mask(tokens: Tokens, advantages: Tensor, config: LossConfig, *, every_row: bool, scope: Scope) -> Tensor:
    """The rows to compute, `[T]` bool."""
    if every_row:
        return tokens.mask
    live = tokens.mask & (advantages != 0)
    if tokens.importance is not None and "importance" not in config.record.reads:
        live = live & (tokens.importance != 0)
    if scope != "row":
        live = tokens.mask & tokens.segments.spread(tokens.segments.sum(live) > 0)
    return live
