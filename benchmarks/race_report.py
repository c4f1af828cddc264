"""What a race shows: time to the target reward, the picture of all curves, and the Markdown summary.

A run is a dict: `contender`, `seed`, `error` (None unless it failed), `total_seconds` (start-up included), `start`
(versions and settings), `steps` (a dict each, see `race_contenders.Record.step`).
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WINDOW = 5  # steps of the mean reward

_INK, _MUTED, _GRID = "#1f2328", "#6e7781", "#e6e8eb"
_COLORS = ("#0072b2", "#d55e00", "#009e73")  # Okabe and Ito

Run = Mapping[str, Any]


def trailing_means(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Means of the last `window` values, for each place from the `window`-th on."""
    return [sum(values[end - window : end]) / window for end in range(window, len(values) + 1)]


def first_reached(rewards: Sequence[float], target: float) -> int | None:
    """The first step (from 1) whose mean over the last `WINDOW` steps is at least `target`; None if there is none."""
    # The mean of five 0.7s is a rounding error below 0.7.
    means = enumerate(trailing_means(rewards), start=WINDOW)
    return next((step for step, mean in means if mean >= target - 1e-9), None)


def seconds_to(run: Run, target: float) -> float:
    """Seconds of training until the target was reached; infinite if it was not."""
    step = first_reached([row["reward"] for row in run["steps"]], target)
    return math.inf if step is None else run["steps"][step - 1]["seconds"]


def same_prompts(runs: Sequence[Run]) -> bool | None:
    """Whether runs of one seed saw the same prompt tokens, step by step; None if no two runs can be compared."""
    by_seed: dict[int, list[list[str]]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], []).append([row["prompts"] for row in run["steps"]])
    pairs = [(seen[0], other) for seen in by_seed.values() for other in seen[1:]]
    common = [(one[: len(other)], other[: len(one)]) for one, other in pairs if one and other]
    return all(one == other for one, other in common) if common else None


def summarize(runs: Sequence[Run], contender: str, target: float) -> dict[str, Any] | None:
    """Medians over the contender's seeds and, of the split, means over all steps; None if no run of it went well."""
    done = [run for run in runs if run["contender"] == contender and run["error"] is None and run["steps"]]
    if not done:
        return None
    steps = [row for run in done for row in run["steps"]]
    times = [seconds_to(run, target) for run in done]
    reached = [first_reached([row["reward"] for row in run["steps"]], target) or math.inf for run in done]
    return {
        "seeds": [run["seed"] for run in done],
        "seconds_to_target": _finite(statistics.median(times)),
        "seconds_to_target_range": [_finite(min(times)), _finite(max(times))],
        "steps_to_target": _finite(statistics.median(reached)),
        "step_seconds": statistics.mean(row["step_seconds"] for row in steps),
        "rollout_seconds": statistics.mean(row["rollout_seconds"] for row in steps),
        "update_seconds": statistics.mean(row["update_seconds"] for row in steps),
        "steps": len(steps),
        "peak_rss_bytes": statistics.median(run["steps"][-1]["peak_rss_bytes"] for run in done),
        "total_seconds": statistics.median(run["total_seconds"] for run in done),
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


# ---- Markdown -------------------------------------------------------------------------------------------------------


def markdown(race: Mapping[str, Any]) -> str:
    """The summary and a line a run."""
    target, names = race["target"], race["contenders"]
    found = {name: summarize(race["runs"], name, target) for name in names}
    compared = len(names) == 2 and all(found.values())
    rows = [
        (f"time to a {WINDOW}-step mean reward of {target:g}, median of seeds", "seconds_to_target", _time),
        ("steps to it", "steps_to_target", _count),
        ("seconds per step, mean of all steps", "step_seconds", _seconds),
        ("of which rollout", "rollout_seconds", _seconds),
        ("of which update", "update_seconds", _seconds),
        ("peak memory", "peak_rss_bytes", _gib),
        ("whole run with start-up", "total_seconds", _time),
    ]
    lines = [_row("", *names, *([f"{names[1]} / {names[0]}"] if compared else [])), _row("---", *["---:"] * len(names))]
    lines[1] += "---:|" if compared else ""
    for title, key, shown in rows:
        values: list[Any] = [None if (one := found[name]) is None else one[key] for name in names]
        cells = [
            _missing(found[name], key, race) if v is None else shown(v) for name, v in zip(names, values, strict=True)
        ]
        ratio = f"{values[1] / values[0]:.1f}x" if compared and None not in values and key != "total_seconds" else ""
        lines.append(_row(title, *cells, *([ratio] if compared else [])))
    lines += ["", _row("run", "steps", f"time to {target:g}", "last mean reward", "peak memory"), _row(*["---"] * 5)]
    lines += [_run_row(run, race) for run in race["runs"]]
    for name, one in found.items():
        if one is not None and len(one["seeds"]) < len({run["seed"] for run in race["runs"]}):
            lines += [
                "",
                f"Medians of {name} are of seeds {', '.join(map(str, one['seeds']))} only: the others failed.",
            ]
    agree = {True: "the same in all runs of a seed", False: "**NOT the same**", None: "nothing to compare"}
    if race.get("top_p") is not None:  # races from before there was a choice have none
        lines += ["", f"Both sample at top-p {race['top_p']:g}."]
    lines += [
        "",
        f"Prompts step by step: {agree[same_prompts(race['runs'])]}. Model loading is not in the times to reward.",
    ]
    return "\n".join(lines)


def _run_row(run: Run, race: Mapping[str, Any]) -> str:
    name = f"{run['contender']}, seed {run['seed']}"
    if run["error"] is not None:
        return _row(name, f"{len(run['steps'])}", f"**failed**: {run['error']}", "", "")
    seconds = seconds_to(run, race["target"])
    means = trailing_means([row["reward"] for row in run["steps"]])
    time = _time(seconds) if math.isfinite(seconds) else f"not reached in {len(run['steps'])} steps"
    peak = run["steps"][-1]["peak_rss_bytes"]
    return _row(name, f"{len(run['steps'])}", time, f"{means[-1]:.3f}" if means else "-", _gib(peak))


def _missing(found: Any, key: str, race: Mapping[str, Any]) -> str:
    return f"not reached in {race['max_steps']} steps" if found and key.endswith("to_target") else "failed"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |" if cells[0] != "---" else f"|{'|'.join(cells)}|"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _count(steps: float) -> str:
    return f"{steps:g}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


# ---- the picture ----------------------------------------------------------------------------------------------------


def plot(race: Mapping[str, Any], png: Path) -> None:
    """Reward against seconds of training: each step faint, its `WINDOW`-step mean solid, all seeds; the target dashed.

    A dot marks where a run's mean reached the target; the text gives a contender's median.

    Raises:
        ValueError: no run has a step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs, target = [run for run in race["runs"] if run["steps"]], race["target"]
    if not runs:
        raise ValueError("race: expected runs with steps to draw; got none")
    figure = Figure(figsize=(9.6, 5.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = dict(zip(race["contenders"], _COLORS, strict=False))
    for run in runs:
        _draw_run(axes, run, target, colors[run["contender"]])
    last = max(run["steps"][-1]["seconds"] for run in runs)
    axes.axhline(target, color=_MUTED, linewidth=1, linestyle="--", zorder=1)
    axes.text(1.008 * last, target - 0.012, f"{target:g}", color=_MUTED, fontsize=9, ha="right", va="top")
    _label_medians(axes, race, colors, last)
    axes.set_xlim(-0.01 * last, 1.01 * last)
    top = max(row["reward"] for run in runs for row in run["steps"])
    axes.set_ylim(0, max(1.03 if top <= 1 else 1.05 * top, 1.1 * target))
    seeds = sorted({run["seed"] for run in runs})
    sampling = "" if race.get("top_p") is None else f", both at top-p {race['top_p']:g}"
    axes.set_title(f"Reward against wall time{sampling}", loc="left", color=_INK, fontsize=12, fontweight="bold")
    subtitle = f"{WINDOW}-step mean; faint: each step; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    axes.set_title(subtitle, loc="right", color=_MUTED, fontsize=9)
    axes.set_xlabel("seconds of training, model loading excluded", color=_MUTED, fontsize=9)
    axes.set_ylabel("mean reward of a step", color=_MUTED, fontsize=9)
    _dress(axes)
    temporary = png.with_name(png.name + ".tmp")
    figure.savefig(temporary, format="png", facecolor="white")
    os.replace(temporary, png)


def _draw_run(axes: Any, run: Run, target: float, color: str) -> None:
    seconds, rewards = [row["seconds"] for row in run["steps"]], [row["reward"] for row in run["steps"]]
    axes.plot(seconds, rewards, color=color, linewidth=0.8, alpha=0.25, zorder=2)
    axes.plot(seconds[WINDOW - 1 :], trailing_means(rewards), color=color, linewidth=2, zorder=3)
    if run["error"] is not None:
        axes.plot(seconds[-1], rewards[-1], "x", color=color, markersize=10, markeredgewidth=2, zorder=5)
        axes.annotate("failed", (seconds[-1], rewards[-1]), (6, 6), textcoords="offset points", color=color, fontsize=9)
    step = first_reached(rewards, target)
    if step is not None:
        mean = trailing_means(rewards)[step - WINDOW]
        axes.plot(seconds[step - 1], mean, "o", color=color, markeredgecolor="white", markersize=8, zorder=4)


def _label_medians(axes: Any, race: Mapping[str, Any], colors: Mapping[str, str], last: float) -> None:
    """Names and medians in the colours of the curves, in place of a legend."""
    from matplotlib.lines import Line2D

    handles = []
    for name in race["contenders"]:
        found = summarize(race["runs"], name, race["target"])
        if found is None:
            label = f"{name}: failed"
        elif found["seconds_to_target"] is None:
            label = f"{name}: {race['target']:g} not reached in {race['max_steps']} steps"
        else:
            label = f"{name}: {race['target']:g} after {found['seconds_to_target']:.0f} s"
            label += " (median)" if len(found["seeds"]) > 1 else ""
            axes.axvline(found["seconds_to_target"], 0, 1, color=colors[name], linewidth=1, linestyle=":", zorder=1)
        handles.append(
            Line2D([], [], color=colors[name], linewidth=2, marker="o", markeredgecolor="white", label=label)
        )
    axes.legend(handles=handles, fontsize=10, labelcolor=_INK, loc="lower right", edgecolor="none", framealpha=1)


def _dress(axes: Any) -> None:
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
