"""Drives TRL's own loss on given tensors: `GRPOTrainer`'s methods, unbound, on a light stand-in for the trainer.

`_generate_and_score_completions` supplies the train/inference correction, the advantages and their metrics;
`_compute_loss` the loss. Nothing of TRL's arithmetic is repeated here.

Legend: B completions, L padded length, K rewards.
"""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TRL_VERSION = "1.16"
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
"""Those of our loss types that TRL has."""


def trl_missing() -> str | None:
    """Why the comparison cannot run here, or None where TRL 1.16 is installed."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return f"needs trl {TRL_VERSION}; it is not installed"
    return None if version.startswith(f"{TRL_VERSION}.") else f"needs trl {TRL_VERSION}; found {version}"


class _OneProcess:
    """An accelerator of one process: every collective is the identity."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    sync_gradients = True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor

    def pad_across_processes(self, tensor: Tensor, dim: int = 0, pad_index: int = 0) -> Tensor:
        return tensor


def _trainer(outputs: dict[str, tuple[Tensor, Tensor | None]], **attributes: Any) -> SimpleNamespace:
    """A stand-in whose models (`model` that generated, `ref_model`, `current`) answer with the given `outputs`."""
    trainer = SimpleNamespace(
        model=SimpleNamespace(name="old", training=True, is_gradient_checkpointing=False),
        ref_model=SimpleNamespace(name="ref"),
        current=SimpleNamespace(name="current"),
        accelerator=_OneProcess(),
        _metrics={"train": defaultdict(list)},
        _logs={name: [] for name in ("prompt", "completion", "advantages")} | {"rewards": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _is_vlm=False,
        pad_to_multiple_of=None,
        tools=None,
        environments=None,
        environment_factories=None,
        mask_truncated_completions=False,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1,
        num_generations=1,
        scale_rewards="group",
        multi_objective_aggregation="sum_then_normalize",
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        num_iterations=1,
        beta=0.0,
        args=SimpleNamespace(
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=1,
            steps_per_generation=1,
        ),
    )
    vars(trainer).update(attributes)

    def answer(model: SimpleNamespace, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, None]:
        return (*outputs[model.name], None)

    trainer._get_per_token_logps_and_entropies = answer
    return trainer


def _score(trainer: SimpleNamespace, rewards: Tensor, mask: Tensor, sampling: Tensor | None) -> dict[str, Any]:
    """TRL's `_generate_and_score_completions` for completions that fill `[B, L]`, `mask` being their tool mask."""
    from trl import GRPOTrainer

    num_completions, length = mask.shape
    ids = [[1] * length] * num_completions
    # An unknown log-probability reaches TRL as None.
    logprobs = sampling
    if sampling is not None:
        logprobs = [[None if value != value else value for value in row] for row in sampling.tolist()]
    names = [f"reward_{k}" for k in range(rewards.shape[1])]
    trainer._generate = lambda prompts: (ids, ids, mask.int().tolist(), prompts, logprobs, {}, None, None)
    trainer._calculate_rewards = lambda *args: rewards
    trainer.reward_funcs = trainer.reward_func_names = names
    if not hasattr(trainer, "reward_weights"):
        trainer.reward_weights = torch.ones(len(names))
    return GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "?"} for _ in ids])


def trl_policy_loss(
    config: Any,
    logprobs: Tensor,
    entropies: Tensor,
    mask: Tensor,
    advantages: Tensor,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    sampling: Tensor | None = None,
    num_items: float | None = None,
    *,
    accumulation_steps: int = 1,
) -> tuple[Tensor, dict[str, float]]:
    """TRL's loss and the metrics it logs, in the dtype of `logprobs`.

    Args:
        config: a `LossConfig` or an object with its attributes.
        logprobs, entropies, old, ref, sampling: `[B, L]`.
        mask: `[B, L]`, what TRL knows as completion mask times tool mask.
        advantages: `[B]` or `[B, L]`.
        num_items: active tokens of the optimiser step; those of `mask` if None.
        accumulation_steps: micro-batches of the optimiser step, which TRL divides some losses by.
    """
    from trl import GRPOTrainer

    corrected = config.importance_sampling_mode is not None
    attributes = {name: getattr(config, name) for name in ("loss_type", "importance_sampling_level", "beta")}
    attributes |= {name: getattr(config, name) for name in ("top_entropy_quantile", "off_policy_mask_threshold")}
    trainer = _trainer(
        {
            "old": (logprobs.detach() if old is None else old, None),
            "ref": (ref, None),
            "current": (logprobs, entropies),
        },
        **attributes,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        max_completion_length=config.max_completion_length,
        entropy_coef=config.entropy_coef,
        _entropy_bonus_enabled=config.entropy_coef != 0,
        use_vllm=sampling is not None,
        vllm_importance_sampling_correction=corrected,
        vllm_importance_sampling_mode=config.importance_sampling_mode,
        vllm_importance_sampling_clip_min=config.importance_sampling_clip_min,
        vllm_importance_sampling_clip_max=config.importance_sampling_clip_max,
        # TRL asks for old log-probabilities where an optimiser step does not use up what was generated.
        num_iterations=1 if old is None else 2,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask.__get__(trainer)
    for name in ("use_bias_correction_kl", "delta", "sapo_temperature_pos", "sapo_temperature_neg"):
        setattr(trainer.args, name, getattr(config, name))
    for name in ("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"):
        setattr(trainer.args, name, getattr(config, name))

    with _default_dtype(logprobs.dtype):
        inputs = _score(trainer, torch.zeros(mask.shape[0], 1), mask, sampling)
        inputs["advantages"] = advantages
        if num_items is not None:
            inputs["num_items_in_batch"] = torch.tensor(float(num_items))
        trainer.current_gradient_accumulation_steps = accumulation_steps
        loss = GRPOTrainer._compute_loss(trainer, trainer.current, inputs)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss, {name: value for name, value in logged.items() if not name.startswith(("reward", "frac_reward"))}


def trl_advantages(
    rewards: Tensor,
    *,
    group_size: int,
    scale: str = "group",
    weights: Tensor | None = None,
    aggregation: str = "sum_then_normalize",
) -> Tensor:
    """TRL's advantages `[N]` of `rewards` `[N, K]`, NaN where a reward was not given."""
    trainer = _trainer(
        {},
        num_generations=group_size,
        scale_rewards=scale,
        multi_objective_aggregation=aggregation,
        reward_weights=torch.ones(rewards.shape[1], dtype=rewards.dtype) if weights is None else weights,
    )
    with _default_dtype(rewards.dtype):
        return _score(trainer, rewards, torch.ones(rewards.shape[0], 1), None)["advantages"]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """TRL makes some tensors from Python numbers: this lets a float64 comparison stay in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
