"""TRL trainers for `trl_step.py` and `trl_parity.py`: TRL's own and ours, on one model and one batch.

Legend: B completions of a micro-batch, C their length, P tokens of a prompt.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

CONTENDERS = ("trl", "grpo-fast", "grpo-fast logprobs")


def letters(completions: list[str], **columns: Any) -> list[float]:
    """A reward that groups differ in: the share of letters."""
    return [sum(character.isalpha() for character in text) / max(len(text), 1) for text in completions]


def model_path(given: str | None) -> str:
    """A folder with a model and its tokenizer: the one given, or SmolLM2-135M."""
    from grpo_fast.trainer.smollm2 import smollm2_path

    return given or str(smollm2_path())


def build(contender: str, path: str, *, lora: bool = False, **options: Any) -> Any:
    """TRL's own trainer, ours, or ours at depth `logprobs`: of a subclass that has its own `_compute_loss`."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from grpo_fast.integrations.trl import accelerate_trainer

    class OwnLoss(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            return super()._compute_loss(model, inputs)

    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
        "use_cpu": not torch.cuda.is_available(),
        **options,
    }
    peft = None
    if lora:
        from peft import LoraConfig

        peft = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    words = AutoTokenizer.from_pretrained(path, padding_side="left")
    prompts = [f"Question {number}: name a few words that rhyme." for number in range(64)]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = (OwnLoss if contender == CONTENDERS[2] else GRPOTrainer)(
            model=path,
            reward_funcs=letters,
            args=GRPOConfig(**settings),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=words,
            peft_config=peft,
        )
    return trainer if contender == "trl" else accelerate_trainer(trainer)


def fixed_batch(trainer: Any, completions: int, length: int, prompt: int, vocab: int) -> dict[str, Any]:
    """A micro-batch as `_prepare_inputs` gives it: random tokens, one old policy, every advantage other than zero."""
    gen = torch.Generator().manual_seed(0)
    device = trainer.accelerator.device

    def ids(columns: int) -> torch.Tensor:
        return torch.randint(10, vocab, (completions, columns), generator=gen).to(device)

    advantages = torch.randn(completions, generator=gen)
    return {
        "prompt_ids": ids(prompt),
        "prompt_mask": torch.ones(completions, prompt, dtype=torch.long, device=device),
        "completion_ids": ids(length),
        "completion_mask": torch.ones(completions, length, dtype=torch.long, device=device),
        "advantages": (advantages - advantages.mean()).to(device),
        "num_items_in_batch": torch.tensor(float(completions * length), device=device),
    }


def remove_folder(trainer: Any) -> None:
    """What `build` left on the disk."""
    import shutil

    shutil.rmtree(Path(trainer.args.output_dir), ignore_errors=True)
