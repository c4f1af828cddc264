"""The examples that need no cluster run as they stand, on a tiny model; the others name what exists."""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from grpo_fast.config import LossConfig
from tests import tiny
from tests.trl_loss import trl_missing

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Accelerate would take the GPU for a tiny model")
def test_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    run("plain_loop.py", str(tiny.save(tmp_path / "model")), "--steps", "2", monkeypatch=monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    assert "nan" not in " ".join(lines)


@pytest.mark.skipif(trl_missing() is not None, reason=str(trl_missing()))
def test_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(tiny.save(tmp_path / "model")), str(tmp_path / "run")
    run("trl_grpo.py", model, "--max_steps", "2", "--use_cpu", "--output_dir", out, monkeypatch=monkeypatch)
    assert "depth 'loss'" in capsys.readouterr().out


def test_nemo_rl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("nemo_rl.py", monkeypatch=monkeypatch)
    assert "token level: True" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["verl.sh", "slime.sh", "prime_rl.toml", "openrlhf.py", "torchtitan_rl.py"])
def test_what_the_others_name_exists(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    named = {word.strip("\"'(){},") for word in text.replace("=", " ").split() if "grpo_fast.integrations." in word}
    assert named
    for dotted in named:
        parts = dotted.split(".")
        module = import_module(".".join(parts[:3]))
        assert all(hasattr(module, attribute) for attribute in parts[3:]), dotted


def test_prime_rl_options() -> None:
    tomllib = pytest.importorskip("tomllib")
    loss = tomllib.loads((EXAMPLES / "prime_rl.toml").read_text())["trainer"]["loss"]
    assert LossConfig(**loss["kwargs"]).epsilon_high == 0.28
