"""Stopped, killed, poisoned or failed: a run goes on from its last step, to the last bit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from grpo_fast.trainer.batch import Experience
from grpo_fast.trainer.checkpoint import checkpoints
from grpo_fast.trainer.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError, RewardError
from grpo_fast.trainer.loop import train
from grpo_fast.trainer.rollout import Completion, HFRollout
from grpo_fast.trainer.step import Updater
from tests import tiny
from tests.tiny import assert_same_run, comparable, configured, rows, weights_of


class Meddling:
    """The rollout engine of a policy made later, which does something at the n-th call."""

    def __init__(self, at_call: int, action) -> None:
        self.calls, self._at_call, self._action, self.engine = 0, at_call, action, None

    def generate(self, prompt_ids, num_generations, *, seed) -> list[Completion]:
        self.calls += 1
        completions = self.engine.generate(prompt_ids, num_generations, seed=seed)
        if self.calls == self._at_call:
            self._action(self.engine._policy.model)
        return completions


@pytest.fixture
def meddle(monkeypatch):
    """Run `action(model)` after the n-th rollout of the next `train`."""

    def install(at_call: int, action) -> None:
        meddling = Meddling(at_call, action)

        def made(policy, config, **options):
            if "temperature" in options:  # held-out evaluation is left alone
                return HFRollout(policy, config, **options)
            meddling.engine = HFRollout(policy, config, **options)
            return meddling

        monkeypatch.setattr("grpo_fast.trainer.loop.HFRollout", made)

    return install


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Uninterrupted runs to compare with, by their options; bfloat16 with masters, evaluation, schedule."""
    made: dict[str, tuple[Path, dict]] = {}

    def run(name: str) -> tuple[Path, dict]:
        if name not in made:
            folder = tmp_path_factory.mktemp("whole")
            several = {"steps_per_generation": 2, "num_iterations": 2} if name != "single" else {}
            several |= {"rollout__top_p": 0.8} if name == "supports" else {}
            changes = {
                "model__dtype": "bfloat16",
                "lr_scheduler_type": "cosine",
                "warmup_steps": 2,
                "save_steps": 2,
                "eval": {"eval_steps": 3, "temperature": 1.0},
                **several,
            }
            tiny.recipe(folder)
            changes["data__eval"] = str(folder / "train.jsonl")
            train(configured(folder, output_dir=str(folder / "whole"), **changes))
            made[name] = folder, changes
        return made[name]

    return run


@pytest.mark.parametrize("name", ["single", "several"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_continues_exactly(whole_runs, meddle, name, number):
    folder, changes = whole_runs(name)
    out = folder / f"stopped-{number.name}"
    config = configured(folder, output_dir=str(out), **changes)
    rollouts_before = 3 if name == "single" else 2
    meddle(rollouts_before, lambda model: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as stopped:
        train(config)
    # The third rollout serves step 3; the second of four steps each serves step 5.
    assert stopped.value.step == (2 if name == "single" else 4)
    assert checkpoints(out)[-1].name == f"checkpoint-{stopped.value.step:06d}"
    meddle(0, None)
    train(dataclasses.replace(config, resume="auto"))
    assert_same_run(out, folder / "whole")


@pytest.mark.parametrize("name", ["several", "supports"])
def test_a_run_stopped_amid_the_steps_of_a_rollout_continues_exactly(whole_runs, monkeypatch, name):
    folder, changes = whole_runs(name)
    out = folder / "stopped-amid"
    config = configured(folder, output_dir=str(out), **changes)
    original, calls = Updater.gradients, []

    def stops_at_third(self, *arguments):
        calls.append(1)
        metrics = original(self, *arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    monkeypatch.setattr(Updater, "gradients", stops_at_third)
    with pytest.raises(Interrupted) as stopped:
        train(config)
    monkeypatch.setattr(Updater, "gradients", original)
    assert stopped.value.step == 2
    assert (checkpoints(out)[-1] / "experience.safetensors").is_file()
    train(dataclasses.replace(config, resume="auto"))
    assert_same_run(out, folder / "whole")
    assert all(("support/mean" in row) == (name == "supports") for row in rows(out) if "loss" in row)


def test_a_run_stopped_before_its_first_step_continues_exactly(whole_runs, meddle):
    folder, changes = whole_runs("single")
    out = folder / "stopped-first"
    config = configured(folder, output_dir=str(out), **changes)
    meddle(1, lambda model: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted) as stopped:
        train(config)
    assert stopped.value.step == 0
    meddle(0, None)
    train(dataclasses.replace(config, resume="auto"))
    assert_same_run(out, folder / "whole")


@pytest.mark.slow
def test_a_killed_run_continues_exactly(whole_runs):
    """SIGKILL in the middle of step 5, in a process of its own; the last checkpoint is of step 4."""
    folder, changes = whole_runs("single")
    out = folder / "killed"
    rewards = [
        {"function": f"{folder}/my_rewards.py:letters"},
        {
            "function": f"{folder}/my_rewards.py:bomb",
            "weight": 0.0,
            # Two evaluations (before, and after step 3) of one call each, then the fifth rollout.
            "kwargs": {"signal_number": int(signal.SIGKILL), "at_call": 7, "log": str(folder / "bomb.log")},
        },
    ]
    values = tiny.recipe(folder, output_dir=str(out), **changes) | {"rewards": rewards}
    (folder / "killed.json").write_text(json.dumps(values))
    program = f"""
        import json, torch
        from grpo_fast.trainer.loop import train
        from grpo_fast.trainer.recipe import config_from_dict
        torch.use_deterministic_algorithms({torch.are_deterministic_algorithms_enabled()}, warn_only=True)
        torch.set_num_threads({torch.get_num_threads()})
        train(config_from_dict(json.load(open({str(folder / "killed.json")!r}))))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoints(out)[-1].name == "checkpoint-000004"
    assert [row["step"] for row in rows(out) if "loss" in row] == [1, 2, 3, 4]
    train(configured(folder, output_dir=str(out), resume="auto", **changes))
    bomb = "rewards/bomb"
    mine = [{k: v for k, v in row.items() if bomb not in k} for row in comparable(out)]
    assert mine == comparable(folder / "whole")
    for name, tensor in weights_of(folder / "whole").items():
        assert torch.equal(tensor, weights_of(out)[name]), name


def test_an_older_checkpoint_can_be_continued(whole_runs):
    folder, changes = whole_runs("single")
    out = folder / "branched"
    config = configured(folder, output_dir=str(out), save_total_limit=None, **changes)
    train(config)
    train(dataclasses.replace(config, resume=str(out / "checkpoint-000002")))
    assert_same_run(out, folder / "whole")
    # Nothing left to do: the run is as it was.
    train(dataclasses.replace(config, resume="auto"))
    assert_same_run(out, folder / "whole")


def test_resuming_another_run_is_refused(tmp_path):
    config = configured(tmp_path, max_steps=1)
    train(config)
    other_data = tmp_path / "other.jsonl"
    other_data.write_text('{"prompt": "x"}\n')
    resumed = dataclasses.replace(config, resume="auto", max_steps=2)
    with pytest.raises(CheckpointError, match="does not fit this recipe"):
        train(dataclasses.replace(resumed, data=dataclasses.replace(config.data, train=str(other_data))))
    larger = tiny.model("qwen3")
    larger.save_pretrained(tmp_path / "other-model")
    tiny.tokenizer().save_pretrained(tmp_path / "other-model")
    with pytest.raises(CheckpointError, match="does not fit this recipe"):
        train(dataclasses.replace(resumed, model=dataclasses.replace(config.model, path=str(tmp_path / "other-model"))))


def test_a_nan_stops_the_run_and_keeps_the_batch(tmp_path, meddle):
    def poison(model) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan

    config = configured(tmp_path, model__dtype="bfloat16", rollout__top_p=0.8)
    meddle(3, poison)
    with pytest.raises(NonFiniteError, match=r"step 3: loss is nan; .*nonfinite-000003.* step 2 \(resume=auto\)"):
        train(config)
    out = tmp_path / "run"
    assert [row["step"] for row in rows(out)] == [1, 2]
    info = json.loads((out / "nonfinite-000003" / "info.json").read_text())
    assert info["step"] == 3
    assert len(info["completions"]) == 16
    from safetensors.torch import load_file

    batch = load_file(out / "nonfinite-000003" / "batch.safetensors")
    kept = Experience.from_tensors({k: v for k, v in batch.items() if k != "completions"})
    assert kept.num_completions == 16
    assert kept.support.num_rows == kept.tokens.numel()
    # The state before it was saved and is sound: the run can go on.
    assert checkpoints(out)[-1].name == "checkpoint-000002"
    meddle(0, None)
    assert train(dataclasses.replace(config, resume="auto")).step == 6


def test_a_failing_reward_loses_nothing(tmp_path, caplog):
    """What fails for a batch is missing there; a function that does not recover ends the run, after its last step."""
    tiny.recipe(tmp_path)
    file = tmp_path / "fails_late.py"
    program = """
        calls = []

        def fails_late(completions, until, **columns):
            calls.append(1)
            if 3 <= len(calls) <= until:
                raise RuntimeError("no answer from the judge")
            return [float(len(text)) for text in completions]
    """
    file.write_text(textwrap.dedent(program))

    def config(until: int, **changes):
        reward = {"function": f"{file}:fails_late", "kwargs": {"until": until}, "retries": 0}
        return configured(tmp_path, rewards=[reward], **changes)

    with pytest.raises(RewardError, match="'fails_late' raised RuntimeError: no answer from the judge"):
        train(config(5))
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-000004"
    said = [record.message for record in caplog.records if "it is missing for these 16 completions" in record.message]
    assert len(said) == 2
    found = rows(tmp_path / "run")
    assert [row["reward"] is None for row in found] == [False, False, True, True]
    assert all(row["grad_norm"] == 0 for row in found[2:])
    assert train(config(5, resume="auto")).step == 6
    assert [row["reward"] is None for row in rows(tmp_path / "run")] == [False, False, True, True, False, False]


def test_an_output_dir_in_use_is_protected(tmp_path):
    config = configured(tmp_path, max_steps=1)
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files; add overwrite=true"):
        train(config)
    train(dataclasses.replace(config, overwrite=True))
    with pytest.raises(ConfigError, match="up to checkpoint-000001; add resume=auto to continue it, overwrite=true to"):
        train(config)
    train(dataclasses.replace(config, overwrite=True, max_steps=2))
    assert [row["step"] for row in rows(out)] == [1, 2]
    assert [path.name for path in checkpoints(out)] == ["checkpoint-000002"]
    assert (out / "thesis.tex").read_text() == "years of work"
