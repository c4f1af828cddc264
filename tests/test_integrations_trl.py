"""An unmodified TRL script with one import changed: six steps of a tiny model log the same numbers.

The rows hold every pair of values among loss type, KL, accumulation, LoRA and masked truncation.
`benchmarks/trl_parity.py` does the same with SmolLM2-135M.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trl_loss import trl_missing

pytestmark = pytest.mark.skipif(trl_missing() is not None, reason=str(trl_missing()))
pytest.importorskip("datasets")

from tests import trl_runs  # noqa: E402

LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}
BETA = {"beta": 0.04}
ACCUMULATION = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 3}
TRUNCATION = {"mask_truncated_completions": True, "max_completion_length": 12}
# Two iterations over what was sampled, so that ratios leave 1 and clip.
RATIOS = {"num_iterations": 2}


def rows() -> list[Any]:
    """Two rows for each loss, opposite in KL, accumulation, LoRA and truncation; over the losses all pairs occur."""
    names = ("kl", "accumulated", "lora", "truncated")
    cases = []
    for number, (name, loss) in enumerate(LOSSES.items()):
        for flip in (0, 1):
            on = [label for bit, label in enumerate(names) if (number >> bit & 1) != flip]
            options = {**loss, **RATIOS}
            options |= BETA if "kl" in on else {}
            options |= ACCUMULATION if "accumulated" in on else {}
            options |= TRUNCATION if "truncated" in on else {}
            cases.append(pytest.param(options, "lora" in on, id="-".join([name, *on])))
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


def both(folder: Path, lora: bool, **options: Any) -> tuple[Any, list[str]]:
    """Our trainer after training, and where its log differs from TRL's."""
    from trl import GRPOTrainer

    from grpo_fast.integrations.trl import GRPOTrainer as Ours

    runs = {}
    for cls in (GRPOTrainer, Ours):
        trainer = trl_runs.trainer_of(cls, folder, peft=trl_runs.lora() if lora else None, **options)
        before = trl_runs.weights_of(trainer)
        runs[cls] = trainer, trl_runs.train(trainer)
        moved = [name for name, weight in trl_runs.weights_of(trainer).items() if not torch.equal(weight, before[name])]
        assert moved, "a run that learns nothing shows nothing"
    return runs[Ours][0], trl_runs.differences(runs[Ours][1], runs[GRPOTrainer][1], 1e-3)


@pytest.mark.parametrize(("options", "lora"), rows())
def test_six_steps_as_trl(folder: Path, options: dict[str, Any], lora: bool) -> None:
    trainer, different = both(folder, lora, max_steps=6, **options)
    assert not different, "\n".join(different)
    assert trainer.grpo_fast.depth == "loss"
    plans = ("frozen_head",) if lora else ("single_pass", "resident")
    assert trainer.grpo_fast.policy.last.plan in plans


def test_the_comparison_sees_a_difference(folder: Path) -> None:
    from trl import GRPOTrainer

    from grpo_fast.integrations.trl import GRPOTrainer as Ours

    theirs = trl_runs.train(trl_runs.trainer_of(GRPOTrainer, folder, epsilon=0.2, **RATIOS))
    ours = trl_runs.train(trl_runs.trainer_of(Ours, folder, epsilon=0.19, **RATIOS))
    assert not trl_runs.differences(ours, ours, 1e-3)
    assert any("grad_norm" in line or "loss" in line for line in trl_runs.differences(ours, theirs, 1e-3))
    assert trl_runs.differences(ours[1:], theirs, 1e-3)
