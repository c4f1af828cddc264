"""Held-out evaluation: the same prompts, sampling and rewards as training, and pass@k."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.data import Example
from grpo_fast.trainer.errors import ConfigError
from grpo_fast.trainer.experience import ScoredRollout, collect, derive_seed, length_metrics
from grpo_fast.trainer.rewards import RewardSet
from grpo_fast.trainer.rollout import RolloutEngine


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct (Chen et al. 2021, arXiv 2107.03374).

        1 - C(n - c, k) / C(n, k)

    Raises:
        ValueError: not 0 <= num_correct <= num_samples, or not 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct: expected 0 to {num_samples}; got {num_correct}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k: expected 1 to {num_samples}, the number of samples; got {k}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def check_success_reward(config: TrainConfig, rewards: RewardSet) -> None:
    """Raise ConfigError unless `eval.success_reward` is one of the rewards."""
    name = config.eval.success_reward
    if name is not None and name not in rewards.names:
        raise ConfigError(f"eval.success_reward: expected one of {', '.join(rewards.names)}; got {name!r}")


def evaluate(
    engine: RolloutEngine,
    rewards: RewardSet,
    examples: Sequence[Example],
    tokenizer: Any,
    config: TrainConfig,
) -> dict[str, float]:
    """Metrics of the policy on `examples`: reward, every reward's mean, pass@k, lengths, seconds.

    Every evaluation of a run draws from the same seeds, so that evaluations differ by the policy alone.
    """
    started = time.perf_counter()
    generations = config.eval.num_generations_eval
    size = max(config.rollout.batch_size or config.completions_per_step, generations) // generations
    parts: list[ScoredRollout] = [
        collect(
            engine,
            rewards,
            [examples[number] for number in range(start, min(start + size, len(examples)))],
            tokenizer,
            config,
            num_generations=generations,
            seed=derive_seed(config.seed, "eval", start),
        )
        for start in range(0, len(examples), size)
    ]
    scores = torch.cat([part.rewards for part in parts])
    column = rewards.names.index(config.eval.success_reward) if config.eval.success_reward else 0
    # NaN (the reward does not apply) is not a success.
    correct = (scores[:, column] >= config.eval.success_threshold).view(-1, generations).sum(1).tolist()
    metrics = {"reward": float(torch.cat([part.totals() for part in parts]).double().nanmean())}
    for name, values in zip(rewards.names, scores.unbind(1), strict=True):
        metrics[f"rewards/{name}/mean"] = float(values.double().nanmean())
    for k in config.eval.pass_at_k:
        metrics[f"pass@{k}"] = sum(pass_at_k(generations, count, k) for count in correct) / len(correct)
    metrics |= length_metrics([completion for part in parts for completion in part.completions])
    return metrics | {"seconds": time.perf_counter() - started}
