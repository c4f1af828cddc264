"""grpo-fast's objectives as a loss of torchtitan 0.3's `experiments/rl`.

    from grpo_fast.integrations.torchtitan import GRPOFastLoss
    trainer = RLTrainer.Config(loss=GRPOFastLoss.Config(objective=LossConfig(loss_type="cispo", epsilon_high=2.0)), ...)

torchtitan hands over logits and sums over tokens; a row may hold several samples and does not say where they begin, so
objectives that couple a sequence's tokens are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.integrations.terms import clipped_share, token_terms
from grpo_fast.integrations.versions import require
from grpo_fast.objectives import slope_scope


def token_loss(
    config: LossConfig,
    logprobs: Tensor,
    entropy: Tensor,
    global_valid_tokens: float | Tensor | None,
    *,
    generator_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(sum of the terms / global_valid_tokens, metrics that sum over ranks to means); all tensors `[B, L]`.

    Tokens whose generator log-probability is not finite are left out, as torchtitan's own losses and count do.
    """
    mask = loss_mask.bool() & generator_logprobs.isfinite()
    terms, found = token_terms(logprobs, advantages, config=config, loss_mask=mask, old_logprobs=generator_logprobs)
    count = 1 if global_valid_tokens is None else global_valid_tokens
    share = mask.sum() / count
    loss = terms.sum() / count

    def mean(values: Tensor) -> Tensor:
        return torch.where(mask, values.detach(), 0.0).sum() / count

    return loss, {
        "loss/mean": loss.detach(),
        "loss/ratio_mean": mean(found.ratio.reshape(mask.shape)),
        "loss/ratio_clipped_frac": clipped_share(found, advantages, mask, config) * share,
        "bit_wise/logprob_diff/mean": mean(logprobs - generator_logprobs),
        "trainer/entropy/mean": mean(entropy),
    }


def check_objective(config: LossConfig) -> None:
    """Raise ValueError for what torchtitan has no data for: sequences, a reference, an entropy gradient."""
    if slope_scope(config, has_old=True) != "row":
        raise ValueError(
            f"objective: expected one that is local to tokens, as torchtitan's rows hold several samples; got {config}"
        )
    for name in ("beta", "entropy_coef"):
        if getattr(config, name) != 0:
            raise ValueError(f"objective.{name}: expected 0, as torchtitan gives no data for it; got {config}")
    if config.importance_sampling_mode is not None:
        raise ValueError("objective.importance_sampling_mode: expected None, as the ratio is to the generator already")


@cache
def _loss_class() -> Any:
    require("torchtitan", at_least="0.3", below="0.4")
    from torchtitan.components.loss import BaseLoss, compute_logprobs

    class GRPOFastLoss(BaseLoss):
        """A loss of the family for torchtitan's RL trainer."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseLoss.Config):
            objective: LossConfig = field(default_factory=LossConfig)
            """The objective; its temperature and aggregation are torchtitan's."""

        def __init__(self, config: Any, *, compile_config: Any = None) -> None:
            check_objective(config.objective)
            self.objective = config.objective

        def __call__(
            self, logits: Tensor, labels: Tensor, global_valid_tokens: Any = None, **inputs: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, entropy = compute_logprobs(logits, labels, return_entropy=True)
            return token_loss(self.objective, logprobs, entropy, global_valid_tokens, **inputs)

    return GRPOFastLoss


def __getattr__(name: str) -> Any:
    if name == "GRPOFastLoss":  # made when asked for: the class derives from torchtitan's
        return _loss_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
