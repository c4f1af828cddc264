"""The command line as a user meets it: what each mistake prints, and the three commands on a tiny model."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from grpo_fast.cli import main
from grpo_fast.install import install_command
from tests import tiny


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a tiny recipe with some changes and returns its path; the hub is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def write(**changes) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(tiny.recipe(tmp_path, **changes)))
        return str(file)

    return write


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# what is wrong -> (changes of the recipe, overrides, what the one line says)
MISTAKES = {
    "unknown key": ({}, ["learning_rat=1"], "learning_rat: no such key; did you mean learning_rate?"),
    "unknown key in the file": ({"optimiser": "adam"}, [], "optimiser: no such key; did you mean "),
    "wrong type": ({}, ["max_steps=many"], "max_steps: Value 'many'"),
    "out of range": ({}, ["rollout.top_p=0"], "rollout.top_p: expected"),
    "no key=value": ({}, ["fast"], "override: expected key=value; got 'fast'"),
    "no such model folder": ({}, ["model.path=./nowhere"], "model.path: expected a model folder or a hub name"),
    "a folder without a model": ({}, ["model.path={tmp}/empty"], "has no config.json"),
    "a model that is not on the hub": ({}, ["model.path=nobody/nothing"], "model.path: cannot load nobody/nothing"),
    "a hub that is out of reach": ({}, ["model.path=nomodel"], "no such model in the cache"),
    "no such data": ({}, ["data.train={tmp}/none.jsonl"], "none.jsonl does not exist"),
    "empty data": ({}, ["data.train={tmp}/empty.jsonl"], "expected at least one example; got none"),
    "no prompt column": ({}, ["data.prompt_column=question"], "expected a column 'question'"),
    "unknown task": ({}, ["data.train=null", "data.task=chain_sun"], "did you mean chain_sum"),
    "unknown reward": ({}, ["rewards.0.function=exact_anser"], "did you mean exact_answer"),
    "a reward file that is missing": ({}, ["rewards.0.function=none.py:f"], "no such file: none.py"),
    "a reward that raises": ({}, ["rewards.0.function={tmp}/my_rewards.py:raises"], "'raises' raised KeyError"),
    "a reward of the wrong length": (
        {},
        ["rewards.0.function={tmp}/my_rewards.py:wrong_length"],
        "reward 'wrong_length': expected 16 numbers, one a completion; got 1",
    ),
    "a missing column": ({}, ["rewards.0={{function: exact_answer, kwargs: {{column: gold}}}}"], "column gold"),
    "no such device": ({}, ["device=cuda:99"], "device: cuda:99 cannot be used here"),
    "no such backend": ({}, ["backend=abacus"], "backend: expected auto"),
    "no such checkpoint": ({}, ["resume={tmp}/none"], "resume: expected auto, a checkpoint or a run"),
    "a schedule of fantasy": ({}, ["lr_scheduler_type=uphill"], "lr_scheduler_type: expected one of"),
    "no such LoRA target": ({}, ["model.lora.target_modules=[nothing]"], "model.lora: "),
    "eval by an unknown reward": ({}, ["eval.success_reward=joy"], "eval.success_reward: expected one of letters"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(recipe, capsys, tmp_path, mistake):
    changes, overrides, message = MISTAKES[mistake]
    file = recipe(**changes)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    code, _, error = run(capsys, "train", file, *[text.format(tmp=tmp_path) for text in overrides])
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.strip().count("\n") == 0
    assert "Traceback" not in error


def test_debug_shows_the_traceback(recipe):
    from grpo_fast.trainer.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["train", recipe(), "learning_rat=1", "--debug"])


def test_missing_recipe(capsys, tmp_path):
    code, _, error = run(capsys, "train", str(tmp_path / "none.yaml"))
    assert code == 2
    assert "recipe: expected a YAML file" in error
    code, _, error = run(capsys, "train")
    assert code == 2
    assert "expected a YAML file; got none" in error


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["eval", "--help"], ["export", "--help"], ["doctor", "--help"]]
)
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "grpo-fast" in text
    if arguments == ["--help"]:
        for command in ("train", "eval", "export", "doctor", "resume=auto"):
            assert command in text


def test_a_bare_command_prints_help(capsys):
    code, out, error = run(capsys)
    assert code == 0
    assert out.startswith("usage: grpo-fast")
    assert "grpo-fast train recipes/demo.yaml" in out
    assert not error


def test_options_are_listed(capsys):
    code, out, _ = run(capsys, "train", "--options")
    assert code == 0
    assert "rollout.num_generations = 8" in out


def test_help_imports_nothing_heavy():
    program = (
        "import sys; sys.argv = ['grpo-fast']; import grpo_fast.cli; grpo_fast.cli.build_parser(); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "omegaconf", "numpy"} & set(loaded)


def test_train_eval_export(recipe, capsys, tmp_path):
    file = recipe(max_steps=12, learning_rate=1e-2, export_final=True)
    held_out = [f"data.eval={tmp_path / 'train.jsonl'}", "rollout.num_generations=8"]
    before = run(capsys, "eval", file, *held_out)
    code, out, error = run(capsys, "train", file, *held_out)
    assert (code, error) == (0, "")
    assert "12 steps in " in out
    assert "held-out pass@1: " in out
    assert f"model              {tmp_path}/run/model" in out
    after = run(capsys, "eval", str(tmp_path / "run"))
    assert (before[0], after[0]) == (0, 0)

    def reward(printed: str) -> float:
        return next(float(line.split()[1]) for line in printed.splitlines() if line.split()[0] == "reward")

    assert reward(after[1]) > reward(before[1]) + 0.1
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert reward(after[1]) == pytest.approx(last["eval/reward"], abs=1e-4)

    target = tmp_path / "exported"
    assert run(capsys, "export", str(tmp_path / "run" / "checkpoint-000012"), str(target))[0] == 0
    assert (target / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "model" / "model.safetensors"
    ).read_bytes()
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {path.name for path in target.iterdir()}
    again = run(capsys, "eval", file, *held_out, f"model.path={target}")
    assert reward(again[1]) == reward(after[1])
    code, _, error = run(capsys, "export", str(tmp_path / "run"), str(target))
    assert code == 2
    assert "OUT: expected a folder that does not exist yet" in error
    code, _, error = run(capsys, "export", str(tmp_path / "model"), str(tmp_path / "x"))
    assert code == 2
    assert "run: expected a checkpoint or a run with checkpoints" in error


def test_eval_without_held_out_prompts(recipe, capsys):
    code, _, error = run(capsys, "eval", recipe())
    assert code == 2
    assert "expected held-out prompts" in error


def test_a_second_run_into_the_same_folder(recipe, capsys):
    file = recipe(max_steps=1)
    assert run(capsys, "train", file)[0] == 0
    code, _, error = run(capsys, "train", file)
    assert code == 2
    assert "resume=auto to continue it" in error
    assert run(capsys, "train", file, "resume=auto", "max_steps=2")[0] == 0


def test_ctrl_c_says_how_to_go_on(recipe, capsys, tmp_path):
    rewards = tmp_path / "my_rewards.py"
    bomb = {"signal_number": int(signal.SIGINT), "at_call": 3, "log": str(tmp_path / "bomb.log")}
    file = recipe()
    values = yaml.safe_load(Path(file).read_text())
    values["rewards"].append({"function": f"{rewards}:bomb", "weight": 0.0, "kwargs": bomb})
    Path(file).write_text(yaml.safe_dump(values))
    before = signal.getsignal(signal.SIGINT)
    code, _, error = run(capsys, "train", file, "overwrite=true", "max_steps=4")
    assert code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped after step 2" in error
    command = error.strip().splitlines()[-1].strip()
    assert command == f"grpo-fast train {file} max_steps=4 resume=auto"
    code, out, _ = run(capsys, *shlex.split(command)[1:])
    assert code == 0
    assert "continuing after step 2" in out
    assert "4 steps in" in out


def test_a_missing_package_names_the_extra(recipe, capsys, monkeypatch):
    def gone(*arguments):
        raise ModuleNotFoundError("No module named 'reasoning_gym_x'", name="reasoning_gym_x")

    monkeypatch.setattr("grpo_fast.trainer.recipe.load_config", gone)
    code, _, error = run(capsys, "train", recipe())
    assert code == 2
    assert f"error: reasoning_gym_x is not installed; run {install_command('train')}\n" in error


def test_out_of_memory_is_explained(recipe, capsys, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

    monkeypatch.setattr("grpo_fast.trainer.loop.train", full)
    code, _, error = run(capsys, "train", recipe())
    assert code == 1
    assert "lower max_tokens_per_microbatch" in error
    assert os.linesep.join(["", "  CUDA out of memory"]) in error
