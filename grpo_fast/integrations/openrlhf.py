"""grpo-fast's objectives in the shape of OpenRLHF 0.11's `PolicyLoss`.

    ray.init(runtime_env={"worker_process_setup_hook": "grpo_fast.integrations.openrlhf.install"})

OpenRLHF has no place to name a loss, so `install` assigns it, in every worker. Its options keep their meaning; for the
same objective the loss is the same. The loss itself (0.11.2) was compared with OpenRLHF's, a whole run was not made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.config import LossConfig
from grpo_fast.integrations.terms import clipped_share, masked_mean, token_terms
from grpo_fast.integrations.versions import require


class PolicyLoss(nn.Module):
    """OpenRLHF's policy loss.

    Args:
        objective: in place of the clipped loss that the other options describe; they still aggregate and correct.

    Raises:
        ValueError: a correction of train/inference mismatch that the objectives do not have.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] | list[float] = (0.5, 5.0),
        objective: LossConfig | None = None,
    ) -> None:
        super().__init__()
        if policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"policy_loss_type: expected ppo or gspo; got {policy_loss_type!r}")
        if objective is None:
            options: dict[str, Any] = {} if dual_clip is None else {"dual_clip": dual_clip}
            objective = LossConfig(
                loss_type="grpo" if dual_clip is None else "ppo_dual",
                importance_sampling_level="sequence" if policy_loss_type == "gspo" else "token",
                epsilon=clip_eps_low,
                epsilon_high=clip_eps_high,
                **options,
            )
        self.corrects = is_correction_level != "off"
        if self.corrects:
            if is_correction_level != "token" or is_correction_gating != "ratio" or policy_loss_type == "gspo":
                raise ValueError(
                    "is_correction_level, is_correction_gating: expected off, or for ppo token and ratio; got "
                    f"{is_correction_level}, {is_correction_gating} for {policy_loss_type}"
                )
            low, high = is_correction_threshold
            objective = replace(
                objective,
                importance_sampling_mode="token_truncate" if is_correction_mode == "clip" else "token_mask",
                importance_sampling_clip_min=low,
                importance_sampling_clip_max=high,
            )
        self.objective = objective
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(loss, clip ratio, KL to the old policy, KL to the rollout engine, share filtered); inputs `[B, L]`."""
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
        terms, found = token_terms(
            log_probs,
            advantages,
            config=self.objective,
            loss_mask=mask,
            old_logprobs=old_log_probs,
            sampling_logprobs=rollout_log_probs if self.corrects else None,
        )
        loss = self._aggregate(terms, mask, dp_size, batch_num_tokens, global_batch_size)
        clipped = clipped_share(found, advantages, mask, self.objective)
        kl = masked_mean(old_log_probs - log_probs, mask)
        if not self.corrects:
            return loss, clipped, kl, None, None
        assert rollout_log_probs is not None
        difference = old_log_probs - rollout_log_probs
        low, high = self.objective.importance_sampling_clip_min, self.objective.importance_sampling_clip_max
        assert low is not None
        assert high is not None
        filtered = ((difference.exp() < low) | (difference.exp() > high)).to(loss.dtype)
        return loss, clipped, kl, masked_mean(-difference, mask), masked_mean(filtered, mask)

    def _aggregate(
        self, terms: Tensor, mask: Tensor, dp_size: int, num_tokens: float | None, num_sequences: float | None
    ) -> Tensor:
        """Mean over tokens, or over sequences with tokens of their means; with global counts, a rank's share."""
        if self.token_level_loss:
            return terms.sum() / mask.sum().clamp(min=1) if num_tokens is None else terms.sum() / num_tokens * dp_size
        lengths = mask.sum(-1)
        total = (terms.sum(-1) / lengths.clamp(min=1)).sum()
        return total / (lengths > 0).sum().clamp(min=1) if num_sequences is None else total / num_sequences * dp_size


def install() -> None:
    """Put `PolicyLoss` in place of OpenRLHF's in this process.

    Raises:
        ImportError: OpenRLHF is missing, or its version is not 0.11.
    """
    require("openrlhf", at_least="0.11", below="0.12")
    from openrlhf.trainer.ray import ppo_actor

    ppo_actor.PolicyLoss = PolicyLoss
