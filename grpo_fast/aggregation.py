"""How per-token terms become one number: loss = sum_t weight_t * term_t, with weights that depend on masks only.

Legend: T tokens, S sequences, m mask, L_s = sum of m over sequence s, C `max_completion_length`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.packing import Segments

SEQUENCE_MEAN = ("grpo", "sapo", "gmpo")
SEQUENCE_SUM = ("luspo",)
TOKEN_MEAN = ("bnpo", "dapo", "cispo", "vespo", "dppo", "ppo_dual", "reinforce", "rloo")


def aggregation_name(config: LossConfig) -> str:
    """What is summed or averaged over what: "sequence_mean", "sequence_sum" or "token_mean"."""
    if config.loss_type in SEQUENCE_MEAN:
        return "sequence_mean"
    return "token_mean" if config.loss_type in TOKEN_MEAN else "sequence_sum"


def default_normalizer(config: LossConfig, mask: Tensor, segments: Segments) -> Tensor:
    """The denominator that `normalizer` replaces, where it is at least 1: S, sum of m, or S * C. 0-dim."""
    if config.loss_type in TOKEN_MEAN:
        return mask.sum()
    denominator = segments.num_sequences
    if config.loss_type == "dr_grpo":
        assert config.max_completion_length is not None
        denominator *= config.max_completion_length
    return torch.full((), denominator, device=mask.device)  # a fill: copying a number over would wait for a GPU


def token_weights(
    config: LossConfig, mask: Tensor, segments: Segments, normalizer: Tensor | float | None, dtype: torch.dtype
) -> Tensor:
    """Weight of each token's term in the loss, `[T]`, 0 where masked.

    - grpo, sapo, gmpo: m / (max(L_s, 1) S), the mean over sequences of the mean over tokens
    - luspo: m / S
    - dr_grpo: m / (S C)
    - bnpo, dapo, cispo, vespo, dppo, ppo_dual, reinforce, rloo: m / max(sum of m, 1)

    Args:
        mask: `[T]` bool.
        normalizer: replaces the last denominator (S, S C or sum of m): the whole optimiser step's count where the
            step is split into micro-batches.
    """
    if normalizer is None:
        normalizer = default_normalizer(config, mask, segments).clamp(min=1)
    weights = mask.to(dtype) / normalizer
    if config.loss_type in SEQUENCE_MEAN:
        lengths = segments.sum(mask).clamp(min=1).to(dtype)
        weights = weights / segments.spread(lengths)
    return weights
