"""Metrics of a loss call as one device vector: sums, counts, minima and maxima that combine exactly.

Nothing here reads a value back to the host until `as_dict`. Micro-batches combine with `Metrics.merge`, ranks with
`Metrics.all_reduce`; means are taken at the very end, so the result is that of the undivided batch, the loss included
(only an entropy quantile is each call's own). Names and meanings
are TRL 1.16's, with `ratio/{min,max}`, `approx_kl`, `active_row_fraction` and `bad_rows` besides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.inputs import TokenInputs
from grpo_fast.objectives import Terms, Tokens, bounded_importance, default_normalizer

# Names in the vector, by how two values combine; what a loss notes stands between the sums and the minima.
_SUMS = (
    "tokens", "sequences", "computed", "bad_rows", "terms", "terms_sum", "terms_count", "bonus", "bonus_sum",
    "bonus_count", "entropy", "kl", "clip_low", "clip_high", "clip_region",
    "clip_count", "computed_sequences", "approx_kl", "sampling_difference", "sampling_count",
    "importance", "importance_count",
)  # fmt: skip
_MINS = ("clip_low_min", "importance_min", "ratio_min")
_MAXS = ("clip_high_max", "importance_max", "ratio_max", "sampling_difference_max")


def _names(config: LossConfig) -> tuple[str, ...]:
    return (*_SUMS, *config.record.metrics, *_MINS, *_MAXS)


def _split(vectors: Tensor) -> tuple[Tensor, ...]:
    """Sums, minima and maxima of `[..., K]`."""
    num_sums = vectors.shape[-1] - len(_MINS) - len(_MAXS)
    return vectors.split([num_sums, len(_MINS), len(_MAXS)], dim=-1)


class Metrics:
    """A float64 vector of partial results, and how to read it.

    Attributes:
        vector: `[K]` on the loss's device: sums first, then minima, then maxima.
        config: decides which names are reported.
        corrects: whether sampling log-probabilities were given.
    """

    def __init__(self, vector: Tensor, config: LossConfig, *, corrects: bool) -> None:
        self.vector = vector
        self.config = config
        self.corrects = corrects

    @staticmethod
    def merge(parts: list[Metrics]) -> Metrics:
        """The metrics of several micro-batches together.

        Raises:
            ValueError: no parts, or parts of different configs.
        """
        if not parts:
            raise ValueError("parts: expected at least one Metrics; got none")
        if any(part.config != parts[0].config for part in parts):
            raise ValueError("parts: expected Metrics of one LossConfig; got several")
        sums, mins, maxs = _split(torch.stack([part.vector for part in parts]))
        vector = torch.cat([sums.sum(0), mins.amin(0), maxs.amax(0)])
        return Metrics(vector, parts[0].config, corrects=parts[0].corrects)

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Metrics:
        """The metrics of all ranks together: one sum and one maximum collective."""
        sums, mins, maxs = (part.clone() for part in _split(self.vector))
        extremes = torch.cat([-mins, maxs])
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group)
        vector = torch.cat([sums, -extremes[: len(_MINS)], extremes[len(_MINS) :]])
        return Metrics(vector, self.config, corrects=self.corrects)

    def as_dict(self) -> dict[str, float]:
        """Names to numbers; waits for the device once."""
        values = dict(zip(_names(self.config), self.vector.tolist(), strict=True))

        def mean(name: str, count: str) -> float:
            return values[name] / max(values[count], 1.0)

        # What has a denominator of the caller's adds up; the rest is divided by what the parts have together.
        loss = values["terms"] + mean("terms_sum", "terms_count")
        if self.config.entropy_coef != 0:
            loss -= self.config.entropy_coef * (values["bonus"] + mean("bonus_sum", "bonus_count"))
        out = {
            "loss": loss,
            "entropy": mean("entropy", "computed"),
            "approx_kl": mean("approx_kl", "computed"),
            "ratio/min": _finite(values["ratio_min"]),
            "ratio/max": _finite(values["ratio_max"]),
            "active_row_fraction": mean("computed", "tokens"),
            "num_active_tokens": values["tokens"],
            "num_sequences": values["sequences"],
            "bad_rows": values["bad_rows"],
        }
        if self.config.beta != 0:
            out["kl"] = mean("kl", "tokens")
        record = self.config.record
        if record.clip == "two_sided":
            out["clip_ratio/low_mean"] = mean("clip_low", "clip_count")
            out["clip_ratio/low_min"] = _finite(values["clip_low_min"])
            out["clip_ratio/high_mean"] = mean("clip_high", "clip_count")
            out["clip_ratio/high_max"] = _finite(values["clip_high_max"])
            out["clip_ratio/region_mean"] = mean("clip_region", "clip_count")
        elif record.clip == "upper":
            out["cispo_clip_ratio"] = mean("clip_high", "clip_count")
        for name, over in record.metrics.items():
            out[name] = mean(name, "computed" if over == "tokens" else "computed_sequences")
        if self.corrects:
            out["sampling/sampling_logp_difference/mean"] = mean("sampling_difference", "sampling_count")
            out["sampling/sampling_logp_difference/max"] = _finite(values["sampling_difference_max"])
        if self.corrects and self.config.importance_sampling_mode is not None:
            out["sampling/importance_sampling_ratio/min"] = _finite(values["importance_min"])
            out["sampling/importance_sampling_ratio/mean"] = mean("importance", "importance_count")
            out["sampling/importance_sampling_ratio/max"] = _finite(values["importance_max"])
        return out


def _finite(value: float) -> float:
    """An extremum over nothing is infinite; report 0."""
    return value if abs(value) != float("inf") else 0.0


def clipped(ratio: Tensor, advantages: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """(too low, too high), bool: the ratios beyond the record's bounds on the side that A pushes to."""
    if config.record.clip == "upper":
        return torch.zeros_like(ratio, dtype=torch.bool), (ratio > config.upper_epsilon) & (advantages > 0)
    low = (ratio < 1 - config.epsilon) & (advantages < 0)
    return low, (ratio > 1 + config.upper_epsilon) & (advantages > 0)


@torch.no_grad()
def collect_metrics(
    logprobs: Tensor,
    entropy: Tensor | None,
    terms: Terms,
    tokens: Tokens,
    inputs: TokenInputs,
    config: LossConfig,
    finite_states: Tensor | None = None,
) -> Metrics:
    """Partial sums of every metric from `[T]` tensors.

    Args:
        terms: of `objective` on `tokens`, whose mask is the rows that were computed.
        inputs: of the call, with every token that carries loss, computed or not.
        finite_states: `[T]` bool, where logits do not show it: a soft cap makes infinite ones finite, not their slope.
    """
    computed, segments, loss_mask = tokens.mask, tokens.segments, inputs.tokens.mask
    at_sequence = config.importance_sampling_level == "sequence" and not inputs.token_advantages
    # TRL counts sequences where the ratio is a sequence's own: one value each, whatever its mask.
    lengths = segments.sum(loss_mask)

    def total(values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).double().sum()

    def per_sequence(flag: Tensor) -> Tensor:
        """Share of each sequence's tokens that are flagged, `[S]`; NaN for empty sequences."""
        return segments.sum((flag & computed).to(logprobs.dtype)) / lengths

    def extreme(values: Tensor, mask: Tensor, *, largest: bool) -> Tensor:
        worst = -float("inf") if largest else float("inf")
        padded = torch.cat([torch.where(mask, values, worst).flatten(), values.new_full((1,), worst)])
        return padded.amax() if largest else padded.amin()

    def flagged(flag: Tensor) -> Tensor:
        shares = per_sequence(flag)
        return total(shares.nan_to_num(nan=0.0), lengths > 0) if at_sequence else (flag & computed).double().sum()

    drift = logprobs.new_zeros(()) if tokens.old_logprobs is None else tokens.old_logprobs - logprobs
    known_entropy = torch.zeros_like(logprobs) if entropy is None else entropy
    numbers = [logprobs, known_entropy, terms.policy, terms.ratio, tokens.advantages]
    numbers += [n for n in (tokens.old_logprobs, tokens.ref_logprobs, terms.importance) if n is not None]
    finite = torch.stack([n.isfinite() for n in numbers]).all(0)
    if tokens.sampling_logprobs is not None:
        finite &= ~tokens.sampling_logprobs.isinf()  # NaN: not known
    if finite_states is not None:
        finite &= finite_states
    # One ratio for a sequence: what spoils a token's gradient in it spoils all.
    spoils, record = None, config.record
    if config.importance_sampling_level == "sequence" or record.couples == "sequence":
        spoils = ~finite
    elif record.couples == "clamped_sequence":  # only what is no number gets past the clamps
        spoils = terms.ratio.isnan() if terms.importance is None else terms.ratio.isnan() | terms.importance.isnan()
    if spoils is not None:
        finite &= segments.spread(segments.sum(computed & spoils) == 0)
    values: dict[str, Tensor] = {
        "tokens": loss_mask.sum(),
        "sequences": lengths.new_full((), segments.num_sequences),
        "computed": computed.sum(),
        "bad_rows": (computed & ~finite).sum(),
        "entropy": total(known_entropy, computed),
        "kl": total(torch.zeros_like(logprobs) if terms.kl is None else terms.kl, computed),
        "computed_sequences": (segments.sum(computed) > 0).sum(),
        "approx_kl": total((drift.exp() - drift - 1).expand_as(logprobs), computed),
        "ratio_min": extreme(terms.ratio, computed, largest=False),
        "ratio_max": extreme(terms.ratio, computed, largest=True),
        "clip_count": lengths.new_full((), segments.num_sequences) if at_sequence else loss_mask.sum(),
    }
    if record.clip == "two_sided":
        low, high = clipped(terms.clip_ratio, tokens.advantages, config)
        values |= {"clip_low": flagged(low), "clip_high": flagged(high), "clip_region": flagged(low | high)}
        values["clip_low_min"] = extreme(per_sequence(low), lengths > 0, largest=False)
        values["clip_high_max"] = extreme(per_sequence(high), lengths > 0, largest=True)
    elif record.clip == "upper":
        values["clip_high"] = flagged(clipped(terms.ratio, tokens.advantages, config)[1])
    for name, over in record.metrics.items():
        noted = terms.noted[name]
        values[name] = total(noted, computed) if over == "tokens" else segments.mean(noted, computed).double().sum()
    values |= _loss_parts(known_entropy, terms, inputs, config)
    values |= _sampling_metrics(logprobs, terms, tokens, inputs, config)
    neutral = dict.fromkeys(_SUMS, 0.0) | dict.fromkeys(_MINS, float("inf")) | dict.fromkeys(_MAXS, -float("inf"))
    names = _names(config)
    neutrals = {name: logprobs.new_full((), neutral[name]) for name in names if name not in values}
    vector = torch.stack([(values | neutrals)[name].double() for name in names])
    return Metrics(vector, config, corrects=tokens.sampling_logprobs is not None)


def _loss_parts(entropy: Tensor, terms: Terms, inputs: TokenInputs, config: LossConfig) -> dict[str, Tensor]:
    """The loss's two parts: as they are where the caller gave their denominators, else sum and denominator apart."""
    tokens = inputs.tokens
    parts = {"terms": (terms.policy.double() * inputs.weights.double()).sum()}
    if not inputs.normalizer_given:
        count = default_normalizer(config, tokens.mask, tokens.segments)
        value = parts.pop("terms")
        parts |= {"terms_sum": value * count.clamp(min=1), "terms_count": count}
    if config.entropy_coef != 0:
        weights = terms.entropy_weights.double()
        parts["bonus"] = torch.where(weights > 0, weights * entropy.double(), 0.0).sum()
        if not tokens.bonus_count_given:
            count = (weights > 0).sum()
            value = parts.pop("bonus")
            parts |= {"bonus_sum": value * count.clamp(min=1), "bonus_count": count}
    return parts


def _sampling_metrics(
    logprobs: Tensor, terms: Terms, tokens: Tokens, inputs: TokenInputs, config: LossConfig
) -> dict[str, Tensor]:
    """|old - sampling| and the importance weights, over tokens whose sampling log-probability is known.

    With `old_logprobs` these are known of every unmasked token, computed or not.
    """
    if tokens.sampling_logprobs is None:
        return {}
    weight, old = terms.importance, logprobs
    if inputs.tokens.old_logprobs is not None:
        tokens, weight, old = inputs.tokens, inputs.tokens.importance, inputs.tokens.old_logprobs
    assert tokens.sampling_logprobs is not None
    difference = (old - tokens.sampling_logprobs).abs()
    known = tokens.mask & ~difference.isnan()
    worst = torch.where(known, difference, -float("inf"))
    values = {
        "sampling_difference": torch.where(known, difference, 0.0).double().sum(),
        "sampling_count": known.sum(),
        "sampling_difference_max": torch.cat([worst, worst.new_full((1,), -float("inf"))]).amax(),
    }
    mode = config.importance_sampling_mode
    if weight is None or mode is None:
        return values
    mask, infinity = tokens.mask, weight.new_full((1,), float("inf"))
    least, most = torch.where(mask, weight, infinity), torch.where(mask, weight, -infinity)
    if mode.startswith("sequence"):
        # One value a sequence; one without unmasked tokens counts, as TRL's does, with the weight of d = 0.
        empty = tokens.segments.sum(mask) == 0
        neutral = bounded_importance(torch.ones_like(infinity), mode, config)
        values["importance"] = (tokens.segments.mean(weight, mask) + empty * neutral).double().sum()
        values["importance_count"] = empty.new_full((), empty.numel(), dtype=torch.int64)
        least = torch.cat([least, torch.where(empty, neutral, infinity)])
        most = torch.cat([most, torch.where(empty, neutral, -infinity)])
    else:
        values["importance"] = torch.where(mask, weight, 0.0).double().sum()
        values["importance_count"] = mask.sum()
    values["importance_min"] = torch.cat([least, infinity]).amin()
    values["importance_max"] = torch.cat([most, -infinity]).amax()
    return values
