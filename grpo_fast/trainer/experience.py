"""From prompts to a scored rollout: sample, decode, reward, compare within groups.

Legend: P prompts, G completions a prompt, B = P * G, K reward functions.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from grpo_fast.advantages import Aggregation, Scale, group_advantages
from grpo_fast.packing import Support
from grpo_fast.trainer.batch import Experience, bounds
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.data import Example, render_prompt
from grpo_fast.trainer.rewards import RewardSet
from grpo_fast.trainer.rollout import Completion, RolloutEngine


@dataclass
class ScoredRollout:
    """Completions of some examples and what the rewards say of them.

    Attributes:
        examples: `P`. prompt_ids: `P` token lists. completions: `B`, G of each example side by side.
        texts: `B`; plain text, or one assistant message where the prompt is messages.
        rewards: `[B, K]` float32, NaN where a reward does not apply.
        names, weights: of the rewards.
        seconds: time spent sampling and scoring.
    """

    examples: Sequence[Example]
    prompt_ids: list[list[int]]
    completions: list[Completion]
    texts: list[Any]
    rewards: Tensor
    names: list[str]
    weights: Tensor
    seconds: dict[str, float]

    @property
    def num_generations(self) -> int:
        """G."""
        return len(self.completions) // len(self.examples)

    def totals(self) -> Tensor:
        """`[B]` weighted sums of the rewards that apply; NaN where none does."""
        total = (self.rewards * self.weights).nansum(1)
        return total.masked_fill(self.rewards.isnan().all(1), torch.nan)

    def num_tokens(self) -> int:
        """Prompt and completion tokens, the prompt counted for each completion, as TRL counts them."""
        prompts = sum(len(ids) for ids in self.prompt_ids) * self.num_generations
        return prompts + sum(len(completion.token_ids) for completion in self.completions)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the run's seed and what it is for; unrelated for any two different tuples."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def collect(
    engine: RolloutEngine,
    rewards: RewardSet,
    examples: Sequence[Example],
    tokenizer: Any,
    config: TrainConfig,
    *,
    num_generations: int,
    seed: int,
) -> ScoredRollout:
    """Sample `num_generations` completions of each example and score them.

    Raises:
        DataError, RewardError: a prompt cannot be rendered; a reward function fails.
    """
    started = time.perf_counter()
    prompt_ids = [render_prompt(example, tokenizer, config.data) for example in examples]
    completions = engine.generate(prompt_ids, num_generations, seed=seed)
    sampled = time.perf_counter()
    repeated = [example for example in examples for _ in range(num_generations)]
    texts: list[Any] = []
    for example, completion in zip(repeated, completions, strict=True):
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        texts.append(text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}])
    names = dict.fromkeys(name for example in examples for name in example.columns)
    scores = rewards(
        prompts=[example.prompt for example in repeated],
        completions=texts,
        completion_ids=[completion.token_ids for completion in completions],
        columns={name: [example.columns.get(name) for example in repeated] for name in names},
    )
    return ScoredRollout(
        examples=examples,
        prompt_ids=prompt_ids,
        completions=completions,
        texts=texts,
        rewards=scores,
        names=rewards.names,
        weights=rewards.weights,
        seconds={"rollout": sampled - started, "reward": time.perf_counter() - sampled},
    )


def to_experience(rollout: ScoredRollout, config: TrainConfig) -> Experience:
    """The rollout as the update needs it, with its advantages."""
    completions = rollout.completions
    finished = torch.tensor([completion.finished for completion in completions])
    return Experience(
        num_generations=rollout.num_generations,
        prompts=torch.tensor([token for ids in rollout.prompt_ids for token in ids], dtype=torch.int64),
        prompt_bounds=bounds([len(ids) for ids in rollout.prompt_ids]),
        tokens=torch.tensor([token for c in completions for token in c.token_ids], dtype=torch.int64),
        token_bounds=bounds([len(completion.token_ids) for completion in completions]),
        sampling_logprobs=torch.tensor([value for c in completions for value in c.logprobs], dtype=torch.float32),
        advantages=group_advantages(
            rollout.rewards,
            group_size=rollout.num_generations,
            scale=cast(Scale, config.advantages.scale_rewards),
            weights=rollout.weights,
            aggregation=cast(Aggregation, config.advantages.multi_objective_aggregation),
        ),
        in_loss=finished if config.mask_truncated_completions else torch.ones_like(finished),
        support=None if config.loss.support == "off" else _support_of(completions),
    )


def _support_of(completions: Sequence[Completion]) -> Support | None:
    """Of all tokens, on the host; rows of completions that have none stand for the whole vocabulary."""
    if all(completion.support is None for completion in completions):
        return None
    return Support.cat(
        [Support.whole(len(one.token_ids)) if one.support is None else one.support.on_host() for one in completions]
    )


def rollout_metrics(rollout: ScoredRollout) -> dict[str, float]:
    """Rewards and lengths of a rollout under TRL's names."""
    totals = rollout.totals()
    groups = totals.view(-1, rollout.num_generations)
    stds = torch.stack([_std(group) for group in groups])
    metrics = {
        "reward": _mean(totals),
        "reward_std": _mean(stds),
        "frac_reward_zero_std": _mean((stds < 1e-8).float()),
    }
    for name, column in zip(rollout.names, rollout.rewards.unbind(1), strict=True):
        metrics[f"rewards/{name}/mean"] = _mean(column)
        metrics[f"rewards/{name}/std"] = float(_std(column))
    return metrics | length_metrics(rollout.completions)


def length_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Completion lengths in tokens, of all and of those that ended by themselves (0 where none did)."""
    lengths = [len(completion.token_ids) for completion in completions]
    ended = [len(completion.token_ids) for completion in completions if completion.finished] or [0]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(not completion.finished for completion in completions) / len(completions),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/min_terminated_length": float(min(ended)),
        "completions/max_terminated_length": float(max(ended)),
    }


def samples(rollout: ScoredRollout, advantages: Tensor) -> list[dict[str, Any]]:
    """Every completion for `RunLogger.samples`."""
    return [
        {
            "prompt": rollout.examples[number // rollout.num_generations].prompt,
            "completion": text,
            "rewards": dict(zip(rollout.names, rollout.rewards[number].tolist(), strict=True)),
            "advantage": float(advantages[number]),
        }
        for number, text in enumerate(rollout.texts)
    ]


def _mean(values: Tensor) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    return float(values.double().nanmean())


def _std(values: Tensor) -> Tensor:
    """Unbiased standard deviation of the values that are not NaN; 0 for fewer than two."""
    known = values[~values.isnan()].double()
    return known.std() if known.numel() > 1 else known.new_zeros(())
