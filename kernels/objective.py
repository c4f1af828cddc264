"""The token objective on the device: a token's loss term and its slope in the current log-probability.

Legend: p `logprob` of the current policy, o old (p held fixed where absent), r = p - o, w = e^r, A advantage, mu the
rollout engine's logprob. Logs are natural (nats).

    term = importance * policy(p) + beta * kl(p)

The twin of csrc/objective.h and grpo_fast/losses.py, for objectives whose tokens do not see each other; metrics are
O(T) and left to the latter. A term is its formula over dual numbers, (value, slope) pairs whose operations hold
autograd's conventions.

To add a token-local policy term: a function below, and its name in `POLICIES`; on the other device likewise in
csrc/objective.h; numbers that it needs go to parameters.py.

Scalars, one row a program: this costs nothing beside a row's logits, so nothing here is clever.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_fast.kernels.parameters import PARAMETERS

KL_ESTIMATORS = ("none", "k1", "k2", "k3")
CORRECTIONS = ("none", "weight", "token_truncate", "token_mask")


def objective_parameters(values: Mapping[str, float], device: torch.device) -> Tensor:
    """`[P]` float32 on `device`, in the order of `PARAMETERS`; a bound that there is not is infinite.

    Raises:
        ValueError: a parameter is missing, or one that is not known is given.
    """
    if set(values) != set(PARAMETERS):
        raise ValueError(f"values: expected {', '.join(PARAMETERS)}; got {', '.join(sorted(values))}")
    return torch.tensor([values[name] for name in PARAMETERS], dtype=torch.float32, device=device)


_PLACES = {name: place for place, name in enumerate(PARAMETERS)}


@triton.constexpr_function
def _place(name):
    return _PLACES[name]


@triton.jit
def _parameter(parameters, NAME: tl.constexpr):
    return tl.load(parameters + _place(NAME))


# -- operations on dual numbers: (value, slope in a variable) ---------------------------------------------------------
# (x, 1.0) is the variable, (x, 0.0) is held fixed, as if detached


@triton.jit
def _sum(a, b):
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def _scaled(factor, x):
    return factor * x[0], factor * x[1]


@triton.jit
def _square(x):
    return x[0] * x[0], 2 * x[0] * x[1]


@triton.jit
def _sigmoid(x):
    gate = 1 / (1 + tl.exp(-x[0]))
    return gate, (1 - gate) * gate * x[1]


@triton.jit
def _exp_less_tangent(x):
    """e^x - 1 - x: by expm1, as near 0 it is a small difference of numbers near 1, and so is its slope."""
    d = x[0]
    # Below 0.35 by its series, where eight terms leave 6e-9.
    series = d * (1 + d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7 * (1 + d / 8)))))))
    rise = tl.where(tl.abs(d) < 0.35, series, tl.exp(d) - 1)
    return rise - d, rise * x[1]


@triton.jit
def _where(condition, yes, no):
    return tl.where(condition, yes[0], no[0]), tl.where(condition, yes[1], no[1])


@triton.jit
def _minimum(a, b):
    """NaN if either is; at a tie each side gives half of its slope."""
    value = tl.where((a[0] != a[0]) | (a[0] < b[0]), a[0], b[0])
    from_a = tl.where(a[0] == b[0], 0.5, tl.where(a[0] > b[0], 0.0, 1.0))
    from_b = tl.where(a[0] == b[0], 0.5, tl.where(b[0] > a[0], 0.0, 1.0))
    return value, from_a * a[1] + from_b * b[1]


@triton.jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _scaled_clamp(factor, x, low, high):
    """factor clamp(x). Inside and on the bounds the slope passes whole (a convention of our own: torch's clamp changed
    in 2.14), outside it is 0, even if the factor is infinite."""
    outside = (x[0] < low) | (x[0] > high)
    return factor * _clamp(x[0], low, high), tl.where(outside, 0.0, factor * x[1])


@triton.jit
def _chain(f, inner):
    """f, whose slope is in x, as a function of what x has the slope `inner` in. The innermost factor comes last, as in
    autograd: a slope of 0 times an infinite ratio is NaN here as it is there."""
    return f[0], f[1] * inner


# -- policy terms -----------------------------------------------------------------------------------------------------


@triton.jit
def _clipped(logprob, log_ratio, ratio, advantage, behaviour, parameters):
    """-min(min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A)"""
    free_side = _scaled_clamp(advantage, (ratio, 1.0), -float("inf"), _parameter(parameters, "delta"))
    low, high = _parameter(parameters, "clip_low"), _parameter(parameters, "clip_high")
    return _chain(_scaled(-1.0, _minimum(free_side, _scaled_clamp(advantage, (ratio, 1.0), low, high))), ratio)


@triton.jit
def _cispo(logprob, log_ratio, ratio, advantage, behaviour, parameters):
    """-min(w, epsilon_high) A p, but for p held fixed"""
    return _scaled(-_clamp(ratio, -float("inf"), _parameter(parameters, "clip_bound")) * advantage, (logprob, 1.0))


@triton.jit
def _sapo(logprob, log_ratio, ratio, advantage, behaviour, parameters):
    """-4 / tau A sigmoid(tau (w - 1)), tau by the sign of A"""
    positive, negative = _parameter(parameters, "sapo_temperature_pos"), _parameter(parameters, "sapo_temperature_neg")
    tau = tl.where(advantage > 0, positive, negative)
    return _chain(_chain(_scaled(-4 / tau * advantage, _sigmoid((tau * (ratio - 1), 1.0))), tau), ratio)


@triton.jit
def _dppo(logprob, log_ratio, ratio, advantage, behaviour, parameters):
    """-A w, 0 where e^p - e^mu has left +-threshold on A's side (NaN has not);  + coef r^2"""
    gap, limit = tl.exp(logprob) - tl.exp(behaviour), _parameter(parameters, "dppo_threshold")
    drop = tl.where(advantage > 0, gap > limit, (advantage <= 0) & (gap < -limit))
    gain = _chain(_where(drop, (0.0, 0.0), _scaled(-advantage, (ratio, 1.0))), ratio)
    return _sum(gain, _scaled(_parameter(parameters, "dppo_log_ratio_coef"), _square((log_ratio, 1.0))))


@triton.jit
def _ppo_dual(logprob, log_ratio, ratio, advantage, behaviour, parameters):
    """the clipped term, for A < 0 at most -dual_clip A"""
    clipped = _clipped(logprob, log_ratio, ratio, advantage, behaviour, parameters)
    bound = (-_parameter(parameters, "dual_clip") * advantage, 0.0)
    return _where(advantage < 0, _minimum(clipped, bound), clipped)


@triton.jit
def _reinforce(logprob, log_ratio, ratio, advantage, behaviour, parameters):
    """-A p"""
    return _scaled(-advantage, (logprob, 1.0))


POLICIES = {
    "clipped": _clipped,
    "cispo": _cispo,
    "sapo": _sapo,
    "dppo": _dppo,
    "ppo_dual": _ppo_dual,
    "reinforce": _reinforce,
}
"""Kernels are compiled for one of these functions; `behaviour` is the logprob of the policy that sampled."""


# -- the rest of the term ---------------------------------------------------------------------------------------------


@triton.jit
def _kl(KL: tl.constexpr, KL_TIMES_RATIO: tl.constexpr, logprob, ref_logprob, ratio):
    """k1  p - ref     k2  (p - ref)^2 / 2     k3  e^(ref - p) - (ref - p) - 1     times w if asked"""
    difference = (ref_logprob - logprob, -1.0)
    if KL == "k1":
        kl = _scaled(-1.0, difference)
    elif KL == "k2":
        kl = _scaled(0.5, _square(difference))
    else:
        kl = _exp_less_tangent(difference)
    if KL_TIMES_RATIO:
        # d (kl w) / dp = (kl + dkl / dp) w; k3's two are free of their common part.
        kl = (kl[0] * ratio, (-difference[0] if KL == "k3" else kl[0] + kl[1]) * ratio)
    return kl


@triton.jit
def _importance(CORRECTION: tl.constexpr, row, old, sampling, importance, parameters):
    """The train/inference weight of a row whose old logprob is `old`."""
    if CORRECTION == "weight":
        return tl.load(importance + row)
    else:
        difference = old - tl.load(sampling + row)
        weight = tl.where(difference != difference, 1.0, tl.exp(difference))
        bounded = _clamp(weight, _parameter(parameters, "importance_min"), _parameter(parameters, "importance_max"))
        if CORRECTION == "token_mask":
            return tl.where(bounded == weight, weight, 0.0)
        else:
            return bounded


@triton.jit
def token_term(
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
    """(term, slope) of token `row`; the `[R]` float32 tensors are None where they are absent. POLICY is a function."""
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
    term = POLICY(logprob, log_ratio, ratio, advantage, behaviour, parameters)
    if CORRECTION != "none":
        term = _scaled(_importance(CORRECTION, row, old, sampling_logprobs, importance, parameters), term)
    if KL != "none":
        kl = _kl(KL, KL_TIMES_RATIO, logprob, tl.load(ref_logprobs + row), ratio)
        term = _sum(term, _scaled(_parameter(parameters, "beta"), kl))
    return term
