"""Short GRPO runs on a tiny random model, once with TRL's trainer and once with ours: what they log must agree."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from tests import tiny

PROMPTS = [f"say {word}" for word in "ab cde fghi jk lmnop qrs tuv wxyz".split()]
MEASURED = ("time", "runtime", "per_second", "flos")


def letters(completions: list[str], **columns: Any) -> list[float]:
    """The share of letters: groups of a random model differ in it."""
    return [sum(character.isalpha() for character in text) / max(len(text), 1) for text in completions]


def vowels(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(character in "aeiou" for character in text)) for text in completions]


def options(folder: Path, **changes: Any) -> Any:
    """A GRPOConfig of 2 prompts x 3 completions a micro-batch, in float32."""
    from trl import GRPOConfig

    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 6,
        "num_generations": 3,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 3,
    }
    return GRPOConfig(**{**values, **changes})


def trainer_of(
    cls: Any, folder: Path, *, model: Any = None, peft: Any = None, words: Any = None, **changes: Any
) -> Any:
    """A trainer of class `cls` on a model that is the same every time."""
    from datasets import Dataset

    reward_funcs = changes.pop("reward_funcs", letters)
    rest = {name: changes.pop(name) for name in ("eval_dataset", "rollout_func", "callbacks") if name in changes}
    source = saved_model(folder) if model is None else model
    torch.manual_seed(0)  # TRL before 1.16 draws the adapter's weights without seeding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(
            model=source,
            reward_funcs=reward_funcs,
            args=options(folder / "run", **changes),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=_tokenizer() if words is None else words,
            peft_config=peft,
            **rest,
        )


def saved_model(folder: Path) -> str:
    path = folder / "model"
    return str(path if path.exists() else tiny.save(path))


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def _tokenizer() -> Any:
    words = tiny.tokenizer(chat=False)
    words.padding_side = "left"
    return words


def train(trainer: Any) -> list[dict[str, float]]:
    """Train; what was logged at each step, but for what depends on the machine."""
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "train_runtime" not in row]
    return [{name: value for name, value in row.items() if not any(m in name for m in MEASURED)} for row in rows]


def differences(ours: list[dict[str, float]], theirs: list[dict[str, float]], bound: float) -> list[str]:
    """Where two runs' logs differ: names, or values by more than `bound` of their size."""
    found = [f"{len(ours)} rows instead of {len(theirs)}"] if len(ours) != len(theirs) else []
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        found += [f"step {step}: {name} is logged by one only" for name in mine.keys() ^ other.keys()]
        for name in mine.keys() & other.keys():
            got, want = mine[name], other[name]
            if got != want and not abs(got - want) <= bound * abs(want) + 1e-6:
                found.append(f"step {step}: {name} {got!r} instead of {want!r}")
    return found


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
