"""The TRL benchmarks run on a tiny model and write what they measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.trl_loss import trl_missing

pytestmark = pytest.mark.skipif(trl_missing() is not None, reason=str(trl_missing()))
pytest.importorskip("datasets")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(tiny.save(tmp_path / "model"))


def run(name: str, out: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    importlib.import_module(name).main(["--out", str(out), *arguments])
    return json.loads(out.read_text())


def test_step(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--completions", "4", "--length", "6", "--rounds", "2", "--weights", "float32")
    result = run("trl_step", tmp_path / "step.json", "--model", model, *sizes, monkeypatch=monkeypatch)
    rows = {(row["mode"], row["contender"]): row for row in result["rows"]}
    assert len(rows) == 6
    assert result["tokens"] == 24
    for mode in ("update", "loss part"):
        losses = [row["loss"] for (kind, _), row in rows.items() if kind == mode]
        assert max(losses) - min(losses) <= 1e-4 * abs(losses[0]) + 1e-6
        assert rows[mode, "trl"]["faster_than_trl"] == 1
    assert all(len(row["seconds"]) == 2 for row in rows.values())


def test_parity(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--model", model, "--losses", "cispo", "--steps", "2")
    result = run("trl_parity", tmp_path / "parity.json", *options, monkeypatch=monkeypatch)
    first, second = result["rows"]
    assert set(first["with"]) | set(second["with"]) == {"kl", "accumulation", "truncation", "lora"}
    assert not set(first["with"]) & set(second["with"])
    for row in result["rows"]:
        assert len(row["trl"]) == len(row["grpo-fast"]) == 2
        assert max(row["differences"].values()) < 1e-3
