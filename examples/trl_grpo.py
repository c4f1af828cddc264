"""TRL's GRPOTrainer with grpo-fast: a TRL script in which one import differs.

python examples/trl_grpo.py path/to/model --max_steps 20
"""

import argparse

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig

from grpo_fast.integrations.trl import GRPOTrainer  # in place of: from trl import GRPOTrainer


def share_of_e(completions: list[str], **columns: object) -> list[float]:
    """The reward: how much of a completion is the letter e."""
    return [text.count("e") / max(len(text), 1) for text in completions]


def main() -> None:
    """Train for a few steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output_dir", default="runs/trl")
    parser.add_argument("--use_cpu", action="store_true")
    given = parser.parse_args()
    trainer = GRPOTrainer(
        model=given.model,
        reward_funcs=share_of_e,
        args=GRPOConfig(
            output_dir=given.output_dir,
            max_steps=given.max_steps,
            use_cpu=given.use_cpu,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=24,
            learning_rate=1e-5,
            logging_steps=1,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": prompt} for prompt in ("Once upon a time", "The weather today")] * 8
        ),
        processing_class=AutoTokenizer.from_pretrained(given.model, padding_side="left"),
    )
    print(f"grpo-fast: depth {trainer.grpo_fast.depth!r}, as {trainer.grpo_fast.reason}")
    trainer.train()


if __name__ == "__main__":
    main()
