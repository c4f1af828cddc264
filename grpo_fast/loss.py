"""GRPO losses straight from hidden states and the LM head: `grpo_loss`, `token_logprobs`, `policy_loss`.

Legend: T packed tokens, S sequences, H hidden size, V vocabulary. `hidden[t]` is the state that predicts `targets[t]`
(the caller has shifted). No `[T, V]` tensor exists at any time.

    z_t = softcap(logit_scale (hidden_t W^T + b)) / temperature        logprob_t = z_t[y_t] - log sum_v exp z_tv
    loss = sum_t weight_t term_t(logprob_t, old_t, ref_t, sampling_t, A_t) - entropy_coef * mean entropy

All of them are also `grpo_fast.grpo_loss` and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_fast.backends.base import BackendName, get_backend, resolve_backend
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.head import Head
from grpo_fast.inputs import (
    TokenInputs,
    check_config,
    check_floating,
    check_main_grad,
    check_target_range,
    check_targets,
    check_temperature,
    check_tensor,
    check_whole_number,
    head_operands,
    split_head,
    token_inputs,
    token_mask,
)
from grpo_fast.metrics import Metrics, collect_metrics
from grpo_fast.objectives import Terms, objective, total_loss
from grpo_fast.ops.call import ActiveRows, HeadCall, PlanName
from grpo_fast.ops.operators import head_logprobs, head_objective, with_gradients
from grpo_fast.packing import Support, check_support

__all__ = [
    "HeadConfig",
    "LossConfig",
    "LossOutput",
    "Metrics",
    "TokenLogprobs",
    "grpo_loss",
    "policy_loss",
    "token_logprobs",
]


@dataclass
class LossOutput:
    """What `grpo_loss` and `policy_loss` return.

    Attributes:
        loss: 0-dim float32, differentiable.
        logprobs: of the current policy, in the shape of `targets`, float32, detached; 0 where not computed.
        entropy: the same, in nats (None from `policy_loss` without entropy).
        metrics: partial sums on the device; `metrics.as_dict()` waits for the device once.
        computed: bool, which tokens were computed: masked ones are not, nor those known to have no gradient unless
            `LossConfig.all_token_metrics` asks for them.
        plan, backend: what ran.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    metrics: Metrics
    computed: Tensor
    plan: str = "none"
    backend: str = "none"


@dataclass
class TokenLogprobs:
    """What `token_logprobs` returns: `logprobs` and `entropy` (None unless asked for), float32, in nats."""

    logprobs: Tensor
    entropy: Tensor | None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor | Head | None,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    head: HeadConfig | Head | None = None,
    temperature: float | Tensor | None = None,
    config: LossConfig | None = None,
    entropy: bool = True,
    loss_mask: Tensor | None = None,
    support: Support | None = None,
    ignore_index: int | None = -100,
    main_grad: Tensor | None = None,
    backend: BackendName = "auto",
    plan: PlanName = "auto",
    workspace_bytes: int | None = None,
) -> TokenLogprobs:
    """Log-probabilities of `targets` and entropies, without logits in memory.

        logprob_t = z_t[y_t] - log sum_v exp z_tv          entropy_t = -sum_v p_tv log p_tv

    Differentiable in hidden, weight and bias through both results. Without gradients (old and reference policies) only
    the logits product is done and nothing is kept.

    Args:
        hidden: `[..., H]`, float32, bfloat16, float16 (or float64).
        weight: `[V, H]`, hidden's dtype; or a `Head` (`head_of(model)`), which stands for weight, bias and config.
        targets: `[...]` int64, in [0, V); anything on masked positions.
        bias: `[V]`.
        head: scale and soft cap; or a `Head`, with `weight` None.
        temperature: a float, or one a row `[...]`; 1 if neither it nor `config` is given.
        config: the loss that the log-probabilities are for: its temperature is taken, so that ratios start at 1.
        entropy: whether to return entropies.
        loss_mask: `[...]` bool, integers, or zeros and ones; rows where it is 0 are not computed: their results are 0.
        support: the tokens that each target was sampled from, rows as in `targets`, flattened: then sums are over them
            alone, and rows of few tokens cost as many dot products. Give old, current and reference passes the same.
        ignore_index: targets that are masked; None: none is.
        main_grad: `[V, H]` float32; the weight's gradient is added to it instead of being returned.
        backend: "auto" or a backend's name. plan: "auto", "frozen_head", "recompute", "lean",
            or without gradients "fused_forward".
        workspace_bytes: cap on temporary memory; default a sixteenth of a GPU's memory (512 MiB to 4 GiB), elsewhere
            256 MiB.

    Raises:
        ValueError: an argument is malformed, `temperature` is not that of `config`, or the plan or backend cannot serve
            the call.
    """
    check_whole_number("workspace_bytes", workspace_bytes)
    weight, bias, head = split_head(weight, bias, head)
    hidden, weight, bias = head_operands(hidden, weight, bias)
    shape = hidden.shape[:-1]
    check_targets(targets, shape, hidden.device)
    temperature = _one_temperature(temperature, config)
    check_temperature(temperature, shape, hidden.device)
    check_main_grad(main_grad, weight)
    engine = resolve_backend(backend, hidden.device, hidden.dtype)
    mask, masked = token_mask(loss_mask, targets, ignore_index, shape, hidden)
    check_target_range(targets.reshape(-1), mask if masked else None, weight.shape[0])
    if support is not None:
        check_support(support, targets, mask if masked else None)
    active = ActiveRows(mask) if masked else None
    call = HeadCall.of(hidden, weight, bias, targets, temperature, head, active, engine, workspace_bytes, support)
    logprobs, entropies = head_logprobs(call.planned(plan, scope="batch"), main_grad)
    return TokenLogprobs(logprobs.reshape(shape), entropies.reshape(shape) if entropy else None)


def sparse_limit(weight: Tensor, backend: BackendName = "auto") -> int:
    """Tokens of the largest support whose row costs as many dot products, and none with the whole `weight` `[V, H]`.

    Raises:
        ValueError: unknown backend, or one that does not run on the weight's device.
    """
    engine = get_backend(resolve_backend(backend, weight.device, weight.dtype))
    return engine.sparse_limit(weight.shape[0], weight.dtype, weight.device)


def _one_temperature(temperature: float | Tensor | None, config: LossConfig | None) -> float | Tensor:
    """The temperature, given directly or as that of a loss, or both if they agree."""
    if config is None:
        return 1.0 if temperature is None else temperature
    check_config(config)
    if isinstance(temperature, (int, float)) and temperature != config.temperature:
        raise ValueError(f"temperature: expected that of config, {config.temperature}, or None; got {temperature}")
    return config.temperature if temperature is None else temperature


def grpo_loss(
    hidden: Tensor,
    weight: Tensor | Head | None,
    targets: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    loss_mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    support: Support | None = None,
    bias: Tensor | None = None,
    head: HeadConfig | Head | None = None,
    config: LossConfig = LossConfig(),
    normalizer: Tensor | float | None = None,
    entropy_normalizer: Tensor | float | None = None,
    ignore_index: int | None = -100,
    temperature: Tensor | None = None,
    main_grad: Tensor | None = None,
    quantile_group: torch.distributed.ProcessGroup | None = None,
    backend: BackendName = "auto",
    plan: PlanName = "auto",
    workspace_bytes: int | None = None,
) -> LossOutput:
    """A loss of the GRPO family, from the last hidden states.

        loss = sum_t weight_t term_t - entropy_coef * mean entropy        (`losses.py`, `objectives.py`)

    Args:
        hidden: `[T, H]` with sequences one after another, or `[B, L, H]` padded (rows are sequences).
        weight: `[V, H]`, hidden's dtype; or a `Head` (`head_of(model)`), which stands for weight, bias and config.
        targets: `[T]` or `[B, L]` int64; anything on masked positions.
        advantages: one a sequence, `[S]` or `[S, 1]`, or one a token, `[T]` or `[1, T]` (padded: `[B]`, `[B, 1]` or
            `[B, L]`). Where S is T and sequences are not of one token each, only the second form says which.
        cu_seqlens: `[S+1]` int, packed layout; None there means one sequence.
        loss_mask: bool, integers, or zeros and ones, in the shape of targets; None: all tokens.
        old_logprobs: of the policy that the ratio is taken to; None: the current one (ratio 1, with gradient).
        ref_logprobs: of the reference policy; needed iff `config.beta` is not 0.
        sampling_logprobs: the rollout engine's own; NaN where it does not know.
        support: the tokens that each target was sampled from, rows as in `targets`, flattened: log-probabilities,
            entropies and gradients are those of the distribution on them (`packing.Support`). old_logprobs and
            ref_logprobs must be on the same supports.
        bias: `[V]`. head: scale and soft cap; or a `Head`, with `weight` None.
        normalizer: replaces the loss type's denominator (S, S C or the number of tokens) of the terms.
        entropy_normalizer: replaces the number of active tokens under the entropy bonus. With both, the losses and
            gradients of micro-batches add up to those of the whole step.
        ignore_index: targets that are masked. None: none is, which saves a GPU's host the wait to count them.
        temperature: one a token, in the shape of targets; replaces `config.temperature`.
        main_grad: `[V, H]` float32; the weight's gradient is added to it (possibly already in the forward), so
            call backward exactly once, with gradient 1.
        quantile_group: ranks whose tokens the quantile of `config.top_entropy_quantile` spans; None: the default
            group, if torch.distributed is initialised. Pass the data-parallel group where that is not every rank.
        backend: "auto" or a backend's name.
        plan: "auto", "single_pass", "frozen_head", "resident", "recompute" or "lean" (`ops/call.py`).
        workspace_bytes: cap on temporary memory besides gradients and O(T H); default a sixteenth of a GPU's memory
            (512 MiB to 4 GiB), elsewhere 256 MiB.

    Returns:
        `LossOutput`. Only `loss` is differentiable, in hidden, weight and bias.

    Raises:
        ValueError: an argument is malformed or missing, or the plan or backend cannot serve the call.

    Example:
        >>> out = grpo_loss(hidden, weight, targets, advantages, cu_seqlens=cu_seqlens)
        >>> out.loss.backward()
    """
    check_config(config)
    check_whole_number("workspace_bytes", workspace_bytes)
    weight, bias, head = split_head(weight, bias, head)
    hidden, weight, bias = head_operands(hidden, weight, bias)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden: expected [T, H] (packed) or [B, L, H] (padded); got shape {list(hidden.shape)}")
    shape = tuple(hidden.shape[:-1])
    check_targets(targets, shape, hidden.device)
    check_main_grad(main_grad, weight)
    scale = config.temperature if temperature is None else temperature
    check_temperature(scale, shape, hidden.device)
    engine = resolve_backend(backend, hidden.device, hidden.dtype)
    inputs = token_inputs(
        hidden,
        shape,
        advantages,
        cu_seqlens=cu_seqlens,
        loss_mask=loss_mask,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        quantile_group=quantile_group,
        targets=targets,
        ignore_index=ignore_index,
        backend=engine,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
    )
    tokens, weights = inputs.tokens, inputs.weights
    check_target_range(targets.reshape(-1), tokens.mask, weight.shape[0])
    if support is not None:
        check_support(support, targets, tokens.mask)
    call = HeadCall.of(hidden, weight, bias, targets, scale, head, inputs.active, engine, workspace_bytes, support)
    scope, row_counts = inputs.scope, None
    if scope == "sequence" and plan in ("auto", "resident") and support is None:
        row_counts = call.rows_of_sequences(tokens.segments, tokens.mask)
    call = call.planned(plan, scope=scope, entropy_grad=config.entropy_coef != 0, row_counts=row_counts)
    computed = tokens if inputs.active is None else tokens.masked(inputs.active.mask)
    gradients = None
    if call.plan in ("single_pass", "resident"):
        counts = row_counts if call.plan == "resident" else None
        logprobs, entropy, gradients = head_objective(call, computed, weights, config, counts, main_grad)
    else:
        logprobs, entropy = head_logprobs(call, main_grad)
    terms = objective(logprobs, entropy, computed, config)
    # Rows without gradient still hang on the graph: an all-masked batch has a differentiable zero.
    loss = total_loss(terms, entropy, weights, config)
    if gradients is not None:
        loss = with_gradients(loss, call, gradients, main_grad)
    logprobs, entropy = logprobs.detach(), entropy.detach()
    finite_states = None if head.softcap is None else call.hidden.detach().sum(-1, dtype=logprobs.dtype).isfinite()
    metrics = collect_metrics(logprobs, entropy, terms, computed, inputs, config, finite_states)
    return LossOutput(
        loss=loss,
        logprobs=logprobs.reshape(shape),
        entropy=entropy.reshape(shape),
        metrics=metrics,
        computed=computed.mask.reshape(shape),
        plan=call.plan,
        backend=call.backend,
    )


def policy_terms(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None,
    config: LossConfig,
    normalizer: Tensor | float | None = None,
    entropy_normalizer: Tensor | float | None = None,
    quantile_group: torch.distributed.ProcessGroup | None = None,
    **given: Any,
) -> tuple[TokenInputs, Tensor, Tensor | None, Terms]:
    """(inputs, logprobs, entropy, terms), all packed `[T]` and 0 where masked: `policy_loss` before its sum.

    Args:
        given: `cu_seqlens`, `loss_mask` and the other log-probabilities, as in `policy_loss`.
    """
    inputs = token_inputs(
        logprobs,
        tuple(logprobs.shape),
        advantages,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        quantile_group=quantile_group,
        **given,
    )
    tokens, dtype = inputs.tokens, inputs.tokens.advantages.dtype
    flat = torch.where(tokens.mask, logprobs.reshape(-1).to(dtype), 0.0)
    flat_entropy = None if entropy is None else torch.where(tokens.mask, entropy.reshape(-1).to(dtype), 0.0)
    return inputs, flat, flat_entropy, objective(flat, flat_entropy, tokens, config)


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss_mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    config: LossConfig = LossConfig(),
    normalizer: Tensor | float | None = None,
    entropy_normalizer: Tensor | float | None = None,
    quantile_group: torch.distributed.ProcessGroup | None = None,
) -> LossOutput:
    """The same losses for frameworks that hand over log-probabilities; O(T), differentiable in logprobs and entropy.

    Args:
        logprobs: `[T]` packed, or `[B, L]` padded; the other tensors as in `grpo_loss`.
        entropy: in the shape of logprobs; needed for `entropy_coef` and `top_entropy_quantile`.

    Raises:
        ValueError: an argument is malformed or missing.
    """
    check_config(config)
    if not isinstance(logprobs, Tensor) or logprobs.dim() not in (1, 2) or not logprobs.is_floating_point():
        found = f"{list(logprobs.shape)} {logprobs.dtype}" if isinstance(logprobs, Tensor) else type(logprobs).__name__
        raise ValueError(f"logprobs: expected a floating-point tensor [T] (packed) or [B, L] (padded); got {found}")
    shape = tuple(logprobs.shape)
    if entropy is not None:
        check_tensor("entropy", entropy, shapes=[(shape, "that of logprobs")], device=logprobs.device)
        check_floating("entropy", entropy)
    elif config.entropy_coef != 0 or config.top_entropy_quantile < 1:
        raise ValueError("entropy: expected a tensor, as entropy_coef or top_entropy_quantile needs it; got None")
    inputs, flat, flat_entropy, terms = policy_terms(
        logprobs,
        advantages,
        entropy=entropy,
        config=config,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        quantile_group=quantile_group,
        cu_seqlens=cu_seqlens,
        loss_mask=loss_mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
    )
    tokens = inputs.tokens
    loss = total_loss(terms, flat_entropy, inputs.weights, config)
    detached_entropy = None if flat_entropy is None else flat_entropy.detach()
    metrics = collect_metrics(flat.detach(), detached_entropy, terms, tokens, inputs, config)
    return LossOutput(
        loss=loss,
        logprobs=flat.detach().reshape(shape),
        entropy=None if detached_entropy is None else detached_entropy.reshape(shape),
        metrics=metrics,
        computed=tokens.mask.reshape(shape),
    )
