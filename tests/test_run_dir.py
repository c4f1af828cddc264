"""The folder of a run: what is in the way is set aside whole, and nothing is touched before all was checked."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.trainer.checkpoint import checkpoint_at, checkpoints, load_checkpoint
from grpo_fast.trainer.config import RewardConfig, TrainConfig
from grpo_fast.trainer.errors import ConfigError, DataError, ModelError, RewardError
from grpo_fast.trainer.loop import train
from grpo_fast.trainer.run_dir import begin, find_start, remove_replaced
from tests import tiny
from tests.kills import killed_everywhere
from tests.tiny import assert_same_run, configured, rows


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def old_run(folder: Path, *steps: int) -> None:
    """Files that look like a run's, and one of the user's."""
    for step in steps or (2, 4):
        (folder / f"checkpoint-{step:06d}").mkdir(parents=True)
        (folder / f"checkpoint-{step:06d}" / "state.json").write_text(f"state {step}")
        (folder / f"checkpoint-{step:06d}" / "trainer.safetensors").write_text(f"weights {step}")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("a model")
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "thesis.tex").write_text("years of work")


def config_of(folder: Path, tmp_path: Path, **changes: Any) -> TrainConfig:
    return dataclasses.replace(configured(tmp_path), output_dir=str(folder), **changes)


# -- setting aside ----------------------------------------------------------------------------------------------------


def test_a_kill_while_an_earlier_run_is_set_aside_loses_nothing(tmp_path):
    tiny.recipe(tmp_path)

    def replace(folder: Path) -> None:
        checkpoint = find_start(config_of(folder, tmp_path, overwrite=True))
        begin(folder, checkpoint, 0)

    whole = tmp_path / "whole"
    whole.mkdir()
    old_run(whole)
    expected = files_of(whole)
    count = 0
    for folder in killed_everywhere(tmp_path, old_run, replace):
        count += 1
        assert find_start(config_of(folder, tmp_path, resume="auto")) in (None, folder / "checkpoint-000004")
        found = files_of(folder)
        assert found.pop("thesis.tex") == b"years of work"
        # In place or aside, but all of it in one place.
        places = {name.partition("/")[0] == "replaced-1" for name in found}
        assert len(places) == 1
        assert {name.removeprefix("replaced-1/"): data for name, data in found.items()} | {
            "thesis.tex": b"years of work"
        } == expected
        replace(folder)
        assert checkpoint_at(folder) is None
    assert count > 5


def test_a_kill_while_later_checkpoints_are_set_aside_loses_nothing(tmp_path):
    tiny.recipe(tmp_path)

    def go_back(folder: Path) -> list[str]:
        older = find_start(config_of(folder, tmp_path, resume=str(folder / "checkpoint-000002")))
        return begin(folder, older, 2)

    for folder in killed_everywhere(tmp_path, old_run, go_back):
        find_start(config_of(folder, tmp_path, resume="auto"))
        aside = folder / "replaced-1"
        assert (folder if not aside.exists() else aside) / "checkpoint-000004" in checkpoints(folder) + checkpoints(
            aside
        )
        assert (folder / "metrics.jsonl").read_text().count("\n") == 5
        assert (folder / "checkpoint-000002" / "state.json").read_text() == "state 2"
    folder = tmp_path / "whole"
    folder.mkdir()
    old_run(folder)
    (line,) = go_back(folder)
    assert line == (f"set aside, in {folder / 'replaced-1'}: checkpoints after step 2 and the metrics of all steps")
    assert sorted(path.name for path in (folder / "replaced-1").iterdir()) == ["checkpoint-000004", "metrics.jsonl"]
    assert go_back(folder) == []


def test_what_was_set_aside_goes_with_the_end_of_a_run_that_overwrites(tmp_path):
    for number in (1, 2, 10):
        (tmp_path / f"replaced-{number}").mkdir()
    (tmp_path / "replaced-by-me").mkdir()
    old_run(tmp_path)
    begin(tmp_path, None, 0)
    assert (tmp_path / "replaced-11" / "model" / "config.json").is_file()
    remove_replaced(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replaced-by-me", "thesis.tex"]


def test_a_checkpoint_of_another_run(tmp_path):
    """Then all of the run that is in the folder is in the way."""
    tiny.recipe(tmp_path)
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        folder.mkdir()
        old_run(folder)
    start = find_start(config_of(mine, tmp_path, resume=str(other)))
    assert start == other / "checkpoint-000004"
    begin(mine, start, 4)
    assert sorted(path.name for path in mine.iterdir()) == ["replaced-1", "thesis.tex"]
    assert len(checkpoints(mine / "replaced-1")) == 2


# -- nothing is touched before all was checked ------------------------------------------------------------------------


def test_a_run_that_cannot_begin_touches_nothing(tmp_path):
    tiny.recipe(tmp_path)
    out = tmp_path / "run"
    train(configured(tmp_path, max_steps=1))
    before = files_of(out)
    config = configured(tmp_path, overwrite=True)
    model, data, rollout = config.model, config.data, config.rollout
    wrong = [
        (RewardError, {"rewards": [RewardConfig(function=f"{tmp_path}/my_rewards.py:lettters")]}),
        (RewardError, {"rewards": [RewardConfig(function="exact_answer", kwargs={"column": "answr"})]}),
        (ModelError, {"model": dataclasses.replace(model, path=str(tmp_path / "nothing"))}),
        (DataError, {"data": dataclasses.replace(data, train=str(tmp_path / "nothing.jsonl"))}),
        (DataError, {"rollout": dataclasses.replace(rollout, max_prompt_length=1)}),
        (ConfigError, {"eval": dataclasses.replace(config.eval, success_reward="x")}),
    ]
    for error, changes in wrong:
        for starting in ({"overwrite": True}, {"resume": "auto", "overwrite": False}):
            with pytest.raises(error):
                train(dataclasses.replace(config, **changes, **starting))
            assert files_of(out) == before, changes


@pytest.mark.parametrize("key", ["model.path", "data.train", "data.eval", "rewards[0].function", "plugins[0]"])
def test_inputs_within_what_is_replaced_are_refused(tmp_path, key):
    out = tmp_path / "run"
    out.mkdir()
    old_run(out)
    config = configured(tmp_path, overwrite=True)
    inside = str(out / "model" / "x")
    if key == "rewards[0].function":
        config.rewards[0].function = f"{inside}:f"
    elif key == "plugins[0]":
        config.plugins.append(inside)
    else:
        section, _, name = key.partition(".")
        setattr(getattr(config, section), name, inside)
    before = files_of(out)
    with pytest.raises(ConfigError) as said:
        find_start(config)
    assert str(said.value).startswith(f"{key}: expected something outside of what this run replaces in {out}; got")
    assert files_of(out) == before
    find_start(dataclasses.replace(config, resume=str(out / "checkpoint-000002")))  # nothing of it is in the way


# -- runs -------------------------------------------------------------------------------------------------------------


def test_an_earlier_run_is_there_until_the_new_one_has_ended(tmp_path):
    tiny.recipe(tmp_path)
    (tmp_path / "late.py").write_text(
        textwrap.dedent(
            """
            from pathlib import Path
            seen = []
            def looks(completions, folder, fail, **columns):
                seen.append(sorted(path.name for path in Path(folder).glob("replaced-*/checkpoint-*")))
                if fail:
                    raise RuntimeError("no answer")
                return [float(len(text)) for text in completions]
            """
        )
    )
    out = tmp_path / "run"
    train(configured(tmp_path, max_steps=1, export_final=True))
    first = files_of(out)

    def again(fail: bool, **changes: Any) -> None:
        reward = {"function": f"{tmp_path}/late.py:looks", "kwargs": {"folder": str(out), "fail": fail}, "retries": 0}
        train(configured(tmp_path, max_steps=2, rewards=[reward], **changes))

    with pytest.raises(RewardError, match="no answer"):
        again(True, overwrite=True)
    assert {name: (out / "replaced-1" / name).read_bytes() for name in first} == first
    again(False, overwrite=True)
    assert not list(out.glob("replaced-*"))
    assert [row["step"] for row in rows(out)] == [1, 2]


def test_resume_without_a_checkpoint_keeps_what_there_is(tmp_path):
    tiny.recipe(tmp_path)
    out = tmp_path / "run"
    train(configured(tmp_path, max_steps=3))
    for checkpoint in checkpoints(out):
        checkpoint.rename(tmp_path / checkpoint.name)  # as a SIGKILL before the first one leaves it
    before = files_of(out)
    train(configured(tmp_path, max_steps=1, resume="auto"))
    assert files_of(out / "replaced-1") == before
    assert [row["step"] for row in rows(out)] == [1]
    train(configured(tmp_path, max_steps=2, resume="auto"))
    assert files_of(out / "replaced-1") == before


def test_going_back_keeps_the_future(tmp_path):
    tiny.recipe(tmp_path)
    out = tmp_path / "run"
    train(configured(tmp_path, max_steps=4, save_steps=1, save_total_limit=None))
    before, lines = files_of(out), rows(out)
    train(configured(tmp_path, max_steps=4, save_steps=1, save_total_limit=None, resume=str(out / "checkpoint-000002")))
    aside = files_of(out / "replaced-1")
    assert {name.partition("/")[0] for name in aside} - {"completions.jsonl"} == {
        *("checkpoint-000003", "checkpoint-000004", "metrics.jsonl")
    }
    assert all(before[name] == data for name, data in aside.items())
    assert [row["step"] for row in rows(out)] == [row["step"] for row in lines] == [1, 2, 3, 4]


def test_checkpoints_by_the_clock(tmp_path, monkeypatch, capsys):
    tiny.recipe(tmp_path)
    now = [0.0]
    monkeypatch.setattr("grpo_fast.trainer.loop.time.monotonic", lambda: now[0])
    original = time.perf_counter

    def minute_later() -> float:
        now[0] += 1.0
        return original()

    monkeypatch.setattr("grpo_fast.trainer.loop.time.perf_counter", minute_later)
    train(configured(tmp_path, max_steps=6, save_total_limit=None))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-000006"], "ten minutes did not pass"
    before = now[0]
    train(configured(tmp_path, max_steps=6, save_total_limit=None, save_minutes=0.2, overwrite=True))
    found = [int(path.name[-6:]) for path in checkpoints(tmp_path / "run")]
    assert 6 > len(found) > 1, now[0] - before
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"checkpoint-{found[0]:06d}: ")]
    assert len(said) == 1
    assert " MiB in " in said[0]


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(tmp_path):
    """SIGKILL at ten random moments of a run that overwrites another, saves at each step and exports: the run before
    is whole until the end, no checkpoint is lost, and the end is that of a run that nobody killed."""
    options: dict[str, Any] = {"save_steps": 1, "export_final": True, "max_steps": 30}
    tiny.recipe(tmp_path)
    train(configured(tmp_path, output_dir=str(tmp_path / "expected"), **options))
    out = tmp_path / "run"
    train(configured(tmp_path, max_steps=2, seed=1, export_final=True))
    earlier = files_of(out)
    draw, newest, replaced, killed = random.Random(0), 0, False, 0
    for number in range(11):
        resume = "auto" if replaced else None
        code, said = _run_and_kill(
            tiny.recipe(tmp_path, overwrite=True, resume=resume, **options),
            tmp_path / "recipe.json",
            after=draw.uniform(0, 2.5) if number < 10 else None,
        )
        assert code in (0, -signal.SIGKILL), said
        killed += code != 0
        find_start(config_of(out, tmp_path, resume="auto"))  # mends what was half done
        if code == 0:
            replaced = True
        elif (out / "replaced-1").exists():
            replaced = True
            assert files_of(out / "replaced-1") == earlier
        elif not replaced:
            assert files_of(out) == earlier
        if replaced:
            found = checkpoints(out)
            assert all(load_checkpoint(checkpoint).step for checkpoint in found)
            last = int(found[-1].name[-6:]) if found else 0
            assert last >= newest, "a finished checkpoint was lost"
            newest = last
    assert killed > 2
    assert not list(out.glob("replaced-*"))
    assert_same_run(out, tmp_path / "expected")
    assert files_of(out / "model") == files_of(tmp_path / "expected" / "model")


def _run_and_kill(recipe: dict[str, Any], file: Path, after: float | None) -> tuple[int, str]:
    """(exit code, what it said) of a run in a process of its own, killed so many seconds after its imports."""
    file.write_text(json.dumps(recipe))
    program = f"""
        import json, torch
        torch.set_num_threads(1)
        from grpo_fast.trainer.loop import train
        from grpo_fast.trainer.recipe import config_from_dict
        print("ready", flush=True)
        train(config_from_dict(json.load(open({str(file)!r}))))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if after is not None:
        time.sleep(after)
        process.kill()
    said = process.communicate()[0]
    return process.returncode, said
