"""The oracle: every objective from full logits and autograd, one sequence at a time, in the dtype of its inputs.

Made to be read and believed, not to be fast: feed it float64. It imports torch only and shares no code with what it
checks; `config` and `head` are any objects with the attributes of `LossConfig` and `HeadConfig`.

Legend: T packed tokens, H hidden size, V vocabulary, S sequences, B x L the padded layout (rows are sequences), N
completions, K rewards. p logprobs, o old, r = p - o, A advantages, w ratio, sg stop-gradient. Logs are natural (nats).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# -- logprobs ---------------------------------------------------------------------------------------------------------


def reference_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    head: Any = None,
    temperature: float | Tensor = 1.0,
    support: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution.

        z = softcap tanh(logit_scale (h W^T + b) / softcap) / temperature;    z_v = -inf for v outside of the support
        logp = z_y - log sum exp z,    entropy = - sum_v softmax(z)_v log softmax(z)_v    (0 log 0 = 0)

    Args:
        hidden: `[..., H]`.
        weight: `[V, H]`.
        targets: `[...]` integers in `[0, V)`.
        bias: `[V]` or None.
        head: an object with `logit_scale` and `softcap` (None: no cap), or None for the plain product.
        temperature: one for all, or `[...]`.
        support: an object with `token_ids` and `offsets`, the tokens of row t of the flattened targets being
            `token_ids[offsets[t] : offsets[t + 1]]` (none: all of V); or None, for all of V in every row.

    Returns:
        logprobs, entropy: `[...]` each, differentiable, nats; a target outside of its support has logprob -inf.
    """
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if head is not None:
        logits = head.logit_scale * logits
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    outside = None if support is None else _outside(support, logits)
    if outside is not None:
        logits = logits.masked_fill(outside, -math.inf)
    log_probabilities = torch.log_softmax(logits, dim=-1)
    finite = log_probabilities if outside is None else log_probabilities.masked_fill(outside, 0.0)
    entropy = -(log_probabilities.exp() * finite).sum(-1)
    return log_probabilities.gather(-1, targets.long()[..., None]).squeeze(-1), entropy


def _outside(support: Any, logits: Tensor) -> Tensor:
    """`[..., V]` bool: which tokens are not in the support of their row."""
    outside = torch.zeros_like(logits, dtype=torch.bool).reshape(-1, logits.shape[-1])
    for row, ids in enumerate(_ids_of_rows(support)):
        if ids.numel():
            outside[row] = True
            outside[row, ids.long()] = False
    return outside.reshape(logits.shape)


def _ids_of_rows(support: Any) -> list[Tensor]:
    return [support.token_ids[begin:end] for begin, end in pairwise(support.offsets.tolist())]


def _rows_of_support(support: Any, mask: Tensor) -> SimpleNamespace:
    """The support of the unmasked rows alone."""
    kept = [ids for ids, keep in zip(_ids_of_rows(support), mask.reshape(-1).tolist(), strict=True) if keep]
    sizes = torch.tensor([0, *(ids.numel() for ids in kept)])
    return SimpleNamespace(token_ids=torch.cat([support.token_ids[:0], *kept]), offsets=sizes.cumsum(0))


# -- the loss ---------------------------------------------------------------------------------------------------------


def reference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    config: Any,
    loss_mask: Tensor | None = None,
    bias: Tensor | None = None,
    head: Any = None,
    temperature: Tensor | None = None,
    support: Any = None,
    **options: Any,
) -> SimpleNamespace:
    """`reference_policy_loss` of `reference_logprobs`.

    Args:
        hidden: `[T, H]` with `cu_seqlens`, or `[B, L, H]`.
        targets: `[T]` or `[B, L]`; anything where masked.
        temperature: one a token; that of `config` if None.
        support: as in `reference_logprobs`, a row for every target, masked or not.
        options: `cu_seqlens`, the old, ref and sampling logprobs and the normalizers, as in `reference_policy_loss`.

    Returns:
        `.loss` 0-dim; `.logprobs`, `.entropy` of the shape of `targets`, 0 where masked.
    """
    mask = torch.ones_like(targets, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
    scale = config.temperature if temperature is None else temperature[mask]
    # Masked rows are left out, not multiplied by zero: they may hold anything.
    kept = None if support is None else _rows_of_support(support, mask)
    active = reference_logprobs(
        hidden[mask], weight, targets[mask], bias=bias, head=head, temperature=scale, support=kept
    )
    logprobs, entropy = (active[0].new_zeros(targets.shape).index_put((mask,), values) for values in active)
    loss = reference_policy_loss(logprobs, entropy, advantages, config=config, loss_mask=mask, **options)
    return SimpleNamespace(loss=loss, logprobs=logprobs, entropy=entropy)


def reference_policy_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    loss_mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    config: Any,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
) -> Tensor:
    """The loss of any objective from log-probabilities.

        term = policy term x off-policy mask x entropy mask x importance weight (not for vespo) + beta KL
        loss = aggregate(term over unmasked tokens) - entropy_coef mean(entropy over tokens in both masks)

    Args:
        logprobs, entropy, old_logprobs, ref_logprobs, sampling_logprobs: `[T]` with `cu_seqlens`, or `[B, L]`. Only the
            bonus and the entropy mask need `entropy`; `old_logprobs` None means sg(logprobs).
        advantages: one a sequence (`[S]`), or one a token (`[1, T]` where T may be S).
        normalizer: replaces the aggregation's denominator. entropy_normalizer: the number of tokens under the bonus.

    Returns:
        0-dim loss, differentiable in `logprobs` and `entropy`; a differentiable 0 where every token is masked.
    """
    mask = torch.ones_like(logprobs, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    if entropy is None and (config.entropy_coef != 0 or config.top_entropy_quantile < 1):
        raise ValueError("entropy: expected a tensor for entropy_coef and top_entropy_quantile; got None")
    threshold = None
    if entropy is not None and config.top_entropy_quantile < 1 and mask.any():
        threshold = torch.quantile(entropy[mask].detach(), 1 - config.top_entropy_quantile)

    zero = logprobs[:0].sum()  # it has a gradient, whatever the log-probabilities hold
    sums, lengths, bonus = [], [], []
    rows = _rows(logprobs, cu_seqlens)
    for index, row in enumerate(rows):
        active = mask[row]
        given = {"p": logprobs, "old": old_logprobs, "ref": ref_logprobs, "sampling": sampling_logprobs, "H": entropy}
        s = SimpleNamespace(**{name: None if v is None else v[row][active] for name, v in given.items()})
        per_token = advantages.dim() == 2 or advantages.numel() != len(rows)
        s.A = advantages.reshape(logprobs.shape)[row][active] if per_token else advantages[index].expand(s.p.shape)
        s.keep = torch.ones_like(active[active]) if threshold is None else s.H.ge(threshold)
        sums.append(_terms(s, config).sum() if s.p.numel() else zero)
        lengths.append(s.p.numel())
        if config.entropy_coef != 0:
            bonus.append(s.H[s.keep])

    loss = _aggregate(sums, lengths, config, normalizer) + zero
    if bonus:
        entropies = torch.cat(bonus)
        count = max(entropies.numel(), 1) if entropy_normalizer is None else entropy_normalizer
        loss = loss - config.entropy_coef * entropies.sum() / count
    return loss


def _rows(logprobs: Tensor, cu_seqlens: Tensor | None) -> list[Any]:
    """What to index a `[T]` or `[B, L]` tensor with, to get each sequence."""
    if cu_seqlens is None:
        return list(range(logprobs.shape[0])) if logprobs.dim() == 2 else [slice(None)]
    bounds = cu_seqlens.tolist()
    return [slice(begin, end) for begin, end in pairwise(bounds)]


def _aggregate(sums: list[Tensor], lengths: list[int], config: Any, normalizer: float | Tensor | None) -> Tensor:
    """The sums of the sequences' terms to one number."""
    denominator = max(sum(lengths), 1)
    if config.loss_type in ("grpo", "sapo", "gmpo"):
        sums = [total / max(length, 1) for total, length in zip(sums, lengths, strict=True)]
    if config.loss_type in ("grpo", "sapo", "gmpo", "luspo", "dr_grpo"):
        denominator = max(len(sums), 1) * (config.max_completion_length if config.loss_type == "dr_grpo" else 1)
    return sum(sums, torch.tensor(0.0)) / (denominator if normalizer is None else normalizer)


# -- one sequence, unmasked tokens only -------------------------------------------------------------------------------


def _terms(s: SimpleNamespace, config: Any) -> Tensor:
    """The terms of one sequence's unmasked tokens: policy term, masks, importance weight, KL, in that order."""
    s.r = s.p - s.old
    if config.importance_sampling_level == "token":
        s.log_w = s.r
    elif config.importance_sampling_level == "sequence":
        s.log_w = s.r.mean().expand(s.r.shape)
    else:
        s.log_w = s.p - s.p.detach() + s.r.mean().detach()
    s.w = s.log_w.exp()
    s.importance = _importance(s, config)

    term = _policy(s, config)
    if config.off_policy_mask_threshold is not None:
        drift = _difference(s.old if s.sampling is None else s.sampling, s.p.detach()).mean()
        term = term * ((s.A >= 0) | (drift <= config.off_policy_mask_threshold))
    term = term * s.keep
    if config.loss_type != "vespo":
        term = term * s.importance
    if config.beta != 0:
        kl = _kl(s, config.kl_estimator)
        term = term + config.beta * (kl * s.w if config.use_bias_correction_kl else kl)
    return term


def _difference(left: Tensor, right: Tensor) -> Tensor:
    """left - right, 0 where a log-probability is unknown (NaN)."""
    difference = left - right
    return torch.where(difference.isnan(), torch.zeros_like(difference), difference)


def _kl(s: SimpleNamespace, estimator: str) -> Tensor:
    """KL(current || reference), estimated per token."""
    if estimator == "k1":
        return s.p - s.ref
    if estimator == "k2":
        return 0.5 * (s.p - s.ref) ** 2
    return torch.exp(s.ref - s.p) - 1 - (s.ref - s.p)


def _importance(s: SimpleNamespace, config: Any) -> Tensor:
    """Train/inference correction e^d, per token or of the whole sequence, truncated to or masked by its bounds."""
    if config.importance_sampling_mode is None:
        return torch.ones_like(s.p)
    level, action = config.importance_sampling_mode.split("_")
    d = _difference(s.old, s.sampling).detach()
    weight = torch.exp(d if level == "token" else d.sum().expand(d.shape))
    low = 0.0 if config.importance_sampling_clip_min is None else config.importance_sampling_clip_min
    high = math.inf if config.importance_sampling_clip_max is None else config.importance_sampling_clip_max
    if action == "truncate":
        return _limit(weight, low, high)
    return torch.where((weight >= low) & (weight <= high), weight, torch.zeros_like(weight))


def _policy(s: SimpleNamespace, config: Any) -> Tensor:
    """The per-token policy term of the loss type."""
    low = config.epsilon
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    kind = config.loss_type
    if kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "ppo_dual"):
        capped = _limit(s.w, high=math.inf if config.delta is None else config.delta)
        gain = torch.minimum(capped * s.A, _limit(s.w, 1 - low, 1 + high) * s.A)
        if kind == "ppo_dual":
            gain = torch.where(s.A < 0, torch.maximum(gain, config.dual_clip * s.A), gain)
        return -gain
    if kind == "cispo":
        return -_limit(s.w, high=high).detach() * s.A * s.p
    if kind == "sapo":
        tau = _by_sign(s.A > 0, config.sapo_temperature_pos, config.sapo_temperature_neg, like=s.p)
        return -s.A * torch.sigmoid(tau * (s.w - 1)) * 4 / tau
    if kind == "vespo":
        return -_vespo_phi(s, config).detach() * s.A * s.p
    if kind == "gmpo":
        advantage = s.A.mean()  # a sequence's, even where advantages come per token
        r = s.r
        if advantage > 0:
            r = _limit(r, high=math.log(1 + high))
        elif advantage < 0:
            r = _limit(r, low=math.log(1 - low) if low < 1 else -math.inf)
        return (-advantage * r.mean().exp()).expand(s.p.shape)
    if kind == "dppo":
        behaviour = s.old if s.sampling is None else s.sampling
        gap = _difference(s.p.detach().exp(), behaviour.exp())
        limit = config.dppo_threshold
        drop = ((gap > limit) & (s.A > 0)) | ((gap < -limit) & (s.A <= 0))
        return -s.A * s.w * ~drop + config.dppo_log_ratio_coef * s.log_w**2
    if kind in ("reinforce", "rloo"):
        return -s.A * s.p
    raise ValueError(f"loss_type: expected a member of the GRPO family; got {kind!r}")


def _limit(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """`x` within [low, high]; its gradient is 1 up to and on the bounds, 0 beyond (torch's clamp: by version)."""
    return torch.where((x < low) | (x > high), x.detach().clamp(low, high), x)


def _by_sign(condition: Tensor, positive: float, negative: float, *, like: Tensor) -> Tensor:
    """`positive` where the condition holds, else `negative`, in the dtype of `like`."""
    return torch.where(condition, torch.full_like(like, positive), torch.full_like(like, negative))


def _vespo_phi(s: SimpleNamespace, config: Any) -> Tensor:
    """exp(lambda + k log W - lambda W), W the sequence's ratio to the policy that sampled."""
    floor = math.log(1e-8)
    log_w = _limit(s.r, -20, 20).sum() + _limit(s.importance.log(), floor, 20).sum()
    log_w = _limit(log_w, floor, 20)
    k = _by_sign(s.A >= 0, config.vespo_k_pos, config.vespo_k_neg, like=s.p)
    rate = _limit(_by_sign(s.A >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg, like=s.p), low=1e-4)
    return torch.exp(rate + k * log_w - rate * log_w.exp())


# -- advantages -------------------------------------------------------------------------------------------------------


def reference_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Iterable[Any] | None = None,
    scale: str = "group",
    weights: Sequence[float] | Tensor | None = None,
    aggregation: str = "sum_then_normalize",
) -> Tensor:
    """Advantages of completions against their group; deviations are unbiased, and 1e-4 is added to them.

        group: (R - mean) / (std + 1e-4)      batch: (R - group mean) / (std of all + 1e-4)
        none:  R - group mean                 leave_one_out: R - mean of the others of the group

    Args:
        rewards: `[N]` or `[N, K]`, NaN where a reward was not given.
        group_size: consecutive completions a group; or `group_ids`, `[N]` labels.
        weights: `[K]`, 1 by default.
        aggregation: `sum_then_normalize`, or `normalize_then_sum` (GDPO: z-scores of each reward in its group, weighted
            sum, z-score over the batch; `scale` plays no part).

    Returns:
        `[N]`; 0 where every reward is missing, and in groups of one.
    """
    table = rewards[:, None] if rewards.dim() == 1 else rewards
    weight = table.new_ones(table.shape[1]) if weights is None else torch.as_tensor(weights).to(table)
    if group_size is not None:
        labels: list[Any] = [n // group_size for n in range(len(table))]
    else:
        labels = group_ids.tolist() if isinstance(group_ids, Tensor) else list(group_ids or [])
    if len(labels) != len(table):
        raise ValueError(f"group_ids: expected {len(table)} labels (or a group_size); got {len(labels)}")
    groups = [[n for n, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)]

    if aggregation == "normalize_then_sum":
        scores = torch.zeros_like(table)
        for members in groups:
            for k in range(table.shape[1]):
                scores[members, k] = _z_score(table[members, k])
        total = (torch.where(scores.isnan(), torch.zeros_like(scores), scores) * weight).sum(1)
        total[table.isnan().all(1)] = torch.nan
        advantages = _z_score(total)
    else:
        total = (torch.where(table.isnan(), torch.zeros_like(table), table) * weight).sum(1)
        total[table.isnan().all(1)] = torch.nan
        advantages = torch.zeros_like(total)
        for members in groups:
            advantages[members] = _centred(total[members], leave_one_out=scale == "leave_one_out")
            if scale == "group":
                advantages[members] /= _deviation(total[members]) + 1e-4
        if scale == "batch":
            advantages /= _deviation(total) + 1e-4
    return torch.where(advantages.isnan(), torch.zeros_like(advantages), advantages)


def _centred(values: Tensor, *, leave_one_out: bool = False) -> Tensor:
    """Values minus the mean of the known ones (or of the other known ones); 0 where there is no other."""
    known = values[~values.isnan()]
    if known.numel() <= 1:
        return values * 0
    if leave_one_out:
        return values - (known.sum() - values) / (known.numel() - 1)
    return values - known.mean()


def _deviation(values: Tensor) -> Tensor:
    """Unbiased standard deviation of the known values; 0 for fewer than two."""
    known = values[~values.isnan()]
    return known.std(correction=1) if known.numel() > 1 else values.new_zeros(())


def _z_score(values: Tensor) -> Tensor:
    return _centred(values) / (_deviation(values) + 1e-4)
