"""The race: our trainer and TRL's GRPOTrainer learn the demo's task; who is at the target reward first?

    python benchmarks/race.py --out benchmarks/results/<device>/race                  about an hour on two cores
    python benchmarks/race.py --out benchmarks/results/<device>/race --redraw         table and picture from race.json
    python benchmarks/race.py --out benchmarks/results/<device>/race --top-p 0.95     a second pair beside it
    python benchmarks/race.py --out /tmp/race --seeds 0 --max-steps 2 \\
        --set prompts_per_step=2 rollout.num_generations=2                            does it run?

Each contender and seed runs in a process of its own, contenders in turn, never two at once. Writes race.json (machine,
versions, hyperparameters of both, every step of every run), race.png, and for each run its record and what it said.
With `--top-p P` both trainers sample so, and the files are race-top-p-P.json and so on: those of another pair stay.
How TRL is set up, and which alternatives it has: `race_setup.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import machine_facts
from race_report import WINDOW, markdown, plot, same_prompts, summarize
from race_setup import MICRO_BATCH

HERE = Path(__file__).resolve().parent
NAMES = ("grpo-fast", "trl")

DIFFERENCES = [
    "precision: ours computes with bfloat16 weights under float32 masters, TRL with float32 weights under bfloat16 "
    "autocast; moments are float32 in both",
    "sampling: each draws its own completions from its own random numbers, from the same distribution",
    "layout: ours packs sequences, TRL pads them",
    "micro-batches: ours fills a budget of tokens, TRL takes a fixed number of completions (settings of its runs)",
    "completions whose advantage is zero: ours leaves them out of the update, TRL computes their zero gradient",
    "truncated sampling: with top-p below 1 ours computes on the words that it kept, TRL over the whole vocabulary",
    "not timed: loading, evaluation and checkpoints (neither contender evaluates or saves)",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the race or redraw one; 1 if a run failed."""
    given = build_parser().parse_args(argv)
    file = given.out / f"{race_name(given)}.json"
    if given.redraw:
        race = json.loads(file.read_text(encoding="utf-8"))
    else:
        if file.exists():
            sys.exit(f"error: --out: expected a folder without a race; {file} exists")
        race = run_race(given)
    show(race, file.with_suffix(".png"))
    return int(any(run["error"] is not None for run in race["runs"]))


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description="Our trainer and TRL's: reward against wall time.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--redraw", action="store_true", help="table and picture of the race in DIR, without training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument(
        "--stop-at",
        type=float,
        default=0.7,
        help=f"the target; a run ends {WINDOW} steps after the mean of its last {WINDOW} rewards reached it",
    )
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument(
        "--trl-micro-batch",
        type=int,
        default=MICRO_BATCH,
        metavar="N",
        help="completions that go through TRL's update at once; affects its speed and memory, not its curve",
    )
    parser.add_argument("--recipe", default=str(HERE.parent / "recipes" / "demo.yaml"))
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="both sample with it: a pair of runs with its own files"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of the recipe, for both")
    return parser


def race_name(given: argparse.Namespace) -> str:
    """What the files of a race are called."""
    return "race" if given.top_p is None else f"race-top-p-{given.top_p:g}"


def overrides(given: argparse.Namespace) -> list[str]:
    """Options of the recipe, for both contenders."""
    return [*given.set, *([] if given.top_p is None else [f"rollout.top_p={given.top_p:g}"])]


def run_race(given: argparse.Namespace) -> dict[str, Any]:
    """All runs, one after another; race.json is written anew after each, so that nothing done is lost."""
    (given.out / "runs").mkdir(parents=True, exist_ok=True)
    race: dict[str, Any] = {
        "machine": machine_facts(),
        "command": " ".join(["python", "benchmarks/race.py", *sys.argv[1:]]),
        "recipe": Path(given.recipe).name,
        "overrides": overrides(given),
        "top_p": given.top_p,
        "target": given.stop_at,
        "window": WINDOW,
        "max_steps": given.max_steps,
        "contenders": given.contenders,
        "hyperparameters": None,
        "differences": DIFFERENCES,
        "same_prompts": None,
        "summary": {},
        "runs": [],
    }
    for seed in given.seeds:
        for contender in given.contenders:
            run = run_one(contender, seed, given)
            race["runs"].append(run)
            race["hyperparameters"] = run["start"].pop("hyperparameters", None) or race["hyperparameters"]
            race["same_prompts"] = same_prompts(race["runs"])
            race["summary"] = {name: summarize(race["runs"], name, given.stop_at) for name in given.contenders}
            write_json(race, given.out / f"{race_name(given)}.json")
    return race


def run_one(contender: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One run in a fresh process; its failure is part of the result."""
    name = f"{contender}-seed{seed}"
    file = given.out / "runs" / race_name(given).replace("race", name, 1)
    record, log = (file.with_name(f"{file.name}.{kind}") for kind in ("jsonl", "log"))
    command = [sys.executable, str(HERE / "race_contenders.py"), contender, str(seed), "--record", str(record)]
    command += ["--trl-micro-batch", str(given.trl_micro_batch)]
    command += ["--recipe", given.recipe, "--stop-at", str(given.stop_at), "--max-steps", str(given.max_steps)]
    # Nothing is fetched: without this, Hugging Face's libraries may spend seconds asking after a model's files.
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *_python_path()]),
    }
    print(f"{name}: starting, log in {log}", flush=True)
    record.unlink(missing_ok=True)
    load, started = os.getloadavg()[0], time.perf_counter()
    with open(log, "wb") as stderr:
        code = subprocess.run(
            [*command, "--set", *overrides(given)], env=environment, stderr=stderr, check=False
        ).returncode
    total = time.perf_counter() - started
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    steps = [row for row in rows if "step" in row]
    error = None
    if code != 0 or not steps:
        said = log.read_text(errors="replace").strip().splitlines()
        error = f"exit code {code}: {said[-1][:200] if said else 'it said nothing'}"
        print(f"{name}: FAILED, {error}", flush=True)
    start: dict[str, Any] = next((row for row in rows if "step" not in row), {})
    return {
        "contender": contender,
        "seed": seed,
        "error": error,
        "total_seconds": total,
        "load_before": load,
        "start": start,
        "steps": steps,
    }


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def show(race: Mapping[str, Any], png: Path) -> None:
    """Print the summary; draw the picture if there is anything to draw."""
    print(f"\n{markdown(race)}\n")
    if any(run["steps"] for run in race["runs"]):
        plot(race, png)
        print(f"wrote {png}")


def write_json(race: Mapping[str, Any], file: Path) -> None:
    """In one rename."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(race, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


if __name__ == "__main__":
    sys.exit(main())
