"""TRL's tool loop, its environments and its custom rollouts under its trainer and ours: the same logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trl_loss import trl_missing

pytestmark = pytest.mark.skipif(trl_missing() is not None, reason=str(trl_missing()))
pytest.importorskip("datasets")

from tests import tiny, trl_runs  # noqa: E402

SAID = (
    '<tool_call>\n{"name": "add", "arguments": {"count": 3}}\n</tool_call><|im_end|>',
    '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call><|im_end|>',
    "I do not know<|im_end|>",
)
AFTERWARDS = "Done<|im_end|>"


class Counter:
    """An environment: what was added up is the reward."""

    def reset(self, **row: Any) -> str:
        self.total = 0
        return " Count."

    def add(self, count: int) -> str:
        """
        Count on.

        Args:
            count: by how many.
        """
        self.total += count
        return f"{self.total} now"

    def get_reward(self) -> float:
        return float(self.total)


def rollout(prompts: Any, trainer: Any) -> dict[str, Any]:
    """Random answers, whose last token an environment said."""
    gen = torch.Generator().manual_seed(trainer.state.global_step)
    words = trainer.processing_class
    lengths = torch.randint(2, 7, (len(prompts),), generator=gen).tolist()
    return {
        "prompt_ids": [words.encode(prompt) for prompt in prompts],
        "completion_ids": [torch.randint(3, tiny.VOCAB_SIZE, (n,), generator=gen).tolist() for n in lengths],
        "logprobs": [[-4.4] * n for n in lengths],
        "env_mask": [[1] * (n - 1) + [0] for n in lengths],
    }


def words_of_qwen() -> Any:
    import trl

    words = tiny.tokenizer(chat=False)
    words.add_tokens(['"', "'", "#", "\\", "`", "%"])
    words.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    words.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"])
    words.eos_token, words.padding_side = "<|im_end|>", "left"
    words.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return words


@pytest.mark.parametrize(("loss_type", "beta"), [("dapo", 0.0), ("grpo", 0.1)])
def test_environments_and_their_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str, beta: float
) -> None:
    from datasets import Dataset
    from trl import GRPOTrainer

    from grpo_fast.integrations.trl import GRPOTrainer as Ours

    words = words_of_qwen()
    path = tmp_path / "model"
    shape = {"vocab_size": len(words), "max_position_embeddings": 4096, "eos_token_id": words.eos_token_id}
    tiny.model("qwen3", **shape).save_pretrained(path)
    said, after = [[words.encode(text) for text in texts] for texts in (SAID, [AFTERWARDS])]

    def generate(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        rows = said if len(input_ids) == len(said) else after * len(input_ids)
        width = max(map(len, rows))
        new = torch.tensor([row + [words.pad_token_id] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, new], dim=1)

    logs = []
    for cls in (GRPOTrainer, Ours):
        trainer = cls(
            model=str(path),
            args=trl_runs.options(
                tmp_path / "run",
                per_device_train_batch_size=3,
                max_completion_length=256,
                num_iterations=2,
                max_steps=4,
                loss_type=loss_type,
                beta=beta,
            ),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "Go on."}]}] * 4),
            processing_class=words,
            environment_factory=Counter,
        )
        monkeypatch.setattr(trainer.model, "generate", generate)
        logs.append(trl_runs.train(trainer))
    assert trainer.grpo_fast.depth == "loss"
    assert logs[0][0]["tools/call_frequency"] == pytest.approx(2 / 3)
    assert logs[0][0]["tools/failure_frequency"] == pytest.approx(1 / 2)
    assert any(row["grad_norm"] for row in logs[0])
    assert not trl_runs.differences(logs[1], logs[0], 1e-3)


def test_a_rollout_of_ones_own(tmp_path: Path) -> None:
    from trl import GRPOTrainer

    from grpo_fast.integrations.trl import GRPOTrainer as Ours

    logs = []
    for cls in (GRPOTrainer, Ours):
        trainer = trl_runs.trainer_of(cls, tmp_path, rollout_func=rollout, num_iterations=2, max_steps=4)
        logs.append(trl_runs.train(trainer))
    assert trainer.grpo_fast.depth == "loss"
    assert any(row["grad_norm"] for row in logs[0])
    assert not trl_runs.differences(logs[1], logs[0], 1e-3)
