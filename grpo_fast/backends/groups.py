"""What a batch of completions says before the model is asked, in native code: advantages, token weights, active rows.

csrc/group_cpu.cpp belongs to the backend `cpu`, kernels/group_*.py to `triton`. The definitions are
`grpo_fast.advantages` and `grpo_fast.rows`, which do the rest; this is the same arithmetic in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import grpo_fast.backends.cpu as cpu_backend
from grpo_fast.backends.base import resolve_backend
from grpo_fast.backends.devices import is_traced


@dataclass(frozen=True)
class ActiveRows:
    """The rows of the LM head to compute.

    Attributes:
        mask: `[T]` bool.
        listed: their indices, increasing, at the front of `[T]` int64, and how many there are, 0-dim int64; or None.
    """

    mask: Tensor
    listed: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class TokenRows:
    """What packed tokens carry into the loss.

    Attributes:
        weights: `[T]` weight of each token's term in the loss, 0 where masked.
        advantages: `[T]`, 0 where masked.
        active: the rows to compute, or None if that is all of them without asking the device.
    """

    weights: Tensor
    advantages: Tensor
    active: ActiveRows | None


def native_group_advantages(
    rewards: Tensor,
    factors: Tensor | None,
    *,
    group_size: int | None,
    order: Tensor | None,
    labels: Tensor | None,
    scale: str,
    aggregation: str,
) -> Tensor | None:
    """Advantages `[N]` from rewards `[N, K]`, or None where native code is not there or does not serve them.

    Args:
        rewards: `[N, K]` float32 or float64, NaN where missing. factors: `[K]` in their dtype, or None: all 1.
        group_size: of equal groups that stand together.
        order: `[N]` int64, completions sorted by group, instead. labels: `[N]`, ascending, the group of each.
        scale, aggregation: names, checked.
    """
    if rewards.requires_grad or rewards.numel() == 0:
        return None
    backend = resolve_backend("auto", rewards.device)
    if not _serves(rewards, backend):
        return None
    if backend == "triton":
        from grpo_fast.kernels.group_advantages import group_advantages

        return group_advantages(
            rewards,
            group_size=group_size,
            order=order,
            labels=labels,
            factors=factors,
            scale=scale,
            aggregation=aggregation,
        )
    native = cpu_backend.native()
    rewards, order = rewards.contiguous(), None if order is None else order.contiguous()
    weights = None if factors is None else factors.double().contiguous()
    offsets = None
    if labels is not None:
        lengths = torch.unique_consecutive(labels, return_counts=True)[1]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    out = rewards.new_empty(rewards.shape[0])
    native.group_advantages(
        _dtype(native, rewards),
        rewards=rewards.data_ptr(),
        num_completions=rewards.shape[0],
        num_rewards=rewards.shape[1],
        weights=_address(weights),
        group_size=group_size or 0,
        order=_address(order),
        offsets=_address(offsets),
        num_groups=0 if offsets is None else offsets.numel() - 1,
        scale=getattr(native.AdvantageScale, scale),
        aggregation=getattr(native.RewardAggregation, aggregation),
        out=out.data_ptr(),
    )
    return out


def native_token_rows(
    advantages: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    importance: Tensor | None,
    *,
    num_tokens: int,
    aggregation: str,
    normalizer: Tensor | float | None,
    every_row: bool,
    backend: str,
) -> TokenRows | None:
    """Weights, advantages and active rows, or None where the backend's native code does not serve them.

    Args:
        advantages: `[S]`, or one a token, `[T]` (where S is not T); float32 or float64.
        importance: `[T]`, the same dtype, or None.
        cu_seqlens: `[S+1]` int64.
        mask: `[T]` bool, or None: every token carries loss.
        aggregation: "sequence_mean", "sequence_sum" or "token_mean". normalizer: replaces its denominator.
        every_row: compute unmasked rows even where advantage or importance is 0.
    """
    if not _serves(advantages, backend) or num_tokens == 0:
        return None
    if isinstance(normalizer, Tensor) and normalizer.requires_grad:
        return None
    weights, spread = (advantages.new_empty(num_tokens) for _ in range(2))
    active = advantages.new_empty(num_tokens, dtype=torch.bool)
    rows, count = (advantages.new_empty(shape, dtype=torch.int64) for shape in ((num_tokens,), ()))
    write: Callable[..., None] = _write_token_rows
    if backend == "triton":
        from grpo_fast.kernels.group_rows import token_rows as write_on_gpu

        write = write_on_gpu
        if normalizer is not None and not (isinstance(normalizer, Tensor) and normalizer.device == advantages.device):
            # A fill: copying the host's number over would wait for the GPU.
            normalizer = torch.full((), float(normalizer), dtype=torch.float64, device=advantages.device)
    write(
        advantages.contiguous(),
        cu_seqlens.contiguous(),
        mask=None if mask is None else mask.contiguous(),
        importance=None if importance is None else importance.contiguous(),
        normalizer=normalizer,
        aggregation=aggregation,
        every_row=every_row,
        weights=weights,
        token_advantages=spread,
        active=active,
        rows=rows,
        num_active=count,
    )
    return TokenRows(weights, spread, ActiveRows(active, (rows, count)))


def _write_token_rows(
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None,
    importance: Tensor | None,
    normalizer: Tensor | float | None,
    aggregation: str,
    every_row: bool,
    weights: Tensor,
    token_advantages: Tensor,
    active: Tensor,
    rows: Tensor,
    num_active: Tensor,
) -> None:
    """`grpo_fast.kernels.group_rows.token_rows`, on the CPU."""
    native = cpu_backend.native()
    count = native.token_rows(
        _dtype(native, advantages),
        cu_seqlens=cu_seqlens.data_ptr(),
        num_sequences=cu_seqlens.numel() - 1,
        num_tokens=weights.numel(),
        mask=_address(mask),
        advantages=advantages.data_ptr(),
        advantages_per_token=advantages.numel() != cu_seqlens.numel() - 1,
        importance=_address(importance),
        aggregation=getattr(native.TokenAggregation, aggregation),
        normalizer=None if normalizer is None else float(normalizer),
        every_row=every_row,
        weights=weights.data_ptr(),
        token_advantages=token_advantages.data_ptr(),
        active=active.data_ptr(),
        rows=rows.data_ptr(),
    )
    num_active.fill_(count)


def _serves(values: Tensor, backend: str) -> bool:
    """Whether a backend has native code for tensors like this one; none has a derivative, and none can be traced."""
    native = backend in ("triton", "cpu") and values.dtype in (torch.float32, torch.float64)
    return native and not is_traced(values)


def _dtype(native, values: Tensor):  # type: ignore[no-untyped-def]
    return native.DType.float64 if values.dtype == torch.float64 else native.DType.float32


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
