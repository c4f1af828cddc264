"""Charts of recorded benchmarks, as `report.py` writes them; pictures of supports take their colours from here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Record, heading, machine_line, milliseconds, starred, supports, timed, yardstick

Points = list[tuple[float, Record, Record]]

COLOURS = (
    *("#1b7837", "#7fbf7b", "#4d4d4d", "#b2182b", "#f4a582", "#d6604d", "#2166ac", "#92c5de", "#053061", "#e08214"),
    *("#762a83", "#35978f", "#c51b7d", "#8c510a"),
)
AXES = {
    "tokens": "tokens T",
    "vocab": "vocabulary V",
    "active": "share of tokens with an advantage",
    "support_vocab": "vocabulary V",
    "support_size": "tokens in the support of each row",
}


def draw(records: Sequence[Record], out: Path) -> list[Path]:
    """The charts that there are records for."""
    colours = _colours(sorted(records, key=lambda record: "growth" in record))
    steps = [record for record in records if "growth" not in record and timed(record)]
    growth = [record for record in records if not record.get("growth", "support").startswith("support")]
    on_supports = [record for record in records if record.get("growth", "").startswith("support")]
    written = []
    for name, chosen, plot in (
        ("time_vs_floor.png", steps, plot_time_vs_floor),
        ("growth.png", growth, plot_growth),
        ("growth_support.png", on_supports, plot_growth_support),
    ):
        if chosen:
            plot(chosen, out / name, colours)
            written.append(out / name)
    return written


def _colours(records: Sequence[Record]) -> dict[str, str]:
    names = list(dict.fromkeys(c["name"] for record in records for c in record["contenders"]))
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def plot_time_vs_floor(records: Sequence[Record], path: Path, colours: dict[str, str]) -> None:
    """One panel a case: each contender's time over that of the GEMMs, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    name = f"{yardstick(records[0])} GEMMs"
    records = sorted(records, key=lambda record: -len(timed(record)))  # panels of one height side by side
    columns = 1 if len(records) == 1 else 2
    lines = [records[i : i + columns] for i in range(0, len(records), columns)]
    heights = [max(len(timed(record)) for record in line) + 2.5 for line in lines]
    figure, grid = plt.subplots(
        len(lines),
        columns,
        figsize=(7.5 * columns, 0.32 * sum(heights) + 0.9),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    shortest = min(c["min"] / record["floor"]["median"] for record in records for c in timed(record))
    longest = max(c["max"] / record["floor"]["median"] for record in records for c in timed(record))
    for axes, record in zip(grid.flat, [*records, *[None] * (grid.size - len(records))], strict=True):
        if record is None:
            axes.axis("off")
            continue
        floor = record["floor"]["median"]
        bars = sorted(timed(record), key=lambda c: -c["median"])
        for y, c in enumerate(bars):
            axes.barh(y, c["floor_ratio"], color=colours[c["name"]], height=0.7)
            axes.plot([c["min"] / floor, c["max"] / floor], [y, y], color="black", linewidth=1)
            label = f" {c['floor_ratio']:.{2 if supports(record) is None else 3}f}x, {milliseconds(c['median'])} ms"
            axes.text(max(c["max"] / floor, 1.0), y, label, va="center", fontsize=8)
        axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(bars)), [starred(c) for c in bars], fontsize=8)
        tallest = heights[records.index(record) // columns] - 2.5
        axes.set_ylim(len(bars) - tallest - 0.5, len(bars) - 0.5)  # bars of one thickness, from the top
        axes.set_xscale("log")
        axes.set_xlim(min(0.5, 0.7 * shortest), longest * 4)
        _plain_log_ticks(axes.xaxis)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(f"{heading(record)}\n{name} {milliseconds(floor)} ms", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel(f"time / {name} of the same run (log scale; lines: min to max; *: no entropy)", fontsize=8)
    figure.suptitle(machine_line(records[0]), fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _x(record: Record, axis: str) -> float:
    """Where a record is on an axis of growth."""
    case = record["case"]
    if axis == "active":
        return case["active_tokens"] / case["tokens"]
    if axis.startswith("support_size"):
        return record["support"]["mean"]
    return case["vocab"] if axis == "support_vocab" else case[axis]


def _series(records: Sequence[Record], axis: str) -> dict[str, Points]:
    """contender: [(x, contender's result, record)], ordered, of the points that it was timed at."""
    series: dict[str, Points] = {}
    for record in records:
        if record.get("growth") == axis:
            for c in timed(record):
                series.setdefault(c["name"], []).append((_x(record, axis), c, record))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in series.items()}


def plot_growth(records: Sequence[Record], path: Path, colours: dict[str, str]) -> None:
    """Time and peak memory against T and V, and time against the active share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    panels = [
        (grid[0][0], "tokens", "time"),
        (grid[1][0], "tokens", "memory"),
        (grid[0][1], "vocab", "time"),
        (grid[1][1], "vocab", "memory"),
        (grid[0][2], "active", "time"),
    ]
    for axes, axis, kind in panels:
        _draw_lines(axes, records, axis, kind, colours)
        _label(axes, axis, kind, [r for r in records if r.get("growth") == axis])
    _legend(grid[1][2], [axes for axes, _, _ in panels])
    figure.suptitle(machine_line(records[0]), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_lines(axes: Any, records: Sequence[Record], axis: str, kind: str, colours: dict[str, str]) -> None:
    """Every contender's line, and that of the GEMMs beside times. kind: time, memory, extra (without gradients)."""
    series = _series(records, axis)
    for name, points in series.items():
        xs = [x for x, _, _ in points]
        if kind == "time":
            ys = [c["median"] for _, c, _ in points]
            low, high = ([c[end] for _, c, _ in points] for end in ("min", "max"))
            axes.fill_between(xs, low, high, color=colours[name], alpha=0.2)
        elif kind == "memory":
            ys = [math.nan if c["peak_bytes"] is None else c["peak_bytes"] / 2**30 for _, c, _ in points]
        else:
            ys = [extra_bytes(c, record) / 2**20 for _, c, record in points]
        axes.plot(xs, ys, marker="o", markersize=4, color=colours[name], label=name)
    if kind == "time" and series:
        floor = sorted((x, r["floor"]["median"]) for points in series.values() for x, _, r in points)
        label = f"{yardstick(records[0])} GEMMs"
        axes.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1, label=label)


def extra_bytes(contender: Record, record: Record) -> float:
    """Memory beyond the inputs and the gradients that a call returns."""
    peak = contender["peak_bytes"]
    return math.nan if peak is None else max(peak - record["case"]["gradient_bytes"], 0)


def _legend(axes: Any, panels: Sequence[Any]) -> None:
    """One legend of several panels, in the place of another."""
    labelled: dict[str, Any] = {}
    for panel in panels:
        labelled |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    axes.axis("off")
    axes.legend(labelled.values(), labelled.keys(), loc="center", frameon=False)


def plot_growth_support(records: Sequence[Record], path: Path, colours: dict[str, str]) -> None:
    """With supports: time and memory against V, and time against the size of all supports, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({r["growth"] for r in records if r["growth"].startswith("support_size")})
    columns = [["support_vocab:time", "support_vocab:extra"], *[[f"{axis}:time"] for axis in sizes]]
    figure, grid = plt.subplots(
        2, max(len(columns), 2), figsize=(4.8 * max(len(columns), 2), 7.5), layout="constrained"
    )
    panels = []
    for number, column in enumerate(columns):
        for axes, panel in zip(grid[:, number], column, strict=False):
            axis, _, kind = panel.rpartition(":")
            chosen = [r for r in records if r["growth"] == axis]
            _draw_lines(axes, records, axis, kind, colours)
            _label(axes, axis, kind, chosen)
            if axis != "support_vocab":
                limit = chosen[0]["support"]["sparse_limit"]
                axes.axvline(limit, color="black", linewidth=1, linestyle=":", label="sparse up to here")
            panels.append(axes)
    for axes in grid.flat:
        if axes not in panels:
            axes.axis("off")
    _legend(grid[1][1], panels)
    figure.suptitle(machine_line(records[0]), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


UNITS = {
    "time": "seconds, forward + backward",
    "memory": "GiB beyond the inputs, gradients included",
    "extra": "MiB beyond inputs and gradients",
}


def _label(axes: Any, axis: str, kind: str, records: Sequence[Record]) -> None:
    """Titles, units and scales of a growth panel."""
    if not records:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        return
    case = records[0]["case"]
    both = f"T {case['tokens']}, V {case['vocab']}"
    fixed = {"tokens": f"V {case['vocab']}", "vocab": f"T {case['tokens']}", "active": both}
    if axis == "support_vocab":
        fixed[axis] = f"T {case['tokens']}, mean support {records[0]['support']['mean']:.0f}"
    title = {"time": "time", "memory": "peak memory", "extra": "extra memory"}[kind]
    axes.set_title(f"{title}, H {case['hidden']}, {fixed.get(axis, both)}", fontsize=10)
    axes.set_xlabel(AXES["support_size" if axis.startswith("support_size") else axis])
    axes.set_ylabel(UNITS[kind])
    axes.grid(alpha=0.3)
    if axis == "active":
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1.05)
        return
    ticks = sorted({_x(r, axis) for r in records})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, tick_labels(ticks), fontsize=8)
    axes.minorticks_off()
    if kind == "extra":
        axes.set_yscale("linear")
        axes.set_ylim(bottom=0)
    else:
        _plain_log_ticks(axes.yaxis)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Of a logarithmic axis, whose last step may be shorter than the others: there is no room for both its ends."""
    step = ticks[:2][-1] / ticks[0]
    return [f"{tick:.0f}" if tick == ticks[-1] or ticks[-1] / tick > 0.99 * step else "" for tick in ticks]


def _plain_log_ticks(axis: Any) -> None:
    """1, 2, 5, 10 ... as plain numbers on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
