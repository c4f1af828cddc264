"""Runs whose sampler cuts the vocabulary: the loss is on what was kept, from the sampler to the last pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_fast.backends.base import get_backend
from grpo_fast.packing import Support
from grpo_fast.trainer import loop
from grpo_fast.trainer import rollout as rollouts
from grpo_fast.trainer.experience import ScoredRollout, to_experience
from grpo_fast.trainer.loop import train
from grpo_fast.trainer.rollout import Completion, HFRollout
from tests import tiny
from tests.tiny import configured, rows

LIMIT = 8
"""Words of the largest support whose row is sparse."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a model that is surer of some words than of others, and a head whose small supports are sparse rows."""
    for backend in ("torch", "cpu"):
        monkeypatch.setattr(type(get_backend(backend)), "sparse_share", lambda *arguments: tiny.VOCAB_SIZE // LIMIT)
    tiny.recipe(tmp_path)
    tiny.save(tmp_path / "model", scale=0.5)
    return tmp_path


def run(folder, **changes: Any) -> list[dict[str, Any]]:
    """The steps' metrics."""
    defaults = {"max_steps": 4, "num_iterations": 2, "loss__beta": 0.1, "output_dir": str(folder / "run")}
    config = configured(folder, overwrite=True, **{**defaults, **changes})
    train(config)
    return [row for row in rows(folder / "run") if "loss" in row]


@pytest.mark.parametrize(
    "options", [{"top_p": 0.8}, {"top_k": 6}, {"min_p": 0.2}], ids=lambda options: "".join(options)
)
def test_old_reference_and_current_policy_are_on_the_supports(folder, options):
    changes = {f"rollout__{name}": value for name, value in options.items()}
    found, full = run(folder, **changes), run(folder, loss__support="off", **changes)
    assert found[0]["reward"] == full[0]["reward"]  # the same completions
    for row in (found[0], found[2]):  # fresh rollouts
        assert row["ratio/min"] == row["ratio/max"] == 1
        assert row["sampling/sampling_logp_difference/max"] < 2e-5
        assert row["bad_rows"] == 0
    assert found[0]["kl"] == 0
    assert found[1]["ratio/max"] > 1
    assert found[-1]["kl"] > 0
    # The whole vocabulary has another distribution than the sampler's: by the mass that was cut.
    assert all(row["sampling/sampling_logp_difference/mean"] > 0.05 for row in full)
    assert full[0]["entropy"] > found[0]["entropy"] + 0.05
    assert not any(name.startswith("support/") for row in full for name in row)
    for row in found:
        assert 1 <= row["support/median"] <= row["support/max"] <= tiny.VOCAB_SIZE
        if "top_k" in options:
            assert row["support/mean"] == row["support/max"] == 6
            assert (row["support/sparse_fraction"], row["support/singleton_fraction"]) == (1, 0)
        else:  # rows of all kinds
            assert row["support/singleton_fraction"] > 0
            assert 0 < row["support/sparse_fraction"] < 1 - row["support/singleton_fraction"]


def test_a_correction_sees_no_mismatch(folder):
    """Where it would take the mass that was cut for one."""
    options = {"rollout__top_p": 0.5, "loss__importance_sampling_mode": "sequence_truncate", "num_iterations": 1}
    ratio = "sampling/importance_sampling_ratio"
    found, full = run(folder, max_steps=1, **options)[0], run(folder, max_steps=1, loss__support="off", **options)[0]
    assert found[f"{ratio}/min"] == pytest.approx(1, abs=1e-4)
    assert found[f"{ratio}/max"] == pytest.approx(1, abs=1e-4)
    assert full[f"{ratio}/mean"] < 0.5


def test_only_training_records(folder, monkeypatch):
    calls: list[int] = []
    kept = rollouts._kept
    monkeypatch.setattr(rollouts, "_kept", lambda *arguments: calls.append(1) or kept(*arguments))
    data = {"data__eval": str(folder / "train.jsonl"), "rollout__top_p": 0.8}
    run(folder, max_steps=0, **data)
    run(folder, max_steps=1, loss__support="off", **data)
    run(folder, max_steps=1)
    assert not calls
    run(folder, max_steps=1, **data)
    assert 0 < len(calls) <= 6  # tokens of a completion


def scored(completions: list[Completion]) -> ScoredRollout:
    return ScoredRollout(
        examples=[object()],
        prompt_ids=[[5, 6]],
        completions=completions,
        texts=[""] * len(completions),
        rewards=torch.arange(float(len(completions)))[:, None],
        names=["r"],
        weights=torch.ones(1),
        seconds={},
    )


def test_an_engines_own_supports(folder):
    """Of some of its completions, in int64: the others' rows are whole."""
    some = Support(torch.tensor([7, 8, 9]), torch.tensor([0, 2, 2, 3]))
    completions = [Completion([1, 2], [0.0, 0.0], True), Completion([7, 3, 9], [0.0] * 3, True, some)]
    config = configured(folder)
    made = to_experience(scored(completions), config).support
    assert made.token_ids.dtype == torch.int32
    assert made.token_ids.tolist() == [7, 8, 9]
    assert made.sizes.tolist() == [0, 0, 2, 0, 1]
    assert to_experience(scored([*completions[:1]] * 2), config).support is None
    assert to_experience(scored(completions), configured(folder, loss__support="off")).support is None


class Samples:
    """An engine of one's own that returns what it kept."""

    def __init__(self) -> None:
        self.inner: Any = None

    def generate(self, prompt_ids, num_generations, *, seed):
        return self.inner.generate(prompt_ids, num_generations, seed=seed)


def test_an_engine_that_cuts_by_itself(folder, monkeypatch):
    """Supports are used where they come, whatever the recipe says of sampling."""
    config = configured(folder, max_steps=2, num_iterations=2, overwrite=True)
    cutting = configured(folder, rollout__top_p=0.8).rollout
    engine = Samples()
    make = loop.make_updater

    def spied(given):
        updater = make(given)
        engine.inner = HFRollout(updater.policy, cutting, supports=True)
        return updater

    monkeypatch.setattr(loop, "make_updater", spied)
    train(config, engine=engine)
    first = rows(folder / "run")[0]
    assert first["ratio/min"] == first["ratio/max"] == 1
    assert first["sampling/sampling_logp_difference/max"] < 2e-5
    assert first["support/mean"] < tiny.VOCAB_SIZE
