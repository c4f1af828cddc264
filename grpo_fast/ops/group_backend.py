"""Group advantages in native code (csrc/group_cpu.cpp), where it is built.

The definition is `grpo_fast.advantages`; this is the same arithmetic in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

import grpo_fast.ops.cpu_backend as cpu_backend


def native_group_advantages(
    rewards: Tensor, weights: Tensor, order: Tensor, lengths: Tensor, scale: str, aggregation: str
) -> Tensor | None:
    """Advantages `[N]` from rewards `[N, K]`, or None where native code is not built or does not serve them.

    Args:
        rewards: `[N, K]` float32 or float64, NaN where missing. weights: `[K]`.
        order: `[N]` int64 completions sorted by group. lengths: `[groups]` int64.
        scale, aggregation: names, checked.
    """
    served = rewards.device.type == "cpu" and rewards.dtype in (torch.float32, torch.float64)
    native = cpu_backend.native()
    if native is None or not served or rewards.requires_grad or rewards.numel() == 0 or torch.compiler.is_compiling():
        return None
    rewards, factors = rewards.contiguous(), weights.double().contiguous()
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    order = order.contiguous()
    out = rewards.new_empty(rewards.shape[0])
    native.group_advantages(
        native.DType.float64 if rewards.dtype == torch.float64 else native.DType.float32,
        rewards=rewards.data_ptr(),
        num_completions=rewards.shape[0],
        num_rewards=rewards.shape[1],
        weights=factors.data_ptr(),
        order=order.data_ptr(),
        offsets=offsets.data_ptr(),
        num_groups=lengths.numel(),
        scale=getattr(native.AdvantageScale, scale),
        aggregation=getattr(native.RewardAggregation, aggregation),
        out=out.data_ptr(),
    )
    return out
