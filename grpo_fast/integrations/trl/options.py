"""TRL's options and inputs of a loss as `grpo_loss` takes them.

Legend: B completions of a micro-batch, C their padded length, N micro-batches of an optimiser step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.integrations.lm_head import Objective
from grpo_fast.losses import LOSSES
from grpo_fast.objectives import reads_sampling, sequence_share

_SAME_NAME = (
    "delta",
    "use_bias_correction_kl",
    *(parameter.name for name in ("sapo", "vespo") for parameter in LOSSES[name].parameters),
)
_LOGPROBS = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")


def loss_config(trainer: Any, *, temperature: float, entropy_coef: float = 0.0) -> LossConfig:
    """The `LossConfig` of the trainer's options as they are now (callbacks may have changed them).

    Raises:
        ValueError: an option that `LossConfig` does not take.
    """
    args = trainer.args
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return LossConfig(
        loss_type=trainer.loss_type,
        importance_sampling_level=trainer.importance_sampling_level,
        temperature=temperature,
        epsilon=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,  # TRL's trainer has epsilon here where none was given, for cispo as well
        beta=trainer.beta,
        entropy_coef=entropy_coef,
        top_entropy_quantile=trainer.top_entropy_quantile,
        off_policy_mask_threshold=trainer.off_policy_mask_threshold,
        max_completion_length=trainer.max_completion_length,
        importance_sampling_mode=trainer.vllm_importance_sampling_mode if corrected else None,
        importance_sampling_clip_min=trainer.vllm_importance_sampling_clip_min,
        importance_sampling_clip_max=trainer.vllm_importance_sampling_clip_max,
        all_token_metrics=True,  # TRL's entropy and KL are of every token, those without advantage included
        **{name: getattr(args, name) for name in _SAME_NAME},
    )


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """`[B, C]` bool, the tokens that carry loss: the completions', tools' answers left out."""
    mask: Tensor = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def neutral_where_masked(inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` with log-probabilities 0 where no loss is.

    The current policy's are not computed there; against a tool's answer, unlikely as it may be, a ratio would overflow
    before TRL multiplies it by the mask.
    """
    if "tool_mask" not in inputs:
        return inputs
    mask = loss_mask(inputs)
    given = {name: inputs[name] for name in _LOGPROBS if inputs.get(name) is not None}
    return inputs | {name: torch.where(mask, values, 0.0) for name, values in given.items()}


def objective_of(trainer: Any, inputs: dict[str, Any], *, temperature: float) -> Objective:
    """The loss of a training micro-batch, with TRL's denominators: its share of the whole optimiser step's loss."""
    steps: int = trainer.current_gradient_accumulation_steps
    bonus = _bonus(trainer)
    mask, advantages = loss_mask(inputs), inputs["advantages"]
    # TRL's mean over the tokens that the bonus acts on, a share of the step's. Those of a quantile only the loss can
    # count: there the share is the coefficient's.
    counted = trainer.top_entropy_quantile == 1
    config = loss_config(trainer, temperature=temperature, entropy_coef=bonus if counted else bonus / steps)
    if advantages.dim() == 2:
        advantages = advantages.expand(mask.shape)
    old, ref, sampling = (inputs.get(name) for name in _LOGPROBS)
    return Objective(
        advantages,
        mask,
        config=config,
        old_logprobs=old,
        ref_logprobs=ref if config.beta != 0 else None,
        sampling_logprobs=sampling if reads_sampling(config) else None,
        normalizer=_normalizer(trainer, config, inputs, mask, steps),
        entropy_normalizer=mask.sum().clamp(min=1) * float(steps) if counted and bonus != 0 else None,
    )


def _bonus(trainer: Any) -> float:
    """The entropy bonus's coefficient in this step: an adaptive one rests while the entropy is above its target."""
    if not trainer._entropy_bonus_enabled:
        return 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return float(trainer.entropy_coef)


def _normalizer(trainer: Any, config: LossConfig, inputs: dict[str, Any], mask: Tensor, steps: int) -> Tensor | float:
    """What TRL divides by: B N, B C N, local tokens times N, or the tokens of the step on all ranks, a rank's share."""
    if config.record.aggregation != "token_mean":
        return float(mask.shape[0] * sequence_share(config) * steps)
    if config.loss_type == "bnpo":  # the one that differs from dapo in TRL's denominator only
        return mask.sum().clamp(min=1) * float(steps)
    # num_items_in_batch counts what was generated together, which may be several optimiser steps.
    tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return tokens * steps / trainer.args.steps_per_generation
