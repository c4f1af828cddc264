"""From log-probabilities to the loss: ratio, corrections and masks around a loss's term, its weights and its sum.

Legend: T packed tokens, S sequences. p `logprobs` of the current policy, o `old_logprobs`, r = p - o, A `advantages`,
w the ratio at the configured level, sg stop-gradient, m mask, L_s unmasked tokens of sequence s, C
`max_completion_length`. All tensors are `[T]` float32 (float64 in, float64 out) unless said otherwise; logs are nats.

The loss is  sum_t weight_t * term_t  -  entropy_coef * mean entropy.  The order within a term (TRL 1.16's): policy term
(`grpo_fast.losses`) x off-policy mask x entropy mask x importance weight (unless the term reads it), then + beta * KL.
Weights depend on masks only. Derivatives are left to autograd: everything here is O(T).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.losses import LOSSES, Loss, Segments, TermInputs, clamp
from grpo_fast.packing import offsets_of


@dataclass
class Tokens:
    """What is known of the tokens before the current policy is asked. Masked positions hold harmless zeros.

    Attributes:
        advantages: `[T]`.
        mask: `[T]` bool, the tokens that carry loss.
        segments: the sequences of the tokens.
        bonus_count: 0-dim, what the sum of entropies is divided by in the bonus: the unmasked tokens of the whole call
            (these may be a part of it), at least 1; or the caller's `entropy_normalizer`, if `bonus_count_given`.
        old_logprobs, ref_logprobs, sampling_logprobs: `[T]` or None. NaN in `sampling_logprobs` means not known.
        importance: `[T]` weights of the train/inference correction where they are known beforehand.
        quantile_group: ranks whose tokens the entropy quantile spans; None: the default group, if there is one.
    """

    advantages: Tensor
    mask: Tensor
    segments: Segments
    bonus_count: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampling_logprobs: Tensor | None = None
    importance: Tensor | None = None
    bonus_count_given: bool = False
    quantile_group: torch.distributed.ProcessGroup | None = None

    def optional(self, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """`function` of each optional `[T]` tensor, by name; None stays None."""
        names = ("old_logprobs", "ref_logprobs", "sampling_logprobs", "importance")
        return {n: None if getattr(self, n) is None else function(getattr(self, n)) for n in names}

    def masked(self, mask: Tensor) -> Tokens:
        """Only those of `mask` `[T]` unmasked; the rest must not reach an exponential."""
        return replace(self, mask=mask, **self.optional(lambda values: torch.where(mask, values, 0.0)))

    def to_wire(self) -> list[Tensor | None]:
        """The tokens as an operator's argument; what spans more than a sequence stays behind."""
        known = (self.advantages, self.mask, self.segments.cu_seqlens, self.bonus_count)
        return [*known, *self.optional(lambda values: values).values()]

    @staticmethod
    def from_wire(tensors: Sequence[Tensor | None]) -> Tokens:
        """What `to_wire` was asked of."""
        advantages, mask, cu_seqlens, bonus_count = (tensor for tensor in tensors[:4] if tensor is not None)
        old, ref, sampling, importance = tensors[4:]
        segments = Segments(cu_seqlens, mask.numel())
        return Tokens(advantages, mask, segments, bonus_count, old, ref, sampling, importance)

    def rows(self, rows: Tensor, row_counts: list[int] | None) -> Tokens:
        """The tokens `rows` `[n]`, the unmasked ones.

        Args:
            row_counts: how many each sequence has, if sequences matter; otherwise the result's are not to be used.
        """
        segments = self.segments
        if row_counts is not None:
            segments = Segments(offsets_of(segments.sum(self.mask)), rows.numel())
        return replace(
            self,
            advantages=self.advantages[rows],
            mask=torch.ones_like(rows, dtype=torch.bool),
            segments=segments,
            **self.optional(lambda values: values[rows]),
        )

    def part(self, start: int, stop: int, row_counts: list[int] | None) -> Tokens:
        """Views of tokens `start:stop`; whole sequences, as `row_counts` (of all of them) says, if sequences matter."""
        segments = self.segments
        if row_counts is not None:
            ends = list(accumulate(row_counts))
            first, last = bisect_right(ends, start), bisect_right(ends, stop)
            segments = Segments(segments.cu_seqlens[first : last + 1] - start, stop - start)
        return replace(
            self,
            advantages=self.advantages[start:stop],
            mask=self.mask[start:stop],
            segments=segments,
            **self.optional(lambda values: values[start:stop]),
        )


@dataclass
class Terms:
    """What `objective` says of every token.

    Attributes:
        policy: `[T]` per-token term, 0 where masked; the loss is its weighted sum minus the bonus.
        entropy_weights: `[T]` non-negative, sums to one over the tokens the entropy bonus acts on.
        ratio: `[T]` the ratio w at the configured level, before `delta`.
        clip_ratio: `[T]` the ratio after `delta`, from which TRL counts clipped tokens.
        kl: `[T]` KL to the reference, or None.
        importance: `[T]` importance weight of the train/inference correction, or None.
        noted: `[T]` quantities by the names of the loss's metrics.
    """

    policy: Tensor
    entropy_weights: Tensor
    ratio: Tensor
    clip_ratio: Tensor
    kl: Tensor | None
    importance: Tensor | None
    noted: dict[str, Tensor]


Scope = Literal["row", "sequence", "batch"]
"""A token's own, those of its sequence, or all."""


# -- which rows an objective couples --------------------------------------------------------------------------------


def slope_scope(config: LossConfig, *, has_old: bool) -> Scope:
    """Whose current log-probabilities a token's slopes depend on."""
    if config.top_entropy_quantile < 1.0:
        return "batch"
    sequence_correction = (config.importance_sampling_mode or "").startswith("sequence") and not has_old
    couples = (
        config.importance_sampling_level != "token"
        or config.record.couples != "nothing"
        or config.off_policy_mask_threshold is not None
        or sequence_correction
    )
    return "sequence" if couples else "row"


def reads_sampling(config: LossConfig) -> bool:
    """Whether the loss looks at `sampling_logprobs`; it runs without them unless a correction asks for them."""
    return (
        config.importance_sampling_mode is not None
        or config.off_policy_mask_threshold is not None
        or "sampling_logprobs" in config.record.reads
    )


def needs_every_row(config: LossConfig) -> bool:
    """Whether a token with zero advantage can still have a gradient, or its statistics are needed by others."""
    return (
        config.beta != 0
        or config.entropy_coef != 0
        or config.record.beside_advantage is not None
        or config.top_entropy_quantile < 1.0
        or config.all_token_metrics
    )


def slope_beside_advantage(config: LossConfig) -> float:
    """The weight of what does not multiply the advantage: the KL, and a regulariser in the loss's own term."""
    name = config.record.beside_advantage
    return config.beta + (0.0 if name is None else config.parameter(name))


# -- the ratio, the corrections and the masks -----------------------------------------------------------------------


def log_importance_ratio(log_ratio: Tensor, logprobs: Tensor, tokens: Tokens, level: str) -> Tensor:
    """log w: `token` r_t; `sequence` mean of r; `sequence_token` p - sg(p) + sg(mean of r)."""
    if level == "token":
        return log_ratio
    mean = tokens.segments.mean(log_ratio, tokens.mask)
    if level == "sequence":
        return tokens.segments.spread(mean)
    return logprobs - logprobs.detach() + tokens.segments.spread(mean.detach())


def importance_weight(old_logprobs: Tensor, tokens: Tokens, config: LossConfig) -> Tensor | None:
    """Train/inference correction e^d, d = o - sampling per token or summed over the sequence; truncated or masked.

    An unknown (NaN) sampling log-probability counts as d = 0.
    """
    mode = config.importance_sampling_mode
    if mode is None or tokens.sampling_logprobs is None:
        return None
    difference = torch.where(tokens.mask, old_logprobs - tokens.sampling_logprobs, 0.0).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        difference = tokens.segments.spread(tokens.segments.sum(difference))
    return bounded_importance(difference.exp(), mode, config)


def bounded_importance(weight: Tensor, mode: str, config: LossConfig) -> Tensor:
    """`*_truncate`: clamp to [clip_min, clip_max]; `*_mask`: zero outside."""
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if mode.endswith("truncate"):
        return clamp(weight, low, high)
    outside = (weight < (-math.inf if low is None else low)) | (weight > (math.inf if high is None else high))
    return weight.masked_fill(outside, 0.0)


def off_policy_mask(logprobs: Tensor, behaviour: Tensor, tokens: Tokens, threshold: float) -> Tensor:
    """Keep a sequence if A >= 0 or its mean of (behaviour - p) is at most `threshold`. `[T]` bool."""
    sequence_drift = tokens.segments.spread(tokens.segments.mean(behaviour - logprobs, tokens.mask))
    return (tokens.advantages >= 0) | (sequence_drift <= threshold)


def high_entropy_mask(
    entropy: Tensor, mask: Tensor, quantile: float, group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """Keep unmasked tokens whose entropy reaches the (1 - quantile) quantile over the ranks of `group`. `[T]` bool."""
    # Masked tokens last; everything stays on the device (and torch.quantile refuses more than 2^24 values).
    values = torch.where(mask, entropy, torch.inf)
    if _num_ranks(group) > 1:
        values = _gather_ranks(values, group)
    count = (values < torch.inf).sum()
    ordered = torch.cat([values, values.new_full((1,), torch.inf)]).sort().values
    position = (1.0 - quantile) * (count - 1).clamp(min=0).double()
    lower, upper = ordered.gather(0, torch.stack([position.floor(), position.ceil()]).long())
    threshold = torch.lerp(lower, upper, (position - position.floor()).to(lower.dtype))
    return (entropy >= threshold) & mask


def _num_ranks(group: torch.distributed.ProcessGroup | None) -> int:
    """Ranks of a group (None: of the default one); 1 where nothing is distributed."""
    distributed = torch.distributed
    return distributed.get_world_size(group) if distributed.is_available() and distributed.is_initialized() else 1


def _gather_ranks(values: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """`values` of every rank of the group (None: the default one), concatenated; ranks may hold different numbers."""
    distributed, num_ranks = torch.distributed, _num_ranks(group)
    count = torch.tensor([values.numel()], device=values.device)
    counts = [torch.zeros_like(count) for _ in range(num_ranks)]
    distributed.all_gather(counts, count, group=group)
    sizes = [int(c) for c in counts]
    padded = values.new_zeros(max(sizes))
    padded[: values.numel()] = values
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(current || reference) per token: k1, k2 or k3 (Schulman, 2020)."""
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.exp() - difference - 1


# -- the whole term -------------------------------------------------------------------------------------------------


def objective(logprobs: Tensor, entropy: Tensor | None, tokens: Tokens, config: LossConfig) -> Terms:
    """Per-token terms of the configured objective, differentiable in `logprobs`.

    Args:
        logprobs: `[T]` current log-probabilities; masked positions must be finite.
        entropy: `[T]`, needed for `top_entropy_quantile` < 1 (only compared) and by the caller for the bonus.
        tokens: everything else about the tokens.
        config: the objective.
    """
    old = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = logprobs - old
    log_w = log_importance_ratio(log_ratio, logprobs, tokens, config.importance_sampling_level)
    ratio = log_w.exp()
    importance = importance_weight(old.detach(), tokens, config) if tokens.importance is None else tokens.importance
    record = config.record
    of_tokens = (tokens.advantages, tokens.mask, tokens.segments, tokens.old_logprobs, tokens.sampling_logprobs)
    inputs = TermInputs(logprobs, log_ratio, log_w, ratio, importance, *of_tokens, config)

    policy = _checked(record.term(inputs), inputs, record)
    if config.off_policy_mask_threshold is not None:
        kept = off_policy_mask(logprobs.detach(), inputs.behaviour_logprobs, tokens, config.off_policy_mask_threshold)
        policy = torch.where(kept, policy, 0.0)
    bonus_mask, bonus_count = tokens.mask, tokens.bonus_count
    if config.top_entropy_quantile < 1.0:
        assert entropy is not None
        quantile = config.top_entropy_quantile
        bonus_mask = high_entropy_mask(entropy.detach(), tokens.mask, quantile, tokens.quantile_group)
        if not tokens.bonus_count_given:
            bonus_count = bonus_mask.sum().clamp(min=1)
        policy = torch.where(bonus_mask, policy, 0.0)
    if importance is not None and "importance" not in record.reads:
        policy = policy * importance

    kl = None
    if config.beta != 0.0:
        assert tokens.ref_logprobs is not None
        kl = kl_divergence(logprobs, tokens.ref_logprobs, config.kl_estimator)
        if config.use_bias_correction_kl:
            kl = kl * ratio
        policy = policy + config.beta * kl
    if logprobs.requires_grad and torch.is_grad_enabled() and not policy.requires_grad:
        raise ValueError(f"{record.name}: expected a term that depends on the log-probabilities; got one detached")
    return Terms(
        policy=torch.where(tokens.mask, policy, 0.0),
        entropy_weights=bonus_mask.to(logprobs.dtype) / bonus_count,
        ratio=ratio.detach(),
        clip_ratio=inputs.capped_ratio.detach(),
        kl=None if kl is None else kl.detach(),
        importance=importance,
        noted=inputs.noted,
    )


def _checked(term: object, inputs: TermInputs, record: Loss) -> Tensor:
    """What a record's term returned, if it is a term and notes what the record says."""

    def form(value: object) -> str:
        return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    if form(term) != form(inputs.logprobs) or inputs.noted.keys() != record.metrics.keys():
        expected = f"a term {form(inputs.logprobs)} that notes {list(record.metrics)}"
        raise ValueError(f"{record.name}: expected {expected}; got {form(term)} and {list(inputs.noted)}")
    assert isinstance(term, Tensor)
    return term


def total_loss(terms: Terms, entropy: Tensor | None, weights: Tensor, config: LossConfig) -> Tensor:
    """sum_t weight_t term_t - entropy_coef sum_t entropy_weight_t entropy_t; 0-dim."""
    loss = (terms.policy * weights).sum()
    if config.entropy_coef != 0.0:
        assert entropy is not None
        loss = loss - config.entropy_coef * (terms.entropy_weights * entropy).sum()
    return loss


# -- weights ----------------------------------------------------------------------------------------------------------


def aggregation_name(config: LossConfig) -> str:
    """What is summed or averaged over what: "sequence_mean", "sequence_sum" or "token_mean"."""
    aggregation = config.record.aggregation
    return "sequence_sum" if aggregation == "constant_length" else aggregation


def default_normalizer(config: LossConfig, mask: Tensor, segments: Segments) -> Tensor:
    """The denominator that `normalizer` replaces, where it is at least 1: S, sum of m, or S * C. 0-dim."""
    if config.record.aggregation == "token_mean":
        return mask.sum()
    denominator = segments.num_sequences * sequence_share(config)
    return torch.full((), denominator, device=mask.device)  # a fill: copying a number over would wait for a GPU


def sequence_share(config: LossConfig) -> int:
    """What one sequence adds to a denominator that counts sequences: 1, or C."""
    length = config.max_completion_length if config.record.aggregation == "constant_length" else 1
    assert length is not None
    return length


def token_weights(
    config: LossConfig, mask: Tensor, segments: Segments, normalizer: Tensor | float | None, dtype: torch.dtype
) -> Tensor:
    """Weight of each token's term in the loss, `[T]`, 0 where masked.

    - sequence_mean: m / (max(L_s, 1) S), the mean over sequences of the mean over tokens
    - sequence_sum: m / S
    - constant_length: m / (S C)
    - token_mean: m / max(sum of m, 1)

    Args:
        mask: `[T]` bool.
        normalizer: replaces the last denominator (S, S C or sum of m): the whole optimiser step's count where the
            step is split into micro-batches.
    """
    if normalizer is None:
        normalizer = default_normalizer(config, mask, segments).clamp(min=1)
    weights = mask.to(dtype) / normalizer
    if config.record.aggregation == "sequence_mean":
        lengths = segments.sum(mask).clamp(min=1).to(dtype)
        weights = weights / segments.spread(lengths)
    return weights


# -- derivatives, for rows whose kernels do not know the objective ----------------------------------------------------


@contextmanager
def _autograd_inside_operator() -> Iterator[None]:
    """Record a graph inside a custom operator, which runs below autograd: the dispatcher hides it from there."""
    keys = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        yield


def objective_slopes(
    logprobs: Tensor, entropy: Tensor, tokens: Tokens, weights: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor | None]:
    """(d loss / d logprobs, d loss / d entropy or None) `[R]`, by autograd through the objective's formula."""
    with _autograd_inside_operator():
        logprobs = logprobs.detach().requires_grad_()
        entropy = entropy.detach().requires_grad_(config.entropy_coef != 0)
        terms = objective(logprobs, entropy, tokens, config)
        loss = total_loss(terms, entropy, weights, config)
        inputs = [logprobs] + [entropy] * entropy.requires_grad
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return grads[0], grads[1] if entropy.requires_grad else None


# -- token-local objectives in the kernels' terms ---------------------------------------------------------------------


_KERNEL_PARAMETERS = tuple(p.name for loss in LOSSES.values() if loss.kernel is not None for p in loss.parameters)


class KernelObjective(NamedTuple):
    """A token-local objective: what is compiled, and numbers by name (a bound that is not there is infinite).

    What a trainer changes from call to call (the bonus's weight and count) is not among it, so that few of these live.
    `correction`, the train/inference weight: "none", "weight" (known beforehand), "token_truncate" or "token_mask".
    """

    policy: str
    kl: str
    kl_times_ratio: bool
    correction: str
    parameters: tuple[tuple[str, float], ...]


def kernel_objective(config: LossConfig, tokens: Tokens) -> KernelObjective | None:
    """The objective of tokens like these; None if it couples them or if no kernel has its term."""
    if config.record.kernel is None or slope_scope(config, has_old=tokens.old_logprobs is not None) != "row":
        return None
    mode = None if tokens.sampling_logprobs is None else config.importance_sampling_mode
    correction = "weight" if tokens.importance is not None else mode or "none"
    return _kernel_objective(config.record.kernel, config.key, correction)


@lru_cache(maxsize=64)
def _kernel_objective(policy: str, key: str, correction: str) -> KernelObjective:
    config = LossConfig.from_key(key)
    low, high, delta = config.importance_sampling_clip_min, config.importance_sampling_clip_max, config.delta
    parameters = {
        "clip_low": 1.0 - config.epsilon,
        "clip_high": 1.0 + config.upper_epsilon,
        "clip_bound": config.upper_epsilon,
        "delta": math.inf if delta is None else delta,
        "beta": config.beta,
        "importance_min": -math.inf if low is None else low,
        "importance_max": math.inf if high is None else high,
    }
    parameters |= {name: getattr(config, name) for name in _KERNEL_PARAMETERS}
    return KernelObjective(
        policy=policy,
        kl=config.kl_estimator if config.beta else "none",
        kl_times_ratio=config.use_bias_correction_kl,
        correction=correction,
        parameters=tuple(parameters.items()),
    )
