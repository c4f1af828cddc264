"""Checks of what callers hand over, and the one layout everything behind works on: packed tokens.

Legend: T packed tokens, S sequences, B x L the padded layout (then T = B L and S = B), H hidden size, V vocabulary.
Errors name the argument, what was expected and what came. Checks that read values back would make a GPU wait: they
always run for CPU tensors, elsewhere with GRPO_FAST_DEBUG=1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.objectives import Tokens, importance_weight
from grpo_fast.ops.group_backend import ActiveRows
from grpo_fast.packing import Segments
from grpo_fast.rows import token_rows

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def checks_values(tensor: Tensor) -> bool:
    """Whether checks may read values of `tensor` back."""
    if torch.compiler.is_compiling() or torch._guards.detect_fake_mode(tensor) is not None:
        return False
    return tensor.device.type == "cpu" or os.environ.get("GRPO_FAST_DEBUG", "0") not in ("", "0")


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


def head_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The LM head's operands, checked, and cast as a linear layer's would be under autocast."""
    if not isinstance(hidden, Tensor) or hidden.dim() < 1:
        raise ValueError("hidden: expected a tensor [..., H]; got " + _describe(hidden))
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError("weight: expected a tensor [V, H]; got " + _describe(weight))
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_head(hidden, weight, bias)
    return hidden, weight, bias


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dtype not in FLOATS:
        raise ValueError(f"hidden: expected dtype float32, bfloat16, float16 or float64; got {hidden.dtype}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected [V, {hidden.shape[-1]}] to match the last dimension of hidden; got {list(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight: expected a vocabulary of at least 1; got [0, ...]")
    check_tensor(
        "weight", weight, shapes=[(weight.shape, "")], device=hidden.device, dtypes=[hidden.dtype]
    )  # shape known good
    if bias is not None:
        check_tensor(
            "bias", bias, shapes=[((weight.shape[0],), "vocabulary")], device=hidden.device, dtypes=[hidden.dtype]
        )


def _describe(value: object) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_targets(targets: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Integer token ids of the expected shape."""
    check_tensor("targets", targets, shapes=[(tuple(shape), "one token id a row of hidden")], device=device)
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: expected dtype int64 or int32; got {targets.dtype}")


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
    if main_grad.requires_grad or not weight.requires_grad:
        raise ValueError("main_grad: expected a buffer without requires_grad, for a weight that requires a gradient")


def check_temperature(temperature: float | Tensor, shape: Sequence[int], device: torch.device) -> None:
    """A positive float, or positive floats, one a row."""
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, shapes=[(tuple(shape), "one a row")], device=device)
        if temperature.requires_grad:
            raise ValueError("temperature: expected a tensor without requires_grad; got one that requires it")
        positive = not checks_values(temperature) or bool((temperature > 0).all())
    else:
        positive = temperature > 0
    if not positive:
        raise ValueError(f"temperature: expected positive; got {temperature}")


@dataclass
class TokenInputs:
    """The per-token arguments in the packed layout; what stands at masked positions is zeroed.

    Attributes:
        tokens: with `mask` True at every token that carries loss.
        weights: `[T]` weight of each token's term in the loss.
        active: the rows to compute, or None for all.
        token_advantages: whether advantages came one a token.
    """

    tokens: Tokens
    weights: Tensor
    active: ActiveRows | None
    token_advantages: bool


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
    **logprobs: Tensor | None,
) -> TokenInputs:
    """Check the per-token arguments and bring them into the packed layout.

    Args:
        like: a tensor of the device and dtype (after promotion to float32) to work in.
        shape: `(T,)` or `(B, L)`.
        normalizer: replaces the loss type's denominator.
        logprobs: `old_logprobs`, `ref_logprobs`, `sampling_logprobs`, each of `shape` or None.

    Raises:
        ValueError: see DESIGN: shapes, devices, missing log-probabilities, malformed `cu_seqlens`.
    """
    device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
    if len(shape) == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: expected None in the padded layout (rows are sequences); got a tensor")
        cu_seqlens = torch.arange(shape[0] + 1, device=device) * shape[1]
    elif cu_seqlens is None:
        cu_seqlens = torch.arange(2, device=device) * shape[0]  # one sequence
    num_tokens = shape[0] if len(shape) == 1 else shape[0] * shape[1]
    _check_cu_seqlens(cu_seqlens, num_tokens, device)
    segments = Segments(cu_seqlens, num_tokens)

    sequences = (segments.num_sequences,)
    check_tensor(
        "advantages", advantages, shapes=[(sequences, "one a sequence"), (shape, "one a token")], device=device
    )
    if loss_mask is None:
        mask = torch.ones(num_tokens, dtype=torch.bool, device=device)
    else:
        check_tensor("loss_mask", loss_mask, shapes=[(shape, "one a token")], device=device)
        if loss_mask.is_floating_point() or loss_mask.is_complex():
            raise ValueError(f"loss_mask: expected dtype bool or an integer one; got {loss_mask.dtype}")
        mask = loss_mask.reshape(-1) != 0
    _check_needed(config, logprobs)
    flat: dict[str, Tensor | None] = {}
    for name, tensor in logprobs.items():
        if tensor is not None:
            check_tensor(name, tensor, shapes=[(shape, "one a token")], device=device)
            # Whatever stands at masked positions (padding, NaN) must not reach a sum.
            tensor = torch.where(mask, tensor.detach().reshape(-1).to(dtype), 0.0)
        flat[name] = tensor
    tokens = Tokens(advantages.detach().to(dtype).reshape(-1), mask, segments, mask.sum(), **flat)
    if tokens.old_logprobs is not None:
        tokens.importance = importance_weight(tokens.old_logprobs, tokens, config)
    _check_normalizer(normalizer)
    rows = token_rows(tokens, config, normalizer, masked=loss_mask is not None)
    tokens.advantages = rows.advantages
    return TokenInputs(tokens, rows.weights, rows.active, tuple(advantages.shape) != sequences)


def _check_normalizer(normalizer: Tensor | float | None) -> None:
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer: expected one number; got shape {list(normalizer.shape)}")
        if not checks_values(normalizer):
            return
    if normalizer is not None and not 0 < float(normalizer) < math.inf:
        raise ValueError(f"normalizer: expected a finite number > 0; got {float(normalizer)}")


def _check_needed(config: LossConfig, logprobs: dict[str, Tensor | None]) -> None:
    if config.beta != 0 and logprobs.get("ref_logprobs") is None:
        raise ValueError(f"ref_logprobs: expected a tensor, as beta is {config.beta}; got None")
    if config.importance_sampling_mode is not None and logprobs.get("sampling_logprobs") is None:
        raise ValueError(
            f"sampling_logprobs: expected a tensor, as importance_sampling_mode is "
            f"{config.importance_sampling_mode!r}; got None"
        )
