"""What each token carries into the loss, and which rows of the LM head are computed.

Legend: T packed tokens, S sequences.

Where an objective keeps or drops every token by itself, native code does it in one pass (`backends/groups.py`), if it
is there for the device. The rest of this file is the definition, by torch's operators, and serves everything else.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grpo_fast.backends.groups import ActiveRows, TokenRows, native_token_rows
from grpo_fast.config import LossConfig
from grpo_fast.objectives import (
    Tokens,
    aggregation_name,
    couples_tokens,
    default_normalizer,
    needs_every_row,
    token_weights,
)


def token_rows(
    tokens: Tokens,
    config: LossConfig,
    normalizer: Tensor | float | None,
    *,
    masked: bool,
    per_token: bool,
    backend: str,
) -> TokenRows:
    """Weights, advantages and the rows to compute.

    Left out are masked rows and, unless something needs them, rows whose gradient is known to be zero: zero advantage,
    or a masked train/inference correction. An objective that couples a sequence's tokens keeps or drops it whole.

    Args:
        tokens: with advantages as the caller gave them: `[S]`, or if `per_token` `[T]` with anything where masked.
        normalizer: replaces the loss type's denominator.
        masked: whether `tokens.mask` can hold a False at all.
        backend: the name of the one that computes the rows.
    """
    every_row = needs_every_row(config)
    asks_device = masked or not every_row
    ambiguous = per_token and tokens.segments.num_sequences == tokens.segments.num_tokens  # native code goes by sizes
    if not ambiguous and not couples_tokens(config, has_old=tokens.old_logprobs is not None):
        if normalizer is None and config.record.aggregation == "constant_length":
            normalizer = default_normalizer(config, tokens.mask, tokens.segments).clamp(min=1)
        native = native_token_rows(
            tokens.advantages,
            tokens.segments.cu_seqlens,
            tokens.mask if masked else None,
            tokens.importance,
            num_tokens=tokens.segments.num_tokens,
            aggregation=aggregation_name(config),
            normalizer=normalizer,
            every_row=every_row,
            backend=backend,
        )
        if native is not None:
            return native if asks_device else replace(native, active=None)
    advantages = tokens.advantages
    if not per_token:
        advantages = tokens.segments.spread(advantages)
    advantages = torch.where(tokens.mask, advantages, 0.0)
    weights = token_weights(config, tokens.mask, tokens.segments, normalizer, advantages.dtype)
    active = ActiveRows(_active_mask(tokens, advantages, config)) if asks_device else None
    return TokenRows(weights, advantages, active)


def looks_at_sequences(config: LossConfig) -> bool:
    """Whether the loss depends on where sequences end."""
    return (
        aggregation_name(config) != "token_mean"
        or couples_tokens(replace(config, top_entropy_quantile=1.0), has_old=True)
        or (config.importance_sampling_mode or "").startswith("sequence")
    )


def _active_mask(tokens: Tokens, advantages: Tensor, config: LossConfig) -> Tensor:
    """The rows to compute, `[T]` bool."""
    if needs_every_row(config):
        return tokens.mask
    live = tokens.mask & (advantages != 0)
    if tokens.importance is not None and "importance" not in config.record.reads:
        live = live & (tokens.importance != 0)
    if couples_tokens(config, has_old=tokens.old_logprobs is not None):
        live = tokens.mask & tokens.segments.spread(tokens.segments.sum(live) > 0)
    return live
