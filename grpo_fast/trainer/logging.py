"""What a run tells: metrics.jsonl, progress, sample completions, the plot, and the trackers that were asked for."""

from __future__ import annotations

import collections
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from grpo_fast.trainer.config import LoggingConfig
from grpo_fast.trainer.files import write_whole
from grpo_fast.trainer.trackers import make_tracker

METRICS_FILE, COMPLETIONS_FILE, PLOT_FILE = "metrics.jsonl", "completions.jsonl", "plot.png"

_MAX_WIDTH = 120  # columns; wider tables are hard to read
_MOST_REWARD_COLUMNS = 3  # more share one column of the samples table

_log = logging.getLogger(__name__)


class RunLogger:
    """Writes and shows what the trainer reports; close it at the end, or use it as a context manager.

    Files in `output_dir`, of which every line is one write, so that a killed run leaves whole lines:
    - metrics.jsonl: `{"step": 3, "loss": 0.1, ...}` a step and `{"step": 3, "eval/pass@1": 0.5, ...}` an evaluation;
      NaN and infinity are null.
    - completions.jsonl: a line a sample, with its prompt, rewards and advantage.
    - plot.png: see `grpo_fast.trainer.plot`.

    A run that resumes after `start_step` steps continues the files exactly: what they say of later steps is cut off.

    Args:
        output_dir: made if need be.
        config: which trackers, how often the plot is drawn, how many samples are shown.
        max_steps: for progress and ETA.
        start_step: steps done before this process; 0 starts the files anew.
        run_config: the whole configuration, for the trackers.
        console: where to print (default: standard output; a live bar on a terminal, else one line a step).

    Raises:
        ConfigError: a tracker in `config.report_to` is not installed or does not start.
    """

    def __init__(
        self,
        output_dir: str | Path,
        config: LoggingConfig,
        max_steps: int,
        start_step: int = 0,
        *,
        run_config: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ) -> None:
        self._dir = Path(output_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._config, self._max_steps = config, max_steps
        self._console = console or Console()
        self._trackers = [
            make_tracker(name, self._dir, start_step, dict(run_config or {})) for name in config.report_to
        ]
        self._metrics_file = _LineFile(self._dir / METRICS_FILE, start_step)
        self._completions_file = _LineFile(self._dir / COMPLETIONS_FILE, start_step)
        self._plot_is_stale = False
        self._plot_failed = False
        self._clock = _StepClock()
        self._bar: Progress | None = None
        if config.progress and self._console.is_terminal:
            self._bar = _progress_bar(self._console)
            self._task = self._bar.add_task("", total=max_steps, completed=start_step, summary="", eta="")
            self._bar.start()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Report optimiser step `step` (from 1).

        Raises:
            ValueError: a metric that is not a number.
        """
        values = self._record(step, metrics)
        self._clock.tick(values.get("step_time"))
        self._show_step(step, values)
        self._plot_is_stale = True
        if self._config.plot_steps and step % self._config.plot_steps == 0:
            self._plot()

    def eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Report an evaluation after `step` steps (0: before training); its metrics are named `eval/...`.

        Raises:
            ValueError: a metric that is not a number.
        """
        values = self._record(
            step, {name if name.startswith("eval/") else f"eval/{name}": metrics[name] for name in metrics}
        )
        self._plot_is_stale |= step > 0  # before the first step there is no curve to draw it beside
        plain = {name.removeprefix("eval/"): value for name, value in values.items()}
        main = {name: value for name, value in plain.items() if name == "reward" or name.startswith("pass@")}
        shown = "  ".join(f"{name} {_short(value)}" for name, value in (main or plain).items())
        self._print(Text(f"held-out after step {step}: {shown}", style="bold"))

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep all `samples` and show `num_completions_to_print` of them, spread evenly.

        Each has `prompt` (text or messages), `completion` (likewise), `rewards` ({name: number or None}) and
        `advantage`.
        """
        if not self._config.log_completions:
            return
        for sample in samples:
            rewards = {name: _json_number(f"rewards/{name}", value) for name, value in sample["rewards"].items()}
            numbers = {"rewards": rewards, "advantage": _json_number("advantage", sample["advantage"])}
            self._completions_file.write({"step": step} | dict(sample) | numbers)
        shown = _spread(samples, self._config.num_completions_to_print)
        if shown:
            self._print(_samples_table(step, shown, min(self._console.width, _MAX_WIDTH)))

    def message(self, text: str) -> None:
        """Print a line without disturbing the progress bar."""
        self._print(Text(text))

    def close(self) -> None:
        """Draw the last plot and let go of files, bar and trackers. May be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._config.plot_steps and self._plot_is_stale:
            self._plot()
        self._metrics_file.close()
        self._completions_file.close()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Write one line and tell the trackers; the metrics as floats."""
        values = {name: _number(name, value) for name, value in metrics.items() if name != "step"}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics_file.write({"step": step} | row)
        for tracker in self._trackers:
            tracker.log(step, values)
        return values

    def _show_step(self, step: int, values: Mapping[str, float]) -> None:
        if not self._config.progress:
            return
        parts = [f"{name} {_short(values[name])}" for name in ("reward", "loss", "entropy") if name in values]
        if "tokens_per_second" in values:
            parts.append(f"{_thousands(values['tokens_per_second'])} tok/s")
        eta = self._clock.eta(self._max_steps - step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, summary="  ".join(parts), eta=eta)
            return
        width = len(str(self._max_steps))
        parts = [f"step {step:>{width}}/{self._max_steps}", *parts, *([f"ETA {eta}"] if eta else [])]
        self._console.print("  ".join(parts), soft_wrap=True, highlight=False, markup=False)

    def _print(self, what: Text | Table) -> None:
        # While the bar is live, its console puts whatever it prints above the bar. Text is not cut to the width.
        self._console.print(what, soft_wrap=isinstance(what, Text))

    def _plot(self) -> None:
        from grpo_fast.trainer.plot import plot_run

        try:
            plot_run(self._dir / METRICS_FILE, self._dir / PLOT_FILE)
            self._plot_is_stale = False
        except Exception as error:  # a picture is not worth a run
            if not self._plot_failed:
                _log.warning("%s was not drawn: %s: %s", PLOT_FILE, type(error).__name__, error)
            self._plot_failed = True


class _LineFile:
    """JSON lines, appended by one write each."""

    def __init__(self, path: Path, start_step: int) -> None:
        if path.exists():
            _cut(path, start_step)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def _cut(path: Path, start_step: int) -> None:
    """Keep the whole lines of steps up to `start_step` (none of a run that starts anew), in one rename."""
    kept = []
    for line in path.read_bytes().split(b"\n"):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # the line that a kill tore, or the empty rest after the last one
            continue
        if start_step > 0 and step <= start_step:
            kept.append(line + b"\n")
    write_whole(path, b"".join(kept))


# ---- numbers and text -----------------------------------------------------------------------------------------------


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"metric {name!r}: expected a number; got {type(value).__name__} {value!r:.60}") from error


def _json_number(name: str, value: Any) -> float | None:
    number = math.nan if value is None else _number(name, value)
    return number if math.isfinite(number) else None


def _short(value: float) -> str:
    """Three decimals, or one significant digit of what would show as zero."""
    return f"{value:.0e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"


def _thousands(value: float) -> str:
    return f"{value:.0f}" if value < 10_000 or not math.isfinite(value) else f"{value / 1000:.1f}k"


class _StepClock:
    """Seconds a step over the last steps, evaluations and checkpoints in between included."""

    def __init__(self) -> None:
        self._times: collections.deque[float] = collections.deque(maxlen=20)
        self._step_time = math.nan

    def tick(self, step_time: float | None) -> None:
        self._times.append(time.monotonic())
        self._step_time = math.nan if step_time is None else step_time

    def eta(self, remaining: int) -> str:
        """As text, or empty while unknown."""
        steps = len(self._times) - 1
        seconds = remaining * ((self._times[-1] - self._times[0]) / steps if steps else self._step_time)
        return _hms(seconds) if math.isfinite(seconds) else ""


def _hms(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


class _TimeColumn(ProgressColumn):
    """`elapsed<remaining`. rich's own remaining time forgets what is half a minute old, which can be a single step."""

    def render(self, task: Task) -> Text:
        return Text(f"{_hms(task.elapsed or 0)}<{task.fields['eta'] or '?'}", style="cyan")


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[summary]}", markup=False),
        _TimeColumn(),
        console=console,
        expand=True,
        refresh_per_second=2,
    )


# ---- samples --------------------------------------------------------------------------------------------------------


def _spread(samples: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` samples, evenly spread: neighbours are mostly completions of one prompt."""
    if len(samples) <= count:
        return list(samples)
    return [samples[i * len(samples) // count] for i in range(count)]


def _samples_table(step: int, samples: Sequence[Mapping[str, Any]], width: int) -> Table:
    names = list(dict.fromkeys(name for sample in samples for name in sample["rewards"]))
    apart = len(names) <= _MOST_REWARD_COLUMNS
    table = Table(title=f"samples of step {step}", title_justify="left", width=width, show_lines=True)
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=3)
    for name in names if apart else ["rewards"]:
        table.add_column(name, justify="right" if apart else "left")
    table.add_column("advantage", justify="right")
    for sample in samples:
        rewards = [_cell(sample["rewards"].get(name)) for name in names]
        if not apart:
            rewards = ["\n".join(f"{name} {reward}" for name, reward in zip(names, rewards, strict=True))]
        texts = (_middle_out(_plain(sample[key]), 2 * width) for key in ("prompt", "completion"))
        # Text, not str: model output may well look like rich's markup.
        table.add_row(*map(Text, texts), *map(Text, rewards), Text(_cell(sample["advantage"])))
    return table


def _plain(text: Any) -> str:
    """Text, or the last message of a conversation, on one line."""
    if not isinstance(text, str):
        text = (text[-1].get("content") or "") if text else ""
    return " ".join(text.split())


def _middle_out(text: str, most: int) -> str:
    """At most `most` characters: questions end, and answers stand, at the end; what a text is about, at its start."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[len(text) - most // 2 :]}"


def _cell(value: Any) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"
