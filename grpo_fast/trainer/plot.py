"""The picture of a run: reward, completion length, entropy, and KL (or loss) over steps, from its metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
Series = tuple[list[int], list[float]]

_INK, _MUTED, _GRID = "#1f2328", "#6e7781", "#e6e8eb"
# Okabe and Ito's colours, which stay apart for colour-blind readers.
_BLUE, _GREEN, _PURPLE, _RED, _ORANGE = "#0072b2", "#009e73", "#8e4b9c", "#d55e00", "#e69f00"


@dataclass(frozen=True)
class Panel:
    """One quantity over steps."""

    title: str
    unit: str
    key: str
    color: str
    held_out: tuple[tuple[str, str], ...] = ()
    """(metric, label) of the held-out points: the first that was logged."""
    ceiling: float = math.inf
    """The most there can be, commonly."""


_HELD_OUT = (("eval/reward", "held-out"), ("eval/pass@1", "held-out, pass@1"))
PANELS = (
    Panel("Reward", "mean over completions", "reward", _BLUE, held_out=_HELD_OUT, ceiling=1.0),
    Panel("Completion length", "tokens, mean", "completions/mean_length", _GREEN),
    Panel("Entropy", "nats per token", "entropy", _PURPLE),
)
LAST_PANELS = (
    Panel("KL to the reference", "nats per token", "kl", _RED),
    Panel("Loss", "", "loss", _RED),
)


def plot_run(metrics_jsonl: str | Path, png: str | Path) -> None:
    """Draw the run of `metrics_jsonl` into `png`, which is replaced in one rename.

    Every step is a faint line, the trend a strong one; held-out evaluations are points. Panels of what was not logged
    are left out; KL takes the place of the loss where it was logged. Of steps that occur twice the later line counts.

    Raises:
        ValueError: the file holds nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    metrics_jsonl, png = Path(metrics_jsonl), Path(png)
    rows = read_metrics(metrics_jsonl)
    kl_or_loss = next((p for p in LAST_PANELS if _has_data(rows, p)), None)
    panels = [p for p in (*PANELS, kl_or_loss) if p is not None and _has_data(rows, p)]
    if not panels:
        raise ValueError(f"{metrics_jsonl}: expected lines with any of reward, entropy, loss, ...; found none")

    num_columns = min(len(panels), 2)
    num_rows = math.ceil(len(panels) / num_columns)
    # No pyplot: it would choose a backend for the whole process and keep every figure it made.
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.06)
    figure = Figure(figsize=(5.2 * num_columns, 3.1 * num_rows + 0.5), dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    last_step = max(row["step"] for row in rows)
    figure.suptitle(f"{metrics_jsonl.resolve().parent.name} · step {last_step}", color=_INK, fontsize=13)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i < len(panels):
            _draw(axes, rows, panels[i], last_step)
            if i + num_columns >= len(panels):
                axes.set_xlabel("optimiser step", color=_MUTED, fontsize=9)
        else:
            axes.set_axis_off()
    temporary = png.with_name(png.name + ".tmp")
    figure.savefig(temporary, format="png", facecolor="white")
    os.replace(temporary, png)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl by step, without the one that a kill tore."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return sorted(rows, key=lambda row: row["step"])


def smooth(values: Sequence[float], width: float) -> Any:
    """[N] local linear fit with Gaussian weights of standard deviation `width` steps; gaps (NaN) weigh nothing.

    A trailing average would lag behind every trend, and a centred one bend at both ends. With S_k = sum_j w_j (j - i)^k
    and T_k = sum_j w_j (j - i)^k x_j the fit at i is (S_2 T_0 - S_1 T_1) / (S_0 S_2 - S_1^2), kept within the values.
    """
    import numpy as np

    x = np.asarray(values, dtype=float)
    known = np.isfinite(x)
    offsets = np.arange(-math.ceil(4 * width), math.ceil(4 * width) + 1)
    weights = np.exp(-0.5 * (offsets / width) ** 2)

    def moment(of: Any, k: int) -> Any:
        # np.convolve runs its kernel backwards: the sign of S_1 and T_1, which only occur as a product or squared.
        return np.convolve(of, weights * offsets.astype(float) ** k)[len(offsets) // 2 :][: len(of)]

    s0, s1, s2 = (moment(known.astype(float), k) for k in range(3))
    t0, t1 = (moment(np.where(known, x, 0.0), k) for k in range(2))
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = s0 * s2 - s1 * s1
        fit = np.where(spread > 1e-9 * s0 * s0, (s2 * t0 - s1 * t1) / spread, t0 / s0)
    return np.clip(fit, x[known].min(), x[known].max()) if known.any() else fit


def _series(rows: Sequence[Row], key: str) -> Series:
    """Steps and values of one metric; null is NaN."""
    values = {row["step"]: math.nan if row[key] is None else float(row[key]) for row in rows if key in row}
    return list(values), list(values.values())


def _has_data(rows: Sequence[Row], panel: Panel) -> bool:
    """Logged, and for KL (0 where there is no reference) more than zeros."""
    values = [value for value in _series(rows, panel.key)[1] if not math.isnan(value)]
    return any(values) if panel.key == "kl" else bool(values)


def _draw(axes: Axes, rows: Sequence[Row], panel: Panel, last_step: int) -> None:
    steps, values = _series(rows, panel.key)
    shown = list(values)
    if len(steps) < 5:
        axes.plot(steps, values, color=panel.color, linewidth=1.8, marker="o", markersize=4, label="training")
    else:
        axes.plot(steps, values, color=panel.color, linewidth=0.9, alpha=0.3)
        trend = smooth(values, max(1.5, len(steps) / 40))
        axes.plot(steps, trend, color=panel.color, linewidth=2, label="training")
    held_out = next(((_series(rows, key), label) for key, label in panel.held_out if _series(rows, key)[0]), None)
    if held_out is not None:
        (held_steps, held_values), label = held_out
        shown += held_values
        axes.plot(held_steps, held_values, "o", color=_ORANGE, markeredgecolor="white", markersize=7, label=label)
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK, loc="best")
    axes.set_title(panel.title, loc="left", color=_INK, fontsize=11, fontweight="bold")
    axes.set_title(panel.unit, loc="right", color=_MUTED, fontsize=9)
    room = 0.02 * max(last_step, 1)
    axes.set_xlim(-room, max(last_step, 1) + room)
    _set_ylim(axes, [value for value in shown if not math.isnan(value)], panel.ceiling)
    _dress(axes)


def _set_ylim(axes: Axes, values: Sequence[float], ceiling: float) -> None:
    """From 0 where nothing is below, so that a wiggle looks like one; up to the ceiling where that is in reach."""
    low, high = min(values), max(values)
    if low >= 0:
        axes.set_ylim(0, 1.03 * ceiling if ceiling / 2 < high <= ceiling else high * 1.12 or 1)


def _dress(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=8.5, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
