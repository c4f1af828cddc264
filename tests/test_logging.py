"""What a run tells: the lines of its files and their fate on a resume, what is printed, the trackers, the plot."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from grpo_fast.trainer import logging as logging_module
from grpo_fast.trainer.config import LoggingConfig
from grpo_fast.trainer.errors import ConfigError
from grpo_fast.trainer.logging import RunLogger
from grpo_fast.trainer.plot import plot_run, read_metrics, smooth

STEP = {"reward": 0.25, "loss": -1e-8, "entropy": 0.8125, "tokens_per_second": 12345.0, "step_time": 60.0}
SAMPLE = {"prompt": "1 + 1 =", "completion": "2", "rewards": {"exact": 1.0}, "advantage": 0.5}


def _logger(folder, start_step=0, *, terminal=False, width=100, max_steps=40, **options) -> RunLogger:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    config = LoggingConfig(**({"plot_steps": 0} | options))
    return RunLogger(folder, config, max_steps, start_step, console=console)


def _printed(logger: RunLogger) -> str:
    return logger._console.file.getvalue()  # type: ignore[attr-defined]


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- files ----------------------------------------------------------------------------------------------------------


def test_metrics_file(tmp_path):
    with _logger(tmp_path / "new" / "run") as logger:
        logger.eval(0, {"pass@1": 0.5, "eval/reward": 0.25})
        logger.step(1, STEP | {"kl": math.nan, "grad_norm": -math.inf})
        # Every line is in the file at once, not when the logger is closed.
        assert len(_lines(tmp_path / "new" / "run" / "metrics.jsonl")) == 2
        logger.step(2, {"a": torch.tensor(1.5), "b": np.float32(2.5), "c": True, "d": 3, "step": 7})
    assert _lines(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"step": 0, "eval/pass@1": 0.5, "eval/reward": 0.25},
        {"step": 1, **STEP, "kl": None, "grad_norm": None},
        {"step": 2, "a": 1.5, "b": 2.5, "c": 1.0, "d": 3.0},
    ]


@pytest.mark.parametrize("value", ["0.5", None, [1.0], torch.zeros(2)])
def test_metrics_must_be_numbers(tmp_path, value):
    with _logger(tmp_path) as logger, pytest.raises(ValueError, match=r"metric 'loss': expected a number; got"):
        logger.step(1, {"loss": value})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_completions_file(tmp_path):
    messages = [{"role": "user", "content": "Grüße \u2028"}]
    with _logger(tmp_path) as logger:
        logger.samples(
            3, [SAMPLE, SAMPLE | {"prompt": messages, "rewards": {"a": None, "b": math.nan}, "advantage": None}]
        )
    first, second = (tmp_path / "completions.jsonl").read_text(encoding="utf-8").split("\n")[:2]
    assert json.loads(first) == {"step": 3, **SAMPLE}
    assert json.loads(second) == {
        "step": 3,
        "prompt": messages,
        "completion": "2",
        "rewards": {"a": None, "b": None},
        "advantage": None,
    }
    with _logger(tmp_path, log_completions=False) as logger:
        logger.samples(3, [SAMPLE])
    assert (tmp_path / "completions.jsonl").read_text() == ""
    assert _printed(logger) == ""


def _run(folder: Path, steps: range, start_step: int, tear: bool = False) -> None:
    with _logger(folder, start_step) as logger:
        for step in steps:
            logger.step(step, {"loss": step / 3})
            if step % 2 == 0:
                logger.eval(step, {"reward": step / 7})
                logger.samples(step, [SAMPLE])
    if tear:
        for name in ("metrics.jsonl", "completions.jsonl"):
            with open(folder / name, "ab") as file:
                file.write('{"step": 4, "loss": 1.3, "é'.encode()[:-1])


def test_resumed_files_are_those_of_a_run_in_one_go(tmp_path):
    _run(tmp_path / "whole", range(1, 9), 0)
    _run(tmp_path / "resumed", range(1, 7), 0, tear=True)
    _run(tmp_path / "resumed", range(5, 9), 4)
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(tmp_path.rglob("*.tmp"))
    _run(tmp_path / "resumed", range(1, 2), 0)  # a run that starts anew
    assert _lines(tmp_path / "resumed" / "metrics.jsonl") == [{"step": 1, "loss": 1 / 3}]


def test_cutting_is_atomic(tmp_path, monkeypatch):
    _run(tmp_path, range(1, 7), 0)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        _logger(tmp_path, 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_killed_process_leaves_whole_lines(tmp_path):
    code = f"""
import os, signal
from grpo_fast.trainer.config import LoggingConfig
from grpo_fast.trainer.logging import RunLogger
logger = RunLogger({str(tmp_path)!r}, LoggingConfig(plot_steps=0, progress=False), 10)
for step in range(1, 4):
    logger.step(step, {{f"metric_{{i}}": i / 7 for i in range(2000)}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    env = os.environ | {"PYTHONPATH": str(Path(logging_module.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -signal.SIGKILL
    assert [(row["step"], len(row)) for row in _lines(tmp_path / "metrics.jsonl")] == [(s, 2001) for s in (1, 2, 3)]


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_plain_lines_without_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(logging_module.time, "monotonic", lambda: 100.0)  # however busy the machine
    with _logger(tmp_path, max_steps=1000) as logger:
        logger.eval(0, {"reward": 0.25, "pass@1": 0.5, "completions/mean_length": 9.0})
        logger.step(1, STEP)
        logger.step(2, {"loss": math.nan})
        logger.message("saved [bold]x[/bold]")
    assert _printed(logger).splitlines() == [
        "held-out after step 0: reward 0.250  pass@1 0.500",
        "step    1/1000  reward 0.250  loss -1e-08  entropy 0.812  12.3k tok/s  ETA 16:39:00",
        "step    2/1000  loss nan  ETA 0:00",
        "saved [bold]x[/bold]",
    ]


def test_no_progress(tmp_path):
    with _logger(tmp_path, progress=False, terminal=True) as logger:
        logger.step(1, STEP)
    assert _printed(logger) == ""


@pytest.mark.parametrize("width", [80, 140])
def test_bar_on_a_terminal_shows_everything(tmp_path, width):
    with _logger(tmp_path, 17, terminal=True, width=width) as logger:
        logger.step(18, STEP)
        logger._bar.refresh()
    line = next(line for line in _printed(logger).replace("\r", "\n").splitlines() if "18/40" in line)
    for part in ("reward 0.250", "loss -1e-08", "entropy 0.812", "12.3k tok/s", "<22:00"):
        assert part in line, line


def test_eta_counts_what_lies_between_steps(tmp_path, monkeypatch):
    now = iter([100.0, 110.0, 130.0])  # 10 s, then 20 s with an evaluation: 15 s a step
    monkeypatch.setattr(logging_module.time, "monotonic", lambda: next(now))
    with _logger(tmp_path, max_steps=243) as logger:
        for step in (1, 2, 3):
            logger.step(step, {"step_time": 9.0})
    assert [line.rpartition("ETA ")[2] for line in _printed(logger).splitlines()] == ["36:18", "40:10", "1:00:00"]


def test_samples_table(tmp_path):
    samples = [
        {
            "prompt": [{"role": "system", "content": "hidden"}, {"role": "user", "content": f"question {i}"}],
            "completion": [{"role": "assistant", "content": f"[red]a[/red]\nanswer {i} " + "x" * 3000 + " end"}],
            "rewards": {"exact": i / 4, "format": None},
            "advantage": -0.5,
        }
        for i in range(8)
    ]
    with _logger(tmp_path, width=300, num_completions_to_print=4) as logger:
        logger.samples(10, samples)
    text = _printed(logger)
    assert max(map(len, text.splitlines())) <= 120
    assert [i for i in range(8) if f"question {i}" in text] == [0, 2, 4, 6]  # spread: neighbours share their prompt
    assert "hidden" not in text
    assert "[red]a[/red] answer 2" in text
    assert "end" in text
    assert len(text.splitlines()) < 40
    for part in ("samples of step 10", "exact", "format", "advantage", "0.50", "-0.50"):
        assert part in text
    assert len(_lines(tmp_path / "completions.jsonl")) == 8


def test_many_rewards_share_a_column(tmp_path):
    sample = SAMPLE | {"rewards": {f"reward_number_{i}": i / 10 for i in range(5)}}
    with _logger(tmp_path, width=80) as logger:
        logger.samples(1, [sample])
    for i in range(5):
        assert f"reward_number_{i} {i / 10:.2f}" in _printed(logger)


# ---- trackers -------------------------------------------------------------------------------------------------------


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_continues_over_a_resume(tmp_path):
    for start, steps in ((0, range(1, 7)), (4, range(5, 9))):
        with _logger(tmp_path, start, report_to=["tensorboard"]) as logger:
            for step in steps:
                logger.step(step, {"loss": step / 2})
    assert _scalars(tmp_path / "tensorboard") == {"loss": [(step, step / 2) for step in range(1, 9)]}


class _FakeRun:
    def __init__(self, calls):
        self.calls = calls

    def define_metric(self, *args, **kwargs):
        self.calls.append(("define_metric", args, kwargs))

    def log(self, *args, **kwargs):
        self.calls.append(("log", args, kwargs))

    def finish(self):
        self.calls.append(("finish", (), {}))


def _fake(monkeypatch, name: str) -> list:
    """Stands in for a tracker's module: records the calls that its documentation gives."""
    calls: list = []
    run = _FakeRun(calls)
    module = types.SimpleNamespace(
        init=lambda **kwargs: calls.append(("init", (), kwargs)) or run, log=run.log, finish=run.finish
    )
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    calls = _fake(monkeypatch, "wandb")
    for start in (0, 4, 0):
        with _logger(tmp_path / "demo", start, report_to=["wandb"]) as logger:
            logger.step(start + 1, {"loss": 0.5})
    inits = [kwargs for name, _, kwargs in calls if name == "init"]
    assert all(kwargs["resume"] == "allow" and kwargs["name"] == "demo" for kwargs in inits)
    assert inits[0]["id"] == inits[1]["id"] != inits[2]["id"]
    # Against a step of its own: wandb refuses steps that go back, as they do after a resume.
    assert [args[0] for name, args, _ in calls if name == "log"] == [{"loss": 0.5, "global_step": s} for s in (1, 5, 1)]
    assert ("define_metric", ("*",), {"step_metric": "global_step"}) in calls
    assert sum(name == "finish" for name, *_ in calls) == 3


def test_trackio(tmp_path, monkeypatch):
    calls = _fake(monkeypatch, "trackio")
    for start in (0, 4):
        with _logger(tmp_path / "demo", start, report_to=["trackio"]) as logger:
            logger.step(start + 1, {"loss": 0.5})
    assert [kwargs["resume"] for name, _, kwargs in calls if name == "init"] == ["never", "allow"]
    assert [(a[0], k) for name, a, k in calls if name == "log"] == [({"loss": 0.5}, {"step": s}) for s in (1, 5)]


def test_missing_and_unknown_trackers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.report_to: wandb is not installed \(pip install wandb\)"):
        _logger(tmp_path, report_to=["wandb"])
    config = LoggingConfig()
    config.report_to = ["mlflow"]
    with pytest.raises(ConfigError, match=r"expected any of tensorboard, wandb, trackio; got 'mlflow'"):
        RunLogger(tmp_path, config, 1)


def test_tracker_that_does_not_start(tmp_path, monkeypatch):
    def no_login(**_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=no_login))
    with pytest.raises(ConfigError, match=r"logging\.report_to: wandb does not start \(RuntimeError: no API key\)"):
        _logger(tmp_path, report_to=["wandb"])


def test_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    calls = _fake(monkeypatch, "trackio")

    def fails(*_, **__):
        calls.append(("log", (), {}))
        raise ConnectionError("gone")

    sys.modules["trackio"].log = fails
    with _logger(tmp_path, report_to=["trackio"]) as logger:
        logger.step(1, STEP)
        logger.step(2, STEP)
    assert [row["step"] for row in _lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [name for name, *_ in calls] == ["init", "log"]
    assert caplog.messages == ["trackio failed and gets no more metrics: ConnectionError: gone"]


# ---- plot -----------------------------------------------------------------------------------------------------------


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(steps: int, **extra) -> list[dict]:
    return [
        {
            "step": s,
            "reward": s / steps,
            "entropy": 1 - s / steps,
            "completions/mean_length": 20.0,
            "loss": 0.0,
            **extra,
        }
        for s in range(1, steps + 1)
    ]


def _figure(tmp_path, monkeypatch, rows: list[dict]):
    """The figure that was drawn, as well as the file."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    png = tmp_path / "plot.png"
    plot_run(_write(tmp_path / "metrics.jsonl", rows), png)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))
    return figures[0]


def _titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.axison]


def test_plot_panels_and_points(tmp_path, monkeypatch):
    rows = _rows(40, kl=0.25) + [{"step": s, "eval/reward": 0.5, "eval/pass@1": 0.4} for s in (0, 40)]
    figure = _figure(tmp_path, monkeypatch, rows)
    assert _titles(figure) == ["Reward", "Completion length", "Entropy", "KL to the reference"]
    raw, trend, held_out = figure.axes[0].lines
    assert raw.get_xydata().tolist() == [[s, s / 40] for s in range(1, 41)]
    np.testing.assert_allclose(trend.get_ydata(), raw.get_ydata(), atol=1e-9)  # of a straight line: itself, no lag
    assert held_out.get_xydata().tolist() == [[0, 0.5], [40, 0.5]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["training", "held-out"]
    assert all(axes.get_legend() is None for axes in figure.axes[1:])
    assert figure.axes[0].get_ylim() == (0, 1.03)


def test_plot_shows_what_there_is(tmp_path, monkeypatch):
    # KL is all zeros without a reference: the loss takes its place.
    assert _titles(_figure(tmp_path, monkeypatch, _rows(9, kl=0.0)))[-1] == "Loss"
    assert _titles(_figure(tmp_path, monkeypatch, [{"step": 1, "reward": 0.5}])) == ["Reward"]
    rows = [{"step": s, "reward": 0.5, "entropy": None, "loss": -1.0} for s in range(1, 9)]
    figure = _figure(tmp_path, monkeypatch, [*rows, {"step": 9, "loss": None}])
    assert _titles(figure) == ["Reward", "Loss"]
    (only,) = _figure(tmp_path, monkeypatch, [{"step": 0, "eval/pass@1": 0.5}, *_rows(1)]).axes[0].lines[1:]
    assert only.get_label() == "held-out, pass@1"
    with pytest.raises(ValueError, match="found none"):
        _figure(tmp_path, monkeypatch, [{"step": 1, "x": 0.5}])


def test_plot_of_a_file_with_repeats_and_a_torn_line(tmp_path, monkeypatch):
    # Repeated evaluation after a resume, steps out of order: by step, the later line counts.
    rows = [{"step": 2, "reward": 0.1}, {"step": 1, "reward": 0.3}, {"step": 2, "reward": 0.2}]
    (line,) = _figure(tmp_path, monkeypatch, rows).axes[0].lines
    assert line.get_xydata().tolist() == [[1, 0.3], [2, 0.2]]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 2]


def test_smooth():
    nan = math.nan
    line = [2.0 * i - 3 for i in range(30)]
    np.testing.assert_allclose(smooth(line, 3.0), line, atol=1e-9)
    # Against the weighted least squares it stands for, gaps included.
    rng = np.random.default_rng(0)
    values = rng.normal(size=25)
    values[[3, 4, 24]] = nan
    index = np.arange(25)
    known = ~np.isnan(values)
    for i, got in enumerate(smooth(values, 2.5)):
        root = np.exp(-0.25 * ((index - i) / 2.5) ** 2)[known]
        design = np.stack([np.ones(25), index - i], axis=1)[known]
        expected = np.linalg.lstsq(design * root[:, None], values[known] * root, rcond=None)[0][0]
        assert got == pytest.approx(np.clip(expected, np.nanmin(values), np.nanmax(values)), abs=2e-3), i
    assert smooth([nan, 5.0, nan], 1.5).tolist() == [5.0, 5.0, 5.0]
    assert np.isnan(smooth([nan, nan], 1.5)).all()


def test_plot_is_refreshed_and_never_stops_a_run(tmp_path, monkeypatch, caplog):
    drawn: list[int] = []

    def draw(metrics, png):
        drawn.append(len(_lines(metrics)))

    monkeypatch.setattr("grpo_fast.trainer.plot.plot_run", draw)
    with _logger(tmp_path, plot_steps=2) as logger:
        for step in range(1, 6):
            logger.step(step, STEP)
    assert drawn == [2, 4, 5]  # and once more at the end
    monkeypatch.setattr("grpo_fast.trainer.plot.plot_run", lambda *_: 1 / 0)
    with _logger(tmp_path, plot_steps=1) as logger:
        logger.step(1, STEP)
        logger.step(2, STEP)
    assert caplog.messages == ["plot.png was not drawn: ZeroDivisionError: division by zero"]
    with _logger(tmp_path, plot_steps=0) as logger:
        logger.step(1, STEP)
    assert not (tmp_path / "plot.png").exists()


def test_a_run_stopped_before_its_first_step_has_no_plot_and_no_warning(tmp_path, caplog):
    with _logger(tmp_path, plot_steps=1) as logger:
        logger.eval(0, {"pass@1": 0.5})
    assert not (tmp_path / "plot.png").exists()
    assert not caplog.records
