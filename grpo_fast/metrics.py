"""Metrics of a loss call as one device vector: sums, counts, minima and maxima that combine exactly.

Nothing here reads a value back to the host until `as_dict`. Micro-batches combine with `Metrics.merge`, ranks with
`Metrics.all_reduce`; means are taken at the very end, so the result is that of the undivided batch, the loss included
(only an entropy quantile is each call's own). Names and meanings are TRL 1.16's, with `ratio/{min,max}`, `approx_kl`,
`active_row_fraction` and `bad_rows` besides.

A metric is declared where it is computed, once: its name, and how its parts combine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.inputs import TokenInputs
from grpo_fast.objectives import Terms, Tokens, bounded_importance, default_normalizer

Kind = Literal["sum", "mean", "min", "max"]
"""How parts combine. A mean has two places, sum and count; it is 0 over nothing, and so is an extremum."""
KINDS: tuple[Kind, ...] = get_args(Kind)
SAMPLING = "sampling/"
LOSS_PARTS = ("terms_sum", "terms_mean", "bonus_sum", "bonus_mean")


class Metrics:
    """A float64 vector of partial results, and how to read it.

    Attributes:
        vector: `[K]` on the loss's device: sums and means first, then minima, then maxima.
        names: of the metrics, as they are reported, and their kinds; in the vector they stand kind by kind.
        config: whose loss they are of.
        corrects: whether sampling log-probabilities were given.
    """

    def __init__(self, vector: Tensor, names: dict[str, Kind], config: LossConfig, *, corrects: bool) -> None:
        self.vector, self.names = vector, names
        self.config, self.corrects = config, corrects

    def _with(self, vector: Tensor) -> Metrics:
        return Metrics(vector, self.names, self.config, corrects=self.corrects)

    def _split(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """Sums, minima and maxima of `[..., K]`."""
        extremes = [sum(kind == which for kind in self.names.values()) for which in ("min", "max")]
        return vectors.split([vectors.shape[-1] - sum(extremes), *extremes], dim=-1)

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
        sums, mins, maxs = parts[0]._split(torch.stack([part.vector for part in parts]))
        return parts[0]._with(torch.cat([sums.sum(0), mins.amin(0), maxs.amax(0)]))

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Metrics:
        """The metrics of all ranks together: one sum and one maximum collective."""
        sums, mins, maxs = (part.clone() for part in self._split(self.vector))
        extremes, num_mins = torch.cat([-mins, maxs]), mins.numel()
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group)
        return self._with(torch.cat([sums, -extremes[:num_mins], extremes[num_mins:]]))

    def as_dict(self) -> dict[str, float]:
        """Names to numbers; waits for the device once."""
        values: Iterator[float] = iter(self.vector.tolist())
        found = {}
        for name in sorted(self.names, key=lambda name: KINDS.index(self.names[name])):
            kind, value = self.names[name], next(values)
            if kind == "mean":
                value /= max(next(values), 1.0)
            found[name] = 0.0 if kind in ("min", "max") and math.isinf(value) else value
        # What has a denominator of the caller's adds up; the rest is divided by what the parts have together.
        terms_sum, terms_mean, bonus_sum, bonus_mean = (found.pop(name) for name in LOSS_PARTS)
        loss = terms_sum + terms_mean
        if self.config.entropy_coef != 0:
            loss -= self.config.entropy_coef * (bonus_sum + bonus_mean)
        told = [n for n in self.names if n in found and (self.corrects or not n.startswith(SAMPLING))]
        return {"loss": loss} | {name: found[name] for name in told}


def clipped(ratio: Tensor, advantages: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """(too low, too high), bool: the ratios beyond the record's bounds on the side that A pushes to."""
    if config.record.clip == "upper":
        return torch.zeros_like(ratio, dtype=torch.bool), (ratio > config.upper_epsilon) & (advantages > 0)
    low = (ratio < 1 - config.epsilon) & (advantages < 0)
    return low, (ratio > 1 + config.upper_epsilon) & (advantages > 0)


class _Collector:
    """The parts of one call, by name: their kind, and 0-dim numbers."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[Kind, list[Tensor]]] = {}

    def sum(self, name: str, value: Tensor) -> None:
        self.parts[name] = "sum", [value]

    def mean(self, name: str, total: Tensor, count: Tensor) -> None:
        self.parts[name] = "mean", [total, count]

    def extreme(self, kind: Literal["min", "max"], name: str, values: Tensor, mask: Tensor) -> None:
        """Over the values `[...]` of `mask`; infinite if there are none."""
        worst = math.inf if kind == "min" else -math.inf
        padded = torch.cat([torch.where(mask, values, worst).flatten(), values.new_full((1,), worst)])
        self.parts[name] = kind, [padded.amin() if kind == "min" else padded.amax()]

    def metrics(self, config: LossConfig, *, corrects: bool) -> Metrics:
        names = {name: kind for name, (kind, _) in self.parts.items()}
        ordered = [part for which in KINDS for kind, part in self.parts.values() if kind == which]
        return Metrics(torch.stack([n.double() for part in ordered for n in part]), names, config, corrects=corrects)


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
    entropy = torch.zeros_like(logprobs) if entropy is None else entropy
    drift = logprobs.new_zeros(()) if tokens.old_logprobs is None else tokens.old_logprobs - logprobs
    num_tokens, num_computed = loss_mask.sum(), computed.sum()
    num_sequences = num_tokens.new_full((), segments.num_sequences)
    found = _Collector()
    _loss_parts(found, entropy, terms, inputs, config)
    found.mean("entropy", _total(entropy, computed), num_computed)
    found.mean("approx_kl", _total((drift.exp() - drift - 1).expand_as(logprobs), computed), num_computed)
    found.extreme("min", "ratio/min", terms.ratio, computed)
    found.extreme("max", "ratio/max", terms.ratio, computed)
    found.mean("active_row_fraction", num_computed, num_tokens)
    found.sum("num_active_tokens", num_tokens)
    found.sum("num_sequences", num_sequences)
    finite = _finite(logprobs, entropy, terms, tokens)
    finite = finite if finite_states is None else finite & finite_states
    found.sum("bad_rows", (computed & ~_spared(finite, terms, tokens, config)).sum())
    if terms.kl is not None:
        found.mean("kl", _total(terms.kl, computed), num_tokens)

    # TRL counts sequences where the ratio is a sequence's own: one value each, whatever its mask.
    at_sequence = config.importance_sampling_level == "sequence" and not inputs.token_advantages
    lengths = segments.sum(loss_mask)

    def per_sequence(flag: Tensor) -> Tensor:
        """Share of each sequence's tokens that are flagged, `[S]`; NaN for empty sequences."""
        return segments.sum((flag & computed).to(logprobs.dtype)) / lengths

    def share(name: str, flag: Tensor) -> None:
        if at_sequence:
            found.mean(name, _total(per_sequence(flag).nan_to_num(nan=0.0), lengths > 0), num_sequences)
        else:
            found.mean(name, (flag & computed).double().sum(), num_tokens)

    record = config.record
    if record.clip == "two_sided":
        low, high = clipped(terms.clip_ratio, tokens.advantages, config)
        share("clip_ratio/low_mean", low)
        found.extreme("min", "clip_ratio/low_min", per_sequence(low), lengths > 0)
        share("clip_ratio/high_mean", high)
        found.extreme("max", "clip_ratio/high_max", per_sequence(high), lengths > 0)
        share("clip_ratio/region_mean", low | high)
    elif record.clip == "upper":
        share("cispo_clip_ratio", clipped(terms.ratio, tokens.advantages, config)[1])
    for name, over in record.metrics.items():
        noted = terms.noted[name]
        if over == "tokens":
            found.mean(name, _total(noted, computed), num_computed)
        else:
            found.mean(name, segments.mean(noted, computed).double().sum(), (segments.sum(computed) > 0).sum())
    _sampling_metrics(found, logprobs, terms, tokens, inputs, config)
    return found.metrics(config, corrects=tokens.sampling_logprobs is not None)


def _total(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).double().sum()


def _finite(logprobs: Tensor, entropy: Tensor, terms: Terms, tokens: Tokens) -> Tensor:
    """Whether all that is known of a token is finite, `[T]`."""
    numbers = [logprobs, entropy, terms.policy, terms.ratio, tokens.advantages]
    numbers += [n for n in (tokens.old_logprobs, tokens.ref_logprobs, terms.importance) if n is not None]
    finite = torch.stack([n.isfinite() for n in numbers]).all(0)
    if tokens.sampling_logprobs is not None:
        finite &= ~tokens.sampling_logprobs.isinf()  # NaN: not known
    return finite


def _spared(finite: Tensor, terms: Terms, tokens: Tokens, config: LossConfig) -> Tensor:
    """Whether no such number gets into a token's gradient: one ratio for a sequence spoils all of it."""
    spoils = ~finite
    if config.importance_sampling_level != "sequence" and config.record.couples != "sequence":
        if config.record.couples == "nothing":
            return finite
        # Only what is no number gets past the clamps.
        spoils = terms.ratio.isnan() if terms.importance is None else terms.ratio.isnan() | terms.importance.isnan()
    return finite & tokens.segments.spread(tokens.segments.sum(tokens.mask & spoils) == 0)


def _loss_parts(found: _Collector, entropy: Tensor, terms: Terms, inputs: TokenInputs, config: LossConfig) -> None:
    """The loss's two parts: as they are where the caller gave their denominators, else as means over ours."""
    tokens, nothing = inputs.tokens, inputs.weights.new_zeros(())
    weights = terms.entropy_weights.double()
    parts = {
        "terms": (
            (terms.policy.double() * inputs.weights.double()).sum(),
            None if inputs.normalizer_given else default_normalizer(config, tokens.mask, tokens.segments),
        ),
        "bonus": (
            torch.where(weights > 0, weights * entropy.double(), 0.0).sum(),
            None if tokens.bonus_count_given else (weights > 0).sum(),
        ),
    }
    for name, (value, count) in parts.items():
        found.sum(f"{name}_sum", value if count is None else nothing)
        mean = (nothing, nothing) if count is None else (value * count.clamp(min=1), count)
        found.mean(f"{name}_mean", *mean)


def _sampling_metrics(
    found: _Collector, logprobs: Tensor, terms: Terms, tokens: Tokens, inputs: TokenInputs, config: LossConfig
) -> None:
    """|old - sampling| and the importance weights, over tokens whose sampling log-probability is known.

    With `old_logprobs` these are known of every unmasked token, computed or not.
    """
    weight, old = terms.importance, logprobs
    if inputs.tokens.old_logprobs is not None:
        tokens, weight, old = inputs.tokens, inputs.tokens.importance, inputs.tokens.old_logprobs
    segments, mask, sampling = tokens.segments, tokens.mask, tokens.sampling_logprobs
    difference = torch.full_like(old, torch.nan) if sampling is None else (old - sampling).abs()
    known, name = mask & ~difference.isnan(), f"{SAMPLING}sampling_logp_difference"
    found.mean(f"{name}/mean", _total(difference, known), known.sum())
    found.extreme("max", f"{name}/max", difference, known)
    mode, name = config.importance_sampling_mode, f"{SAMPLING}importance_sampling_ratio"
    if mode is None or weight is None:
        return
    total, count = _total(weight, mask), mask.sum()
    if mode.startswith("sequence"):
        # One value a sequence; one without unmasked tokens counts, as TRL's does, with the weight of d = 0.
        empty = segments.sum(mask) == 0
        neutral = bounded_importance(weight.new_ones(1), mode, config)
        total = (segments.mean(weight, mask) + empty * neutral).double().sum()
        count = count.new_full((), empty.numel())
        weight, mask = torch.cat([weight, neutral.expand(empty.numel())]), torch.cat([mask, empty])
    found.extreme("min", f"{name}/min", weight, mask)
    found.mean(f"{name}/mean", total, count)
    found.extreme("max", f"{name}/max", weight, mask)
