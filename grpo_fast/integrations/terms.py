"""A loss's per-token terms before aggregation, for frameworks that aggregate themselves.

loss = sum_t weight_t term_t        the framework's weights, `grpo_fast.objectives`' terms
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.loss import policy_terms
from grpo_fast.metrics import clipped
from grpo_fast.objectives import Terms


def token_terms(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    config: LossConfig,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Terms]:
    """(terms in the shape of logprobs, 0 where masked and differentiable; all that was found out, `[T]`).

    Args:
        logprobs: `[T]` packed with `cu_seqlens`, or `[B, L]`; the others as in `policy_loss`.
        entropy: detached, for `top_entropy_quantile`. The entropy bonus is the framework's.

    Raises:
        ValueError: an argument is malformed or missing.
    """
    _, _, _, terms = policy_terms(
        logprobs,
        advantages,
        entropy=entropy,
        config=config,
        cu_seqlens=cu_seqlens,
        loss_mask=loss_mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
    )
    return terms.policy.reshape(logprobs.shape), terms


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the unmasked values, detached; 0 where there is none."""
    return torch.where(mask, values.detach(), 0.0).sum() / mask.sum().clamp(min=1)


def clipped_share(terms: Terms, advantages: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """The share of unmasked tokens whose ratio is out of [1 - epsilon, 1 + epsilon_high] on the side that A pushes; for
    cispo, which has one bound, those above epsilon_high itself."""
    ratio = terms.ratio.reshape(mask.shape)
    low, high = clipped(ratio, advantages, config)
    return masked_mean((low | high).to(ratio.dtype), mask)
