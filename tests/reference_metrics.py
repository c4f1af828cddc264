"""The metrics of a loss call in plain float64, token by token: what `grpo_fast.metrics` reports, from the definitions.

Lists of Python floats and loops over sequences; no code is shared with the library. Legend: T packed tokens, S
sequences, m mask, p current, o old logprob, r = p - o, w the ratio at the configured level, A advantage, L_s unmasked
tokens of sequence s. "Computed" tokens are the unmasked ones that went through the LM head.

    loss                     the loss itself
    entropy, approx_kl       means over computed tokens of H and of e^-r + r - 1
    ratio/min, ratio/max     of w over computed tokens; 0 where there is none
    kl                       mean over unmasked tokens of the KL estimate (times w with the bias correction)
    clip_ratio/*             tokens with min(w, delta) < 1 - eps_low and A < 0 (low), > 1 + eps_high and A > 0 (high),
                             either (region): means over unmasked tokens, or, where ratio and advantage belong to
                             the sequence, over sequences; low_min, high_max: extremes of the sequences' shares
    cispo_clip_ratio         tokens with w > eps_high and A > 0, likewise
    vespo/phi_seq_mean       mean over sequences that have computed tokens of the mean of phi over these
    sampling_logp_difference |o - sampling| over unmasked tokens whose sampling logprob is known: mean and max; over
                             computed ones where o is the current policy's
    importance_sampling_ratio  the bounded weights: of these tokens, or one a sequence (1, bounded, where empty)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

CLIPPED_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "ppo_dual", "gmpo")


@dataclass(kw_only=True)
class TokenData:
    """What a loss call knows of its tokens, packed.

    Attributes:
        bounds: (first, last + 1) of each sequence. mask: which tokens carry loss.
        advantages: one a token; `token_advantages` says whether the caller gave them so.
        logprobs, entropy, old, ref, sampling: one a token, or None. Anything where masked.
    """

    bounds: list[tuple[int, int]]
    mask: list[bool]
    advantages: list[float]
    token_advantages: bool
    logprobs: list[float]
    entropy: list[float] | None
    old: list[float] | None
    ref: list[float] | None
    sampling: list[float] | None


def correction(data: TokenData, config: Any, difference: list[float], tokens: list[int]) -> dict[int, float]:
    """Bounded weight e^d of each of a sequence's tokens; d is unknown, hence 0, where it is NaN."""
    known = {t: 0.0 if math.isnan(difference[t]) else difference[t] for t in tokens}
    if config.importance_sampling_mode.startswith("sequence"):
        known = dict.fromkeys(tokens, math.fsum(known.values()))
    return {t: bounded(safe_exp(d), config) for t, d in known.items()}


def bounded(weight: float, config: Any) -> float:
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if config.importance_sampling_mode.endswith("truncate"):
        return min(max(weight, low), high)
    return weight if low <= weight <= high else 0.0


def safe_exp(x: float) -> float:
    return math.inf if x > 709 else math.exp(x)


def computed_tokens(data: TokenData, config: Any) -> list[bool]:
    """Which tokens go through the LM head: unmasked ones, less those known beforehand to have no gradient.

    Those are tokens of advantage 0, or of correction weight 0 where that does not depend on the current policy, unless
    KL, bonus, entropy mask, dppo's regulariser or `all_token_metrics` want them. Where tokens of a sequence see each
    other, it stays or goes whole.
    """
    everything = (
        config.beta != 0
        or config.entropy_coef != 0
        or config.top_entropy_quantile < 1
        or config.loss_type == "dppo"
        or config.all_token_metrics
    )
    if everything:
        return list(data.mask)
    computed = [False] * len(data.mask)
    for begin, end in data.bounds:
        tokens = [t for t in range(begin, end) if data.mask[t]]
        weights = dict.fromkeys(tokens, 1.0)
        if config.importance_sampling_mode is not None and data.old is not None and config.loss_type != "vespo":
            assert data.sampling is not None
            difference = [o - s for o, s in zip(data.old, data.sampling, strict=True)]
            weights = correction(data, config, difference, tokens)
        live = {t for t in tokens if data.advantages[t] != 0 and weights[t] != 0}
        if couples_tokens(config, has_old=data.old is not None) and live:
            live = set(tokens)
        for t in live:
            computed[t] = True
    return computed


def couples_tokens(config: Any, *, has_old: bool) -> bool:
    """Whether a token's gradient depends on the current log-probabilities of others."""
    return (
        config.importance_sampling_level in ("sequence", "sequence_token")
        or config.loss_type in ("vespo", "gmpo")
        or config.off_policy_mask_threshold is not None
        or config.top_entropy_quantile < 1
        or (not has_old and config.importance_sampling_mode in ("sequence_truncate", "sequence_mask"))
    )


def reference_metrics(data: TokenData, config: Any, loss: float) -> dict[str, float]:
    """`Metrics.as_dict()` of a call with these tokens, `bad_rows` left out."""
    computed = computed_tokens(data, config)
    num_sequences, num_computed = len(data.bounds), sum(computed)
    num_tokens = sum(data.mask)
    old = data.logprobs if data.old is None else data.old
    rows = [t for t in range(len(data.mask)) if computed[t]]
    sequences = [[t for t in range(begin, end) if computed[t]] for begin, end in data.bounds]
    lengths = [sum(data.mask[begin:end]) for begin, end in data.bounds]

    ratio: dict[int, float] = {}
    for tokens in sequences:
        r = {t: data.logprobs[t] - old[t] for t in tokens}
        mean = math.fsum(r.values()) / max(len(r), 1)
        for t in tokens:
            ratio[t] = safe_exp(r[t] if config.importance_sampling_level == "token" else mean)

    def average(values: list[float], count: int) -> float:
        return math.fsum(values) / max(count, 1)

    out = {
        "loss": loss,
        "entropy": 0.0 if data.entropy is None else average([data.entropy[t] for t in rows], num_computed),
        "approx_kl": average([math.expm1(old[t] - data.logprobs[t]) - (old[t] - data.logprobs[t]) for t in rows],
                             num_computed),
        "ratio/min": min(ratio.values(), default=0.0),
        "ratio/max": max(ratio.values(), default=0.0),
        "active_row_fraction": num_computed / max(num_tokens, 1),
        "num_active_tokens": num_tokens,
        "num_sequences": num_sequences,
    }  # fmt: skip
    if config.beta != 0:
        assert data.ref is not None
        estimates = [_kl(data.logprobs[t], data.ref[t], config.kl_estimator) for t in rows]
        weights = [ratio[t] if config.use_bias_correction_kl else 1.0 for t in rows]
        out["kl"] = average([w * k for w, k in zip(weights, estimates, strict=True)], num_tokens)

    of_sequence = config.importance_sampling_level == "sequence" and not data.token_advantages

    def shares(flagged: set[int]) -> list[float]:
        """Of every sequence that has unmasked tokens."""
        pairs = zip(sequences, lengths, strict=True)
        return [len(flagged & set(tokens)) / length for tokens, length in pairs if length > 0]

    def mean_flagged(flagged: set[int]) -> float:
        if of_sequence:
            return average(shares(flagged), num_sequences)
        return len(flagged) / max(num_tokens, 1)

    epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if config.loss_type in CLIPPED_TYPES:
        capped = {t: w if config.delta is None else min(w, config.delta) for t, w in ratio.items()}
        low = {t for t in rows if capped[t] < 1 - config.epsilon and data.advantages[t] < 0}
        high = {t for t in rows if capped[t] > 1 + epsilon_high and data.advantages[t] > 0}
        out["clip_ratio/low_mean"] = mean_flagged(low)
        out["clip_ratio/low_min"] = min(shares(low), default=0.0)
        out["clip_ratio/high_mean"] = mean_flagged(high)
        out["clip_ratio/high_max"] = max(shares(high), default=0.0)
        out["clip_ratio/region_mean"] = mean_flagged(low | high)
    if config.loss_type == "cispo":
        out["cispo_clip_ratio"] = mean_flagged({t for t in rows if ratio[t] > epsilon_high and data.advantages[t] > 0})
    if config.loss_type == "vespo":
        means = [average(_phis(data, config, old, tokens), len(tokens)) for tokens in sequences if tokens]
        out["vespo/phi_seq_mean"] = average(means, len(means))
    if data.sampling is not None:
        difference = [o - s for o, s in zip(old, data.sampling, strict=True)]
        if data.old is not None:  # then all is known without the head
            sequences = [[t for t in range(begin, end) if data.mask[t]] for begin, end in data.bounds]
        gaps = [abs(difference[t]) for tokens in sequences for t in tokens if not math.isnan(difference[t])]
        out["sampling/sampling_logp_difference/mean"] = average(gaps, len(gaps))
        out["sampling/sampling_logp_difference/max"] = max(gaps, default=0.0)
        if config.importance_sampling_mode is not None:
            weights = []
            for (begin, end), tokens in zip(data.bounds, sequences, strict=True):
                values = correction(data, config, difference, [t for t in range(begin, end) if data.mask[t]])
                if config.importance_sampling_mode.startswith("token"):
                    weights += [values[t] for t in tokens]
                else:
                    weights.append(values[tokens[0]] if tokens else bounded(1.0, config))
            name = "sampling/importance_sampling_ratio"
            out[f"{name}/min"], out[f"{name}/max"] = min(weights, default=0.0), max(weights, default=0.0)
            out[f"{name}/mean"] = average(weights, len(weights))
    return out


def _kl(logprob: float, ref: float, estimator: str) -> float:
    d = ref - logprob
    return {"k1": -d, "k2": 0.5 * d * d, "k3": safe_exp(d) - 1 - d}[estimator]


def _phis(data: TokenData, config: Any, old: list[float], tokens: list[int]) -> list[float]:
    """exp(rate + k log W - rate W) of each token, by the sign of its advantage; log W the sequence's, clamped."""
    floor = math.log(1e-8)
    log_w = math.fsum(min(max(data.logprobs[t] - old[t], -20.0), 20.0) for t in tokens)
    if config.importance_sampling_mode is not None:
        assert data.sampling is not None
        difference = [o - s for o, s in zip(old, data.sampling, strict=True)]
        for weight in correction(data, config, difference, tokens).values():
            log_w += min(max(math.log(weight) if weight > 0 else -math.inf, floor), 20.0)
    log_w = min(max(log_w, floor), 20.0)
    phis = []
    for t in tokens:
        positive = data.advantages[t] >= 0
        k = config.vespo_k_pos if positive else config.vespo_k_neg
        rate = max(config.vespo_lambda_pos if positive else config.vespo_lambda_neg, 1e-4)
        phis.append(math.exp(max(rate + k * log_w - rate * math.exp(log_w), -745.0)))
    return phis
