"""docs/support.png: what a step costs against the size of supports, and the importance ratio with and without them.

    python benchmarks/support_figure.py benchmarks/results/<device>/growth_support.json

The first panel is of `pytest benchmarks/test_growth.py -k support_size`, the second of support_sizes.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
INK, MUTED, GRID = "#1f2328", "#6e7781", "#e6e8eb"


def ratios_to_dense(records: Sequence[Mapping[str, Any]], axis: str) -> dict[str, tuple[list[float], list[float]]]:
    """contender: (sizes of supports, its time over that of the dense step of the same rounds).

    Raises:
        ValueError: no records of this axis.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.get("growth") != axis:
            continue
        times = {c["name"]: c["median"] for c in record["contenders"] if c["status"] == "timed"}
        for name, seconds in times.items():
            points.setdefault(name, []).append((record["support"]["mean"], seconds / times["grpo-fast dense"]))
    if not points:
        raise ValueError(f"records: expected some of {axis}; got no growth with supports")
    return {name: tuple(map(list, zip(*sorted(found), strict=True))) for name, found in points.items()}  # type: ignore[misc]


def draw(records: Sequence[Mapping[str, Any]], axis: str, models: Mapping[str, Any], png: Path) -> None:
    """Both panels; the first of the records of `axis`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    cost, bias = figure.subplots(1, 2)
    _draw_cost(cost, records, axis)
    _draw_bias(bias, models)
    for axes in (cost, bias):
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, labelsize=9, length=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png, facecolor="white")


def _draw_cost(axes: Any, records: Sequence[Mapping[str, Any]], axis: str) -> None:
    """Time over the dense step's against the size, both logarithmic."""
    from benchmarks.baselines import MASKED, SPARSE
    from benchmarks.charts import COLOURS, tick_labels

    series = ratios_to_dense(records, axis)
    first = next(record for record in records if record.get("growth") == axis)
    case, limit = first["case"], first["support"]["sparse_limit"]
    for name, colour, label in (
        (SPARSE, COLOURS[0], "sparse: gathered rows of the weight"),
        (MASKED, COLOURS[6], "masked: all logits, then the support"),
    ):
        sizes, times = series[name]
        axes.plot(sizes, times, marker="o", markersize=4, color=colour, linewidth=2, label=label)
    axes.axhline(1.0, color=INK, linewidth=1, linestyle="--", label="without a support")
    axes.axvline(limit, color=MUTED, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted(series[SPARSE][0])
    axes.set_xticks(ticks, tick_labels(ticks))
    low, high = 0.5 * min(series[SPARSE][1]), 1.6 * max(max(times) for _, times in series.values())
    shown = [tick for tick in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low < tick < high]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.minorticks_off()
    axes.set_ylim(low, high)
    axes.text(limit, low * 1.15, "sparse | masked", color=MUTED, fontsize=8, ha="center")
    axes.set_xlabel("words in the support of every position", color=MUTED, fontsize=9)
    axes.set_ylabel("time of a step / without a support", color=MUTED, fontsize=9)
    title = f"Cost (T {case['tokens']}, H {case['hidden']}, V {case['vocab']})"
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.legend(fontsize=8.5, frameon=False, loc="best", labelcolor=INK)


def _draw_bias(axes: Any, models: Mapping[str, Any]) -> None:
    """Ratios of drawn tokens before anything was learned, as shares of the tokens."""
    from benchmarks.charts import COLOURS

    top_p = next(iter(models.values()))["top_p"]
    for (name, model), colour in zip(models.items(), (COLOURS[3], COLOURS[9]), strict=False):
        edges, counts = model["ratio"]["edges"], model["ratio"]["counts"]
        shares = [count / model["tokens"] for count in counts]
        product = model["completion_ratio"]["median"]
        label = f"whole vocabulary, {name} model: mean {model['ratio_mean']:.3f},\nmedian of a completion {product:.2f}"
        axes.stairs(shares, edges, color=colour, fill=True, alpha=0.35)
        axes.stairs(shares, edges, color=colour, linewidth=1.5, label=label)
    axes.axvline(1.0, color=COLOURS[0], linewidth=3, label="on the support: exactly 1, every token")
    axes.set_xlim(top_p - 0.005, 1.004)
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 1.5)
    axes.set_yticks([0.001, 0.01, 0.1, 1], ["0.1 %", "1 %", "10 %", "100 %"])
    axes.minorticks_off()
    axes.set_xlabel("importance ratio p / q of a drawn word, before anything is learned", color=MUTED, fontsize=9)
    axes.set_ylabel("share of the words drawn", color=MUTED, fontsize=9)
    axes.set_title(f"Bias of the ratio at top-p {top_p:g}", loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.legend(fontsize=8.5, frameon=False, loc="upper center", labelcolor=INK)


def main(arguments: Sequence[str] | None = None) -> None:
    if str(REPO) not in sys.path:
        sys.path.append(str(REPO))
    from benchmarks.report import load
    from benchmarks.supports import RECORDED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="files of pytest --benchmark-json")
    parser.add_argument("--model", default="Qwen3-0.6B", help="whose head the first panel is of (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=REPO / "docs" / "support.png")
    given = parser.parse_args(arguments)
    axis = f"support_size_{given.model}"
    draw(load(given.paths), axis, json.loads(RECORDED.read_text())["models"], given.out)
    print(given.out)


if __name__ == "__main__":
    main()
