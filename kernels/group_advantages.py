"""Group-relative advantages from rewards in one or two launches: the device twin of csrc/group_cpu.h.

Legend: N completions, K reward functions, G members of a group. Real: the rewards' float32 or float64.

    R_n = sum_k factor_k reward_nk over what exists          mean, std: of the group's R that exist, std unbiased

    group          (R - mean) / (std + 1e-4)                 leave_one_out  (R - mean) n / (n - 1)
    batch          (R - mean) / (std of all R + 1e-4)        none           R - mean

Program -> data: program g has one group and walks over its members in tiles of BLOCK, three times: mean, deviation,
result. (One tile holds the groups of practice, so that the second and third time read the L1 cache.) With labels there
is a program for each of the N sorted completions; all but the first of a group find that out from one label and end.
What is normalised over the batch takes a second launch: each program goes over all N totals, for the same statistics
bit for bit, and finishes one tile. normalize_then_sum gives the first launch a program for each group and reward.

Bytes: rewards K Real, order and labels 8 + 8 and the advantage, one Real, a completion, once from memory (and K Real
more each way with normalize_then_sum). 512 completions of one reward are 4 KB: the launches are all it costs.

Statistics are float64 sums in a fixed order, rounded to Real where the twin rounds them. Products and sums are not
fused: a reward must give the same R in every walk, else the advantage of a group that agrees would not be exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_fast.kernels.configuration import Configuration
from grpo_fast.kernels.launcher import launch

STD_EPSILON = tl.constexpr(1e-4)


@triton.jit
def _divide(numerator, denominator):
    """Correctly rounded (Triton's float32 division is not): the float64 quotient of float32 numbers rounds to it."""
    return (numerator.to(tl.float64) / denominator.to(tl.float64)).to(numerator.dtype)


@triton.jit
def _finite(value):
    """NaN to 0, infinities to the largest finite numbers."""
    LARGEST: tl.constexpr = 3.4028234663852886e38 if value.dtype == tl.float32 else 1.7976931348623157e308
    return tl.where(value == value, tl.minimum(tl.maximum(value, -LARGEST), LARGEST), 0.0)


@triton.jit
def _values(table, rewards, factors, order, i, end, num_rewards, ALONE: tl.constexpr):
    """Members `i` [BLOCK] up to `end`: their numbers and values, table_n0 (ALONE) or sum_k factor_k table_nk.

    The value is NaN where that reward, or all of them, is missing; `rewards` says so where the table is not they.
    """
    inside = i < end
    n = i.to(tl.int64) if order is None else tl.load(order + i, mask=inside, other=0)
    if ALONE:
        value = tl.load(table + n * num_rewards, mask=inside, other=float("nan"))
    else:
        value = tl.zeros(i.shape, table.dtype.element_ty)
        exists = i < 0
        for k in range(num_rewards):
            at = n * num_rewards + k
            part = tl.load(table + at, mask=inside, other=float("nan"))
            reward = part if rewards is None else tl.load(rewards + at, mask=inside, other=float("nan"))
            exists = exists | (reward == reward)
            if factors is not None:
                part = part * tl.load(factors + k)
            value += tl.where(part == part, part, 0.0)
        value = tl.where(exists, value, float("nan"))
    return n, inside, value


@triton.jit
def _moments(table, rewards, factors, order, begin, end, num_rewards, ALONE: tl.constexpr, BLOCK: tl.constexpr):
    """Mean, unbiased standard deviation and number of what exists; the mean of equal values is exactly they."""
    REAL: tl.constexpr = table.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    high = tl.full([BLOCK], float("-inf"), REAL)
    low = tl.full([BLOCK], float("inf"), REAL)
    for start in range(begin, end, BLOCK):
        _, _, value = _values(table, rewards, factors, order, start + lane, end, num_rewards, ALONE)
        exists = value == value
        total += tl.where(exists, value, 0.0).to(tl.float64)
        count += exists.to(tl.int32)
        high = tl.maximum(high, tl.where(exists, value, float("-inf")))
        low = tl.minimum(low, tl.where(exists, value, float("inf")))
    known = tl.sum(count, 0)
    highest = tl.max(high, 0)
    mean = tl.sum(total, 0) / tl.maximum(known, 1)
    mean = tl.where(highest == tl.min(low, 0), highest.to(tl.float64), mean)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        _, _, value = _values(table, rewards, factors, order, start + lane, end, num_rewards, ALONE)
        distance = value.to(tl.float64) - mean
        squares += tl.where(value == value, distance * distance, 0.0)
    std = tl.sqrt(tl.sum(squares, 0) / tl.maximum(known - 1, 1))
    return mean.to(REAL), std.to(REAL), known.to(REAL)


@triton.jit
def _group_end(labels, begin, num_completions, BLOCK: tl.constexpr):
    """One past the last member of the group that begins at `begin`; `begin` itself where none begins there."""
    label = tl.load(labels + begin)
    end = begin
    more = label != tl.load(labels + begin - 1, mask=begin > 0, other=0)
    more = more | (begin == 0)
    while more:
        i = end + tl.arange(0, BLOCK)
        same = (tl.load(labels + i, mask=i < num_completions, other=0) == label) & (i < num_completions)
        found = tl.sum(same.to(tl.int32), 0)
        end += found
        more = found == BLOCK
    return end


@triton.jit(do_not_specialize=["num_completions", "group_size"])
def _group_kernel(
    rewards,  # [N, K] Real, NaN where missing
    factors,  # [K] Real; None: all 1
    order,  # [N] int64, completions sorted by group; None: as they stand
    labels,  # [N] integers, ascending: the group of each in that order; None: groups of group_size
    out,  # [N] Real, or [N, K] with ALONE
    num_completions,
    num_rewards,
    group_size,
    SCALE: tl.constexpr,  # batch leaves the dividing to the next launch
    ALONE: tl.constexpr,  # each reward by itself
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0)
    if ALONE:
        rewards += tl.program_id(1)
        out += tl.program_id(1)
    if labels is None:
        begin = begin * group_size
        end = begin + group_size
    else:
        end = _group_end(labels, begin, num_completions, BLOCK)
    mean, std, count = _moments(rewards, None, factors, order, begin, end, num_rewards, ALONE, BLOCK)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        n, inside, value = _values(rewards, None, factors, order, i, end, num_rewards, ALONE)
        advantage = value - mean
        if SCALE == "group":
            advantage = _divide(advantage, std + STD_EPSILON)
        elif SCALE == "leave_one_out":
            # R - (n mean - R) / (n - 1) = (R - mean) n / (n - 1)
            others = _divide(advantage * count, tl.maximum(count - 1.0, 1.0))
            advantage = tl.where(count > 1.0, others, 0.0)
        if ALONE:
            tl.store(out + n * num_rewards, advantage, mask=inside)
        elif SCALE == "batch":
            tl.store(out + n, advantage, mask=inside)
        else:
            tl.store(out + n, _finite(advantage), mask=inside)


@triton.jit(do_not_specialize=["num_completions"])
def _batch_kernel(
    table,  # [N, K] Real: the rewards, or their scores
    rewards,  # [N, K] Real where the table holds scores, else None
    factors,  # [K] Real; None: all 1
    out,  # [N] Real; holds R - mean of the group where the table holds rewards
    num_completions,
    num_rewards,
    BLOCK: tl.constexpr,
):
    mean, std, _ = _moments(table, rewards, factors, None, 0, num_completions, num_rewards, False, BLOCK)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if rewards is None:
        advantage = tl.load(out + i, mask=i < num_completions, other=0.0)
    else:
        _, _, value = _values(table, rewards, factors, None, i, num_completions, num_rewards, False)
        advantage = value - mean
    advantage = _finite(_divide(advantage, std + STD_EPSILON))
    tl.store(out + i, advantage, mask=i < num_completions)


# (most members of a group, lanes of a tile): one member a thread, with which nothing spills. Not measured.
GROUP_TILES = ((32, 32), (128, 128), (None, 1024))
UNKNOWN_GROUP = 64
"""Members that a group is taken to have where only the labels know: such tiles fit, and longer groups take more."""
BATCH_TILE = 1024


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    order: Tensor | None = None,
    labels: Tensor | None = None,
    factors: Tensor | None = None,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
) -> Tensor:
    """Advantages `[N]` in the rewards' dtype, exactly 0 where all rewards are missing and where a group's agree.

    No value is read back by the host: safe to capture in a CUDA graph.

    Args:
        rewards: `[N, K]` float32 or float64, NaN where missing.
        group_size: G; members of a group stand together, and G divides N.
        order: `[N]` int64, completions sorted by group, instead. labels: `[N]` integers, ascending, the group of each.
        factors: `[K]` in the rewards' dtype, a weight for each reward; None: all 1.
        scale: "group", "batch", "none" or "leave_one_out".
        aggregation: "sum_then_normalize", or "normalize_then_sum": each reward is z-scored in its group, and their
            weighted sum over the batch; `scale` is then "group" or "batch", which are the same.

    Raises:
        ValueError: neither or both of the ways to say which completions stand together.
    """
    if (group_size is None) == (order is None) or (order is None) != (labels is None):
        given = [k for k, v in {"group_size": group_size, "order": order, "labels": labels}.items() if v is not None]
        raise ValueError(f"group_size, order, labels: expected the first or the other two; got {given}")
    rewards = rewards.contiguous()
    num, kinds = rewards.shape
    out = rewards.new_empty(num)
    if num == 0 or kinds == 0:
        return out.zero_()
    alone = aggregation == "normalize_then_sum"
    scores = torch.empty_like(rewards) if alone else None
    grid = (num if group_size is None else num // group_size, kinds if alone else 1)
    arguments = _group_arguments(rewards, group_size, order, labels, factors, out, scores, scale)
    launch(_group_kernel, grid, arguments, rewards.device)
    if alone or scale == "batch":
        tiles = (triton.cdiv(num, BATCH_TILE),)
        launch(_batch_kernel, tiles, _batch_arguments(rewards, factors, out, scores), rewards.device)
    return out


def _group_arguments(
    rewards: Tensor,
    group_size: int | None,
    order: Tensor | None,
    labels: Tensor | None,
    factors: Tensor | None,
    out: Tensor,
    scores: Tensor | None,
    scale: str,
) -> dict[str, Any]:
    members = UNKNOWN_GROUP if group_size is None else group_size
    lanes = next(lanes for most, lanes in GROUP_TILES if most is None or members <= most)
    alone = scores is not None
    return {
        "rewards": rewards,
        "factors": None if alone else factors,
        "order": order,
        "labels": labels,
        "out": scores if alone else out,
        "num_completions": rewards.shape[0],
        "num_rewards": rewards.shape[1],
        "group_size": group_size or 0,
        "SCALE": "group" if alone else scale,
        "ALONE": alone,
        "BLOCK": lanes,
        "num_warps": lanes // 32,
    }


def _batch_arguments(rewards: Tensor, factors: Tensor | None, out: Tensor, scores: Tensor | None) -> dict[str, Any]:
    return {
        "table": rewards if scores is None else scores,
        "rewards": None if scores is None else rewards,
        "factors": factors,
        "out": out,
        "num_completions": rewards.shape[0],
        "num_rewards": rewards.shape[1],
        "BLOCK": BATCH_TILE,
        "num_warps": BATCH_TILE // 32,
    }


def aot_configurations() -> Iterator[Configuration]:
    """Every tile and scale, and both ways to say which completions stand together."""
    cases = [(size, "group", torch.float32) for size in (8, 128, 1024, None)]
    cases += [(None, scale, torch.float32) for scale in ("batch", "none", "leave_one_out", "scores")]
    cases += [(1024, "scores", torch.float32), (1024, "group", torch.float64), (None, "batch", torch.float64)]
    for size, scale, dtype in cases:
        rewards = torch.empty(2048, 3 if size is None else 1, dtype=dtype, device="meta")
        labels = None if size else torch.empty(2048, dtype=torch.int64, device="meta")
        scores = torch.empty_like(rewards) if scale == "scores" else None
        out, factors = torch.empty_like(rewards[:, 0]), torch.empty_like(rewards[0])
        arguments = _group_arguments(rewards, size, labels, labels, factors, out, scores, scale)
        case = f"{scale} {size or 'labels'} {str(dtype).removeprefix('torch.')}"
        yield Configuration.of_launch(f"group {case}", _group_kernel, arguments)
        if scale in ("batch", "scores"):
            yield Configuration.of_launch(
                f"batch {case}", _batch_kernel, _batch_arguments(rewards, factors, out, scores)
            )
