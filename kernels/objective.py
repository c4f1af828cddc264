"""The token objective on the device: the derivative of one token's loss term in its log-probability.

Legend: p `logprob` of the current policy, o old (p held fixed where absent), r = p - o, w = e^r, A advantage, mu the
rollout engine's logprob, sg stop-gradient. Logs are natural (nats). d = d term / d p with

    term = importance * policy(p) + beta * kl(p)

    policy      d policy / d p
    clipped     -A w (share of the free side + share of the clipped side while w is inside the clip range)
    cispo       -min(w, clip_bound) A
    sapo        -4 A (1 - gate) gate w,  gate = sigmoid(tau (w - 1)), tau by the sign of A
    dppo        -A w, 0 where e^p - e^mu has left +-threshold on A's side;  + 2 coef r
    ppo_dual    clipped; for A < 0 held where the term exceeds -dual_clip A
    reinforce   -A

    kl, times w if asked:   k1  p - ref     k2  (p - ref)^2 / 2     k3  e^(ref - p) - (ref - p) - 1

The twin of csrc/objective.h and grpo_fast/objectives.py, for objectives whose tokens do not see each other. The values
of the terms and the metrics are O(T) and left to the latter. The conventions are those files', not some version of
torch's (2.14 changed clamp's): a clamp has slope 1 inside and on its bounds, 0 outside; at a tie min gives half to each
side; what is 0 * inf there is NaN here.

Scalars, one row a program: this costs nothing beside a row's logits, so nothing here is clever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

POLICIES = ("clipped", "cispo", "sapo", "dppo", "ppo_dual", "reinforce")
KL_ESTIMATORS = ("none", "k1", "k2", "k3")
CORRECTIONS = ("none", "weight", "token_truncate", "token_mask")

PARAMETERS = (
    "clip_low",
    "clip_high",
    "clip_bound",
    "delta",
    "beta",
    "importance_min",
    "importance_max",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "dppo_threshold",
    "dppo_log_ratio_coef",
    "dual_clip",
)
"""Numbers of an objective, in the order of the `[12]` float32 tensor that kernels read them from."""
_DEFAULTS = {"delta": math.inf, "importance_min": -math.inf, "importance_max": math.inf}


def objective_parameters(values: Mapping[str, float | None], device: torch.device) -> Tensor:
    """`[12]` float32 on `device`; a bound that is None is infinite.

    Raises:
        ValueError: a parameter is missing, or one that is not known is given.
    """
    if set(values) != set(PARAMETERS):
        raise ValueError(f"values: expected {', '.join(PARAMETERS)}; got {', '.join(sorted(values))}")
    given = [values[name] for name in PARAMETERS]
    numbers = [_DEFAULTS[name] if v is None else v for name, v in zip(PARAMETERS, given, strict=True)]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@triton.jit
def _expm1(x):
    """e^x - 1 without cancellation near 0: its series below 0.35, where eight terms leave 6e-9."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(tl.abs(x) < 0.35, series, tl.exp(x) - 1)


@triton.jit
def _minimum_share(a, b):
    """d min(a, b) / da."""
    return tl.where(a == b, 0.5, tl.where(a > b, 0.0, 1.0))


@triton.jit
def _clipped_slope(ratio, capped, advantage, parameters):
    low = tl.load(parameters + 0)
    high = tl.load(parameters + 1)
    free_side = capped * advantage
    clip_side = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
    from_free = _minimum_share(free_side, clip_side) * advantage
    from_clip = _minimum_share(clip_side, free_side) * advantage
    d_ratio = tl.where(ratio <= tl.load(parameters + 3), from_free, 0.0)
    d_ratio += tl.where((ratio >= low) & (ratio <= high), from_clip, 0.0)
    value = -tl.where((free_side != free_side) | (free_side < clip_side), free_side, clip_side)
    return value, -d_ratio * ratio


@triton.jit
def _policy_slope(POLICY: tl.constexpr, logprob, log_ratio, ratio, advantage, behaviour, parameters):
    """d policy / d p."""
    if POLICY == "reinforce":
        return -advantage
    elif POLICY == "cispo":
        bound = tl.load(parameters + 2)
        return -tl.where(ratio > bound, bound, ratio) * advantage
    elif POLICY == "sapo":
        tau = tl.where(advantage > 0, tl.load(parameters + 7), tl.load(parameters + 8))
        gate = 1 / (1 + tl.exp(-tau * (ratio - 1)))
        return -4 / tau * advantage * ((1 - gate) * gate) * tau * ratio
    elif POLICY == "dppo":
        gap = tl.exp(logprob) - tl.exp(behaviour)  # NaN passes no limit
        limit = tl.load(parameters + 9)
        drop = tl.where(advantage > 0, gap > limit, (advantage <= 0) & (gap < -limit))
        gain = tl.where(drop, 0.0, -advantage)
        return gain * ratio + tl.load(parameters + 10) * (2 * log_ratio)
    else:
        delta = tl.load(parameters + 3)
        value, slope = _clipped_slope(ratio, tl.where(ratio > delta, delta, ratio), advantage, parameters)
        if POLICY == "ppo_dual":
            share = _minimum_share(value, -tl.load(parameters + 11) * advantage)
            slope = tl.where(advantage < 0, share * slope, slope)
        return slope


@triton.jit
def _kl_slope(KL: tl.constexpr, KL_TIMES_RATIO: tl.constexpr, difference, ratio):
    """d kl / d p, with difference = ref - p."""
    if KL == "k1":
        slope = 1.0
        weighted = 1 - difference
    elif KL == "k2":
        slope = -difference
        weighted = difference * difference / 2 - difference
    else:
        slope = -_expm1(difference)
        weighted = -difference  # of kl * w, over w: slope + value, free of their common part
    if KL_TIMES_RATIO:
        return weighted * ratio
    else:
        return slope + 0 * difference


@triton.jit
def _importance(CORRECTION: tl.constexpr, row, old, sampling, importance, parameters):
    """The train/inference weight of a row whose old logprob is `old`."""
    if CORRECTION == "weight":
        return tl.load(importance + row)
    else:
        difference = old - tl.load(sampling + row)
        weight = tl.where(difference != difference, 1.0, tl.exp(difference))
        low = tl.load(parameters + 5)
        high = tl.load(parameters + 6)
        outside = (weight < low) | (weight > high)
        if CORRECTION == "token_mask":
            return tl.where(outside, 0.0, weight)
        else:
            return tl.where(weight < low, low, tl.where(weight > high, high, weight))


@triton.jit
def objective_slope(
    row,
    logprob,
    advantages,
    old_logprobs,
    ref_logprobs,
    sampling_logprobs,
    importance,
    parameters,
    POLICY: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    CORRECTION: tl.constexpr,
):
    """d term / d logprob of token `row`; the `[R]` float32 tensors are None where they are absent."""
    advantage = tl.load(advantages + row)
    if old_logprobs is None:
        old = logprob
    else:
        old = tl.load(old_logprobs + row)
    if sampling_logprobs is None:
        behaviour = old
    else:
        behaviour = tl.load(sampling_logprobs + row)
    log_ratio = logprob - old
    ratio = tl.exp(log_ratio)
    slope = _policy_slope(POLICY, logprob, log_ratio, ratio, advantage, behaviour, parameters)
    if CORRECTION != "none":
        slope *= _importance(CORRECTION, row, old, sampling_logprobs, importance, parameters)
    if KL != "none":
        difference = tl.load(ref_logprobs + row) - logprob
        slope += tl.load(parameters + 4) * _kl_slope(KL, KL_TIMES_RATIO, difference, ratio)
    return slope
