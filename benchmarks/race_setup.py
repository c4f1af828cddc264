"""What both contenders of the race are given: hyperparameters, prompts in their order, and the reward.

A recipe of ours is the source of everything; TRL's GRPOConfig is built from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.data import Example, PromptSampler, load_examples
from grpo_fast.trainer.recipe import load_config
from grpo_fast.trainer.rewards import RewardSet

# ---- the same hyperparameters ---------------------------------------------------------------------------------------

PAIRS: dict[str, str] = {
    "completions_per_step": "generation_batch_size",
    "num_iterations": "num_iterations",
    "max_steps": "max_steps",
    "seed": "seed",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler_type",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "mask_truncated_completions": "mask_truncated_completions",
    "full_determinism": "full_determinism",
    "model.gradient_checkpointing": "gradient_checkpointing",
    "rollout.num_generations": "num_generations",
    "rollout.max_completion_length": "max_completion_length",
    "rollout.temperature": "temperature",
    "rollout.top_p": "top_p",
    "rollout.top_k": "top_k",
    "rollout.min_p": "min_p",
    "rollout.repetition_penalty": "repetition_penalty",
    "advantages.scale_rewards": "scale_rewards",
    "advantages.multi_objective_aggregation": "multi_objective_aggregation",
    "loss.loss_type": "loss_type",
    "loss.importance_sampling_level": "importance_sampling_level",
    "loss.temperature": "temperature",
    "loss.epsilon": "epsilon",
    "loss.epsilon_high": "epsilon_high",
    "loss.delta": "delta",
    "loss.beta": "beta",
    "loss.use_bias_correction_kl": "use_bias_correction_kl",
    "loss.entropy_coef": "entropy_coef",
    "loss.top_entropy_quantile": "top_entropy_quantile",
    "loss.off_policy_mask_threshold": "off_policy_mask_threshold",
    "loss.max_completion_length": "max_completion_length",
    "loss.sapo_temperature_pos": "sapo_temperature_pos",
    "loss.sapo_temperature_neg": "sapo_temperature_neg",
    "loss.vespo_k_pos": "vespo_k_pos",
    "loss.vespo_lambda_pos": "vespo_lambda_pos",
    "loss.vespo_k_neg": "vespo_k_neg",
    "loss.vespo_lambda_neg": "vespo_lambda_neg",
}
"""Our option -> TRL's: equal in a race."""

NEUTRAL: dict[str, Any] = {
    "plugins": [],
    "steps_per_generation": 1,
    "model.lora": None,
    "data.system_prompt": None,
    "data.filter_overlong_prompts": False,
    "rollout.max_prompt_length": None,
    "rollout.stop_strings": [],
    "loss.kl_estimator": "k3",
    "loss.parameters": {},
    "loss.importance_sampling_mode": None,
}
"""Options of ours that TRL lacks, has for vLLM alone or counts otherwise (`steps_per_generation`), at the value that it
acts by."""

# What TRL is given besides PAIRS: the fastest settings that a user has on a machine without a GPU and that keep the
# precision of the race (float32 weights and moments, bfloat16 matrix products). Considered:
# - gradient_checkpointing (in PAIRS) is on by default in TRL and off here: memory is not short.
# - All completions are sampled at once and go through the update MICRO_BATCH at a time, gradients accumulating: the
#   same update to rounding. On two EPYC cores the demo's first two updates took 31 + 27 s with 16 at once, 31 + 27 with
#   8 and 25 + 25 with 4; all 64 at once, a third longer than 16 (on one core, busy with other things), and 9.4 GiB.
# - The loss is TRL 1.16's chunked head, which it always uses: there is no other to choose.
# - use_liger_kernel, and use_kernels which replaces it, put Triton kernels in the layers' place; vLLM: both want a GPU.
# - use_transformers_continuous_batching casts the trained weights to bfloat16 in place and leaves them so. As with a
#   model loaded in bfloat16, AdamW then has no float32 weights, and most of an lr of 3e-5 is lost to rounding.
# - Decoding has the key/value cache on and runs under bfloat16 autocast, all completions at once; the record of the
#   first step proves it (`decode`: the first and the last forward). An autocast around the whole of training would
#   keep the cast weights, and with them stale ones.
# - cache_implementation="static" attends to the cache's full length at every token; it is made for torch.compile, which
#   TRL disables while generating.
# - torch_compile is off as by default: compiling, and again for new lengths, would be inside the measured minutes.
TRL_SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": True,
    "optim": "adamw_torch_fused",
    "shuffle_dataset": False,  # the data set is in the order of the race
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "use_vllm": False,
    "logging_steps": 1,
    "log_completions": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}

MICRO_BATCH = 4
"""Completions that go through TRL's update at once."""


def race_config(
    recipe: str | Path, overrides: Sequence[str], *, seed: int, max_steps: int, output_dir: str | Path
) -> TrainConfig:
    """The recipe as both contenders train it: the seed's own prompts and sampling, steps and nothing else.

    Raises:
        ValueError: an option that the contenders do not share, or more than one reward.
    """
    config = load_config(
        recipe,
        [
            *overrides,
            f"seed={seed}",
            f"data.seed={seed}",
            f"max_steps={max_steps}",
            f"output_dir={output_dir}",
            "device=cpu",
            *("eval.eval_steps=null", "eval.eval_on_start=false", "eval.eval_on_end=false"),
            *("save_steps=null", "save_minutes=null", "export_final=false", "resume=null"),
            *("logging.report_to=[]", "logging.log_completions=false", "logging.plot_steps=0"),
            "logging.progress=false",
        ],
    )
    for name, expected in NEUTRAL.items():
        if option(config, name) != expected:
            raise ValueError(
                f"{name}: expected {expected!r} in a race, as TRL has no such option; got {option(config, name)!r}"
            )
    if len(config.rewards) != 1 or config.rewards[0].weight != 1.0:
        raise ValueError(f"rewards: expected one of weight 1 in a race; got {config.rewards}")
    return config


def option(config: Any, name: str) -> Any:
    """The value of a dotted option."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def trl_arguments(config: TrainConfig, micro_batch: int = MICRO_BATCH) -> dict[str, Any]:
    """Keyword arguments of TRL's GRPOConfig.

    Args:
        micro_batch: completions that go through the update at once (the greatest common divisor with those of a step).
    """
    paired = {theirs: option(config, ours) for ours, theirs in PAIRS.items()}
    at_once = math.gcd(micro_batch, config.completions_per_step)
    batch = {
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": config.completions_per_step // at_once,
    }
    return paired | TRL_SETTINGS | batch | {"output_dir": config.output_dir}


def hyperparameters(config: TrainConfig, arguments: Any) -> list[dict[str, Any]]:
    """The pairs with both values, TRL's read off the GRPOConfig that was built.

    Raises:
        ValueError: a pair differs.
    """
    rows = []
    for ours, theirs in PAIRS.items():
        mine, its = option(config, ours), getattr(arguments, theirs)
        its = getattr(its, "value", its)  # an enum of transformers
        if mine != its:
            raise ValueError(f"{ours}: expected TRL's {theirs} to be {mine!r}; got {its!r}")
        rows.append({"grpo_fast": ours, "trl": theirs, "value": mine})
    return rows


# ---- the same prompts and reward ------------------------------------------------------------------------------------


def ordered_examples(config: TrainConfig) -> list[Example]:
    """The examples of all steps in the order of our trainer, `prompts_per_step` each."""
    examples = load_examples(config.data, "train")
    sampler = PromptSampler(len(examples), config.data.seed)
    return [examples[index] for index in sampler.next(config.prompts_per_step * config.max_steps)]


def trl_prompt(example: Example, config: TrainConfig) -> Any:
    """The prompt in TRL's format: messages, for which it applies the tokenizer's chat template, or text."""
    if not isinstance(example.prompt, str):
        return example.prompt
    text = config.data.prompt_template.replace("{prompt}", example.prompt)
    return [{"role": "user", "content": text}] if config.data.chat_template else text


def trl_reward(rewards: RewardSet, examples: Sequence[Example]) -> Callable[..., list[float]]:
    """Our reward as TRL calls it; the data set's column `example` says which columns a completion is scored with."""

    def score(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], example: list[int], **_: Any
    ) -> list[float]:
        rows = [examples[number].columns for number in example]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return rewards(prompts, completions, completion_ids, columns)[:, 0].tolist()

    score.__name__ = rewards.names[0]
    return score
