"""Group-relative advantages: how much better a completion did than the others of its prompt.

Legend: N completions, K reward functions, G group size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_fast.backends.base import group_functions, resolve_backend
from grpo_fast.config import require_choice

Scale = Literal["group", "batch", "none", "leave_one_out"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
SCALES: tuple[Scale, ...] = get_args(Scale)
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
STD_EPSILON = 1e-4
"""Added to standard deviations before dividing (TRL's value)."""


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: Scale = "group",
    weights: Tensor | list[float] | None = None,
    aggregation: Aggregation = "sum_then_normalize",
) -> Tensor:
    """Advantages from rewards, group by group.

        group:          (R - mean of the group) / (std of the group + 1e-4)
        batch:          (R - mean of the group) / (std of all + 1e-4)
        none:           R - mean of the group
        leave_one_out:  R - mean of the others in the group                                       (RLOO)

    With several rewards, `sum_then_normalize` applies this to R = sum_k weight_k R_k; `normalize_then_sum` (GDPO)
    z-scores each reward within its group, sums them weighted, and z-scores the sum over the batch (refusing scales
    that do not divide by a deviation). Deviations are unbiased; missing rewards (NaN) are left out of every statistic.

    Args:
        rewards: `[N]` or `[N, K]`, NaN where a reward is missing. Of several, those that are there are summed.
        group_size: G; completions of a group stand together.
        group_ids: `[N]` integers instead, for groups of unequal size in any order.
        weights: K numbers, default all 1.

    Returns:
        `[N]` float32 (float64 for float64 rewards). 0 where all rewards are missing and in groups of one.

    Raises:
        ValueError: shapes that do not fit, a group size that does not divide N, an unknown name.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), group_size=2, scale="none")
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    require_choice("scale", scale, SCALES)
    require_choice("aggregation", aggregation, AGGREGATIONS)
    if not isinstance(rewards, Tensor) or rewards.dim() not in (1, 2):
        raise ValueError(f"rewards: expected a tensor [N] or [N, K]; got {_describe(rewards)}")
    table = (rewards[:, None] if rewards.dim() == 1 else rewards).to(torch.promote_types(rewards.dtype, torch.float32))
    factors = None if weights is None else _factors(weights, table)
    _check_grouping(table.shape[0], group_size, group_ids, rewards.device)
    if aggregation == "normalize_then_sum" and scale not in ("group", "batch"):
        raise ValueError(f"scale: normalize_then_sum z-scores by group and batch; expected group, got {scale!r}")
    labels, order = (None, None) if group_ids is None else group_ids.sort(stable=True)
    native = group_functions(table, resolve_backend("auto", table.device))
    if native is not None:
        given = {"factors": factors, "group_size": group_size, "order": order, "labels": labels}
        return native.advantages(table, **given, scale=scale, aggregation=aggregation)
    if group_size is not None:
        groups = _Groups.equal(table.shape[0], group_size, table.device)
    else:
        assert labels is not None
        assert order is not None
        groups = _Groups.sorted(labels, order)
    return _advantages(table, factors, groups, scale, aggregation)


def _advantages(table: Tensor, factors: Tensor | None, groups: _Groups, scale: str, aggregation: str) -> Tensor:
    """The definition, by torch's operators."""
    missing = table.isnan().all(1)
    factors = table.new_ones(table.shape[1]) if factors is None else factors
    if aggregation == "normalize_then_sum":
        scores = torch.stack([groups.z_score(column) for column in table.unbind(1)], dim=1)
        total = (scores * factors).nansum(1).masked_fill(missing, torch.nan)
        advantages = groups.whole().z_score(total)
    else:
        total = (table * factors).nansum(1).masked_fill(missing, torch.nan)
        advantages = groups.z_score(total) if scale == "group" else _centred(total, groups, scale)
    return advantages.nan_to_num(nan=0.0)


def _centred(rewards: Tensor, groups: _Groups, scale: str) -> Tensor:
    mean, _, count = groups.moments(rewards)
    centred = rewards - mean
    if scale == "leave_one_out":
        # R - (n mean - R) / (n - 1) = (R - mean) n / (n - 1)
        return torch.where(count > 1, centred * count / (count - 1).clamp(min=1), 0.0)
    if scale == "batch":
        _, std, _ = groups.whole().moments(rewards)
        return centred / (std + STD_EPSILON)
    return centred


@dataclass
class _Groups:
    """Which group each completion is in.

    Attributes:
        index: `[N]` int64, groups numbered from 0.
        order: `[N]`, completions sorted by group.
        lengths: `[groups]`.
    """

    index: Tensor
    order: Tensor
    lengths: Tensor

    @staticmethod
    def equal(num: int, group_size: int, device: torch.device) -> _Groups:
        """Groups of one size, standing together."""
        order = torch.arange(num, device=device)
        return _Groups(order // group_size, order, order.new_full((num // group_size,), group_size))

    @staticmethod
    def sorted(labels: Tensor, order: Tensor) -> _Groups:
        """Groups by the labels of the completions in `order`, which are ascending."""
        _, numbers, lengths = torch.unique_consecutive(labels, return_inverse=True, return_counts=True)
        return _Groups(torch.empty_like(numbers).scatter_(0, order, numbers), order, lengths)

    def whole(self) -> _Groups:
        """Everything as one group."""
        return _Groups(torch.zeros_like(self.index), self.order, self.index.new_full((1,), self.index.numel()))

    def moments(self, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, unbiased standard deviation and number of the rewards that exist in each completion's group, `[N]`.

        In float64; where a group's rewards all agree the mean is exactly theirs, so that their advantage is exactly 0.
        """
        exists = ~rewards.isnan()
        values = torch.where(exists, rewards, 0.0).double()
        count = self._reduce(exists.double(), "sum")
        high = self._reduce(values.masked_fill(~exists, -torch.inf), "max")
        low = self._reduce(values.masked_fill(~exists, torch.inf), "min")
        mean = torch.where(high == low, high, self._reduce(values, "sum") / count.clamp(min=1))
        squares = torch.where(exists, (values - mean[self.index]).square(), 0.0)
        std = (self._reduce(squares, "sum") / (count - 1).clamp(min=1)).sqrt()
        return tuple(m[self.index].to(rewards.dtype) for m in (mean, std, count))  # type: ignore[return-value]

    def z_score(self, rewards: Tensor) -> Tensor:
        """(R - mean) / (std + 1e-4)."""
        mean, std, _ = self.moments(rewards)
        return (rewards - mean) / (std + STD_EPSILON)

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        """A reduction over each group, `[groups]`, without atomics."""
        if self.lengths.numel() == 0:
            return values.new_zeros(0)
        return torch.segment_reduce(values[self.order].contiguous(), how, lengths=self.lengths, unsafe=True)


def _factors(weights: Tensor | list[float], table: Tensor) -> Tensor:
    factors = torch.as_tensor(weights, dtype=table.dtype, device=table.device)
    if factors.shape != table.shape[1:]:
        raise ValueError(f"weights: expected {table.shape[1]} numbers, one a reward; got {list(factors.shape)}")
    return factors


def _check_grouping(num: int, group_size: int | None, group_ids: Tensor | None, device: torch.device) -> None:
    """Exactly one way to say which completions stand together, and one that fits them."""
    if (group_size is None) == (group_ids is None):
        given = "neither" if group_size is None else "both"
        raise ValueError(f"group_size, group_ids: expected exactly one of them; got {given}")
    if group_ids is None:
        if not isinstance(group_size, int) or group_size < 1 or num % group_size != 0:
            raise ValueError(f"group_size: expected a positive divisor of the {num} rewards; got {group_size!r}")
        return
    if not isinstance(group_ids, Tensor) or group_ids.shape != (num,) or group_ids.is_floating_point():
        raise ValueError(f"group_ids: expected an integer tensor [{num}]; got {_describe(group_ids)}")
    if group_ids.device != device:
        raise ValueError(f"group_ids: expected device {device}, that of rewards; got {group_ids.device}")


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
