"""The demo with top-p, on supports, beside the demo without: does it learn as well, and what does its update cost?

    python benchmarks/support_demo.py --out benchmarks/results/<device>/support_demo             20 minutes on two cores
    python benchmarks/support_demo.py --out benchmarks/results/<device>/support_demo --report    table and picture

Three arms, three seeds each, one run after another in processes of their own, seeds in turn:

    everything   rollout.top_p=1: samples and trains over the whole vocabulary
    support      rollout.top_p=0.95: trains on the words that top-p kept
    off          rollout.top_p=0.95 loss.support=off: samples from some, trains on all. The difference between its log p
                 and the sampler's is more than rounding

Keeps metrics.jsonl and config.yaml of each run, machine.json, support_demo.md and support_demo.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

REPO = Path(__file__).resolve().parent.parent
ARMS: dict[str, list[str]] = {
    "everything": ["rollout.top_p=1.0"],
    "support": ["rollout.top_p=0.95"],
    "off": ["rollout.top_p=0.95", "loss.support=off"],
}
TITLES = {
    "everything": "top-p 1",
    "support": "top-p 0.95, on the support",
    "off": "top-p 0.95, over the whole vocabulary",
}
WINDOW = 5  # steps of a mean reward
LAST = 10  # steps at the end of a run
_INK, _MUTED, _GRID = "#1f2328", "#6e7781", "#e6e8eb"
_COLORS = {"everything": "#0072b2", "support": "#009e73", "off": "#d55e00"}

Rows = Sequence[Mapping[str, Any]]


def run_all(out: Path, seeds: Sequence[int], arms: Sequence[str], recipe: Path, extra: Sequence[str]) -> None:
    """Train what is not there yet.

    Raises:
        SystemExit: a run failed; what was done stays.
    """
    from benchmarks.machine import machine_facts

    out.mkdir(parents=True, exist_ok=True)
    (out / "machine.json").write_text(json.dumps(machine_facts(), indent=1) + "\n")
    for seed in seeds:
        for arm in arms:
            kept = out / f"{arm}-seed{seed}"
            if (kept / "metrics.jsonl").exists():
                continue
            with tempfile.TemporaryDirectory(prefix="support-demo-") as folder:
                options = [*ARMS[arm], *extra, f"seed={seed}", f"data.seed={seed}", f"output_dir={folder}/run"]
                command = [sys.executable, "-m", "grpo_fast.cli", "train", str(recipe), *options]
                print(" ".join(command), flush=True)
                code = subprocess.run([*command, "save_steps=null", "export_final=false"], check=False).returncode
                if code != 0:
                    sys.exit(f"error: {arm}, seed {seed}: exit code {code}")
                kept.mkdir(exist_ok=True)
                for name in ("metrics.jsonl", "config.yaml"):
                    shutil.copy(Path(folder) / "run" / name, kept / name)


def load(out: Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """arm: {seed: lines of metrics.jsonl}.

    Raises:
        ValueError: no runs.
    """
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for arm in ARMS:
        for path in sorted(out.glob(f"{arm}-seed*/metrics.jsonl")):
            seed = int(path.parent.name.rpartition("seed")[2])
            runs.setdefault(arm, {})[seed] = [json.loads(line) for line in path.read_text().splitlines()]
    if not runs:
        raise ValueError(f"out: expected runs as {out}/support-seed0/metrics.jsonl; got none")
    return runs


def steps(rows: Rows) -> Rows:
    """The lines of training steps."""
    return [row for row in rows if "reward" in row]


def _at_first(key: str) -> Callable[[Rows], float | None]:
    return lambda rows: steps(rows)[0].get(key)


def _mean(key: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        found = [row[key] for row in steps(rows) if key in row]
        return mean(found) if found else None

    return value


def _update_per_token(rows: Rows) -> float:
    """Milliseconds of update a token, prompts included: completions of one arm may be longer than those of another."""
    own = steps(rows)
    return 1000 * sum(row["time/update"] for row in own) / own[-1]["num_tokens"]


def _last_held_out(rows: Rows) -> float | None:
    found = [row["eval/reward"] for row in rows if "eval/reward" in row]
    return found[-1] if found else None


QUANTITIES: dict[str, Callable[[Rows], float | None]] = {
    "reward, mean of all steps": _mean("reward"),
    f"reward, mean of the last {LAST} steps": lambda rows: mean(row["reward"] for row in steps(rows)[-LAST:]),
    "held-out reward at the end": _last_held_out,
    "seconds of a step's update": _mean("time/update"),
    "the same, ms a token": _update_per_token,
    "seconds of a step's rollout": _mean("time/rollout"),
    "tokens of a completion": _mean("completions/mean_length"),
    "first step: least ratio": _at_first("ratio/min"),
    "first step: largest ratio": _at_first("ratio/max"),
    "first step: |log p - sampler's|, nats, mean": _at_first("sampling/sampling_logp_difference/mean"),
    "support, mean": _mean("support/mean"),
    "support, share of single words": _mean("support/singleton_fraction"),
    "support, share of sparse rows": _mean("support/sparse_fraction"),
}


def summarize(runs: Mapping[str, Mapping[int, Rows]]) -> dict[str, dict[str, list[float]]]:
    """quantity: {arm: a value a seed}, where the runs logged it."""
    table: dict[str, dict[str, list[float]]] = {}
    for quantity, value in QUANTITIES.items():
        for arm, by_seed in runs.items():
            found = [one for rows in by_seed.values() if (one := value(rows)) is not None]
            if found:
                table.setdefault(quantity, {})[arm] = found
    return table


def markdown(runs: Mapping[str, Mapping[int, Rows]]) -> str:
    """Medians of seeds, in brackets least and most."""
    arms = list(runs)
    lines = [f"| | {' | '.join(TITLES[arm] for arm in arms)} |", f"|---|{'---:|' * len(arms)}"]
    for quantity, by_arm in summarize(runs).items():
        cells = [_spread(by_arm[arm]) if arm in by_arm else "" for arm in arms]
        lines.append(f"| {quantity} | {' | '.join(cells)} |")
    seeds = {arm: ", ".join(map(str, by_seed)) for arm, by_seed in runs.items()}
    lines += ["", "Medians of seeds (least to most): " + "; ".join(f"{TITLES[a]}: {s}" for a, s in seeds.items()) + "."]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def plot(runs: Mapping[str, Mapping[int, Rows]], png: Path) -> None:
    """Reward and seconds of update over steps: seeds faint, their mean strong (of rewards over `WINDOW` steps)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, key, title, unit, window in (
        (panels[0], "reward", "Reward", f"mean of a step, over {WINDOW} steps", WINDOW),
        (panels[1], "time/update", "Update", "seconds a step", 1),
    ):
        for arm, by_seed in runs.items():
            curves = [[row[key] for row in steps(rows)] for rows in by_seed.values()]
            smooth = [[mean(curve[i : i + window]) for i in range(len(curve) - window + 1)] for curve in curves]
            for curve in smooth:
                axes.plot(range(window, window + len(curve)), curve, color=_COLORS[arm], linewidth=0.8, alpha=0.35)
            together = [mean(values) for values in zip(*smooth, strict=False)]
            places = range(window, window + len(together))
            axes.plot(places, together, color=_COLORS[arm], linewidth=2.2, label=TITLES[arm])
        axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
        axes.set_xlabel("step", color=_MUTED, fontsize=9)
        axes.set_ylabel(unit, color=_MUTED, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_MUTED, labelsize=9, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].legend(fontsize=8.5, frameon=False, loc="lower right", labelcolor=_INK)
    figure.savefig(png, facecolor="white")


def main(arguments: Sequence[str] | None = None) -> None:
    if str(REPO) not in sys.path:  # run as a script
        sys.path.append(str(REPO))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--report", action="store_true", help="of the runs in DIR, without training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--recipe", type=Path, default=REPO / "recipes" / "demo.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of the recipe, for all arms")
    given = parser.parse_args(arguments)
    if not given.report:
        run_all(given.out, given.seeds, given.arms, given.recipe, given.set)
    runs = load(given.out)
    (given.out / "support_demo.md").write_text(markdown(runs))
    plot(runs, given.out / "support_demo.png")
    print(markdown(runs))


if __name__ == "__main__":
    main()
