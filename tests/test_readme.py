"""The README's Python runs as printed, and the numbers it shows are those of the committed raw files."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks import report, support_demo

REPO = Path(__file__).resolve().parent.parent
README = REPO / "README.md"


def snippets() -> tuple[str, str]:
    """The Python of the loss: with torch alone, and what goes on from there with a Hugging Face model."""
    section = README.read_text().partition("## The loss in fifteen lines")[2].partition("\n## ")[0]
    first, second = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return first, second


def test_the_loss_in_fifteen_lines(tmp_path: Path) -> None:
    """As it stands, in an interpreter of its own, where nothing but torch can be had."""
    code, _ = snippets()
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 15
    absent = "import sys; sys.modules.update(dict.fromkeys(('transformers', 'peft', 'omegaconf', 'datasets')))\n"
    done = subprocess.run([sys.executable, "-c", absent + code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan, _, metrics = done.stdout.partition(" ")
    assert plan == "single_pass"
    assert ast.literal_eval(metrics)["ratio/max"] == 1.0


def test_the_loss_of_a_model() -> None:
    pytest.importorskip("transformers")
    names: dict[str, Any] = {}
    for code in snippets():
        exec(code, names)
    assert names["weight"].grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


@pytest.mark.parametrize("page", ["README.md", "examples/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (REPO / page).read_text())
    assert len(links) >= 5
    missing = [link for link in links if "://" not in link and not (REPO / page).parent.joinpath(link).exists()]
    assert not missing


RESULTS = REPO / "benchmarks" / "results" / "cpu-epyc-avx512bf16-2core"


def text() -> str:
    """The README with its lines joined."""
    return " ".join(README.read_text().split())


def records() -> dict[str, dict[str, Any]]:
    """What `make bench` measured, by case name."""
    return {record["case"]["name"]: record for record in report.load([RESULTS / "bench.json"])}


def timed(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in record["contenders"] if c["status"] == "timed"}


def spread(record: dict[str, Any], name: str) -> str:
    return report.spread(record, timed(record)[name])


def loss_table() -> list[str]:
    """The README's table of the full step: contenders by time at the first shape."""
    small, large = (record for record in records().values() if record["case"]["scenario"] == "full")
    lines = []
    for name, first in sorted(timed(small).items(), key=lambda item: item[1]["median"]):
        cells = [name + ("" if first["entropy"] else " *")]
        for record in (small, large):
            c = timed(record).get(name)
            if c is None:
                cells += ["", "", ""]
                continue
            error = c["errors"].get("logprobs")
            cells += [f"{c['median']:.2f} s", spread(record, name), "" if error is None else f"{error:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def scenario_table() -> list[str]:
    """The README's table of the other scenarios: ours against the products of the case."""
    lines = []
    for record in records().values():
        case, gemms = record["case"], len(record["floor"]["gemms"])
        if case["scenario"] != "full":
            products = f"{gemms} product{'s' * (gemms > 1)}"
            lines.append(f"| {case['title']} ({products}) | {spread(record, 'grpo-fast')} |")
    return lines


def demo_steps(run: str) -> tuple[list[dict[str, Any]], list[float]]:
    """The steps of a demo run, and its held-out accuracies."""
    rows = [json.loads(line) for line in (RESULTS / run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "step_time" in row], [row["eval/pass@1"] for row in rows if "eval/pass@1" in row]


def test_numbers_of_the_demo() -> None:
    steps, held_out = demo_steps("demo")
    rewards = [row["reward"] for row in steps]
    assert f"the {len(steps)} steps took {sum(row['step_time'] for row in steps):.0f} s" in text()
    assert f"mean reward {sum(rewards[:5]) / 5:.3f} over the first five" in text()
    assert f"{sum(rewards[-5:]) / 5:.3f} over the last five" in text()
    assert f"held-out accuracy {held_out[0]:.3f} before, {held_out[-1]:.3f} after" in text()
    plain, _ = demo_steps("demo-torch")
    end = sum(row["reward"] for row in plain[-5:]) / 5
    assert f"took {sum(row['step_time'] for row in plain):.0f} s and ended at {end:.3f}" in text()


def test_numbers_of_the_loss() -> None:
    lines = README.read_text().splitlines()
    table = loss_table()
    assert len(table) >= 6
    missing = [line for line in table if line not in lines]
    assert not missing, "\n".join(missing)
    rows = scenario_table()
    assert len(rows) == 6
    missing = [line for line in rows if line not in lines]
    assert not missing, "\n".join(missing)
    small, large = (record for record in records().values() if record["case"]["scenario"] == "full")
    floors = [record["floor"]["median"] for record in (small, large)]
    assert f"in the same rounds: {floors[0]:.2f} and {floors[1]:.2f} s" in text()
    half = timed(records()["SmolLM2-135M-T2048-half"])["grpo-fast"]["median"]
    assert f"That half takes {half / timed(small)['grpo-fast']['median']:.2f} of the time of a full step" in text()


def test_the_report_is_of_the_raw_files() -> None:
    written = report.markdown(report.load([RESULTS / "bench.json", RESULTS / "growth.json"]))
    assert (RESULTS / "report.md").read_text() == written


def test_numbers_of_growth() -> None:
    by_axis = {(r["growth"], r["case"]["name"]): r for r in report.load([RESULTS / "growth.json"])}
    peaks = []
    for tokens in (2048, 16384):
        one = timed(by_axis["tokens", f"SmolLM2-135M-T{tokens}-full"])
        peaks.append(
            [round(one[name]["peak_bytes"] / 2**20) for name in ("grpo-fast", "plain log-softmax", "TRL chunked")]
        )
    ours, plain, trl = zip(*peaks, strict=True)
    assert f"from {ours[0]} to {ours[1]} MiB, a plain loss's from {plain[0]} to {plain[1]}," in text()
    assert f"and TRL's from {trl[0]} to {trl[1]};" in text()
    largest = next(r for (axis, _), r in by_axis.items() if axis == "vocab" and r["case"]["vocab"] == 262144)
    ratio, _, span = spread(largest, "grpo-fast").partition(" ")
    assert f"ours takes {ratio} times the reference {span}" in text()


def support_rows() -> list[str]:
    """The README's table of steps on supports."""
    lines = []
    for record in report.load([RESULTS / "support" / "loss.json"]):
        case, by_name = record["case"], timed(record)
        ours, dense, masked = (
            by_name[name]["median"] for name in ("grpo-fast", "grpo-fast dense", "plain log-softmax")
        )
        title = case["title"].removeprefix("full step, ")
        lines.append(
            f"| {case['model']}, {title} | {ours * 1e3:.0f} ms ({ours / dense:.3f}) | {dense:.2f} s | "
            f"{masked:.2f} s ({masked / ours:.0f}) |"
        )
    return lines


def test_numbers_of_supports() -> None:
    lines = README.read_text().splitlines()
    rows = support_rows()
    assert len(rows) == 8
    missing = [row for row in rows if row not in lines]
    assert not missing, "\n".join(missing)
    found = {record["case"]["name"]: timed(record) for record in report.load([RESULTS / "support" / "loss.json"])}
    ratio = {name: one["grpo-fast"]["median"] / one["grpo-fast dense"]["median"] for name, one in found.items()}
    small, large = (ratio[f"{head}-support8"] for head in ("SmolLM2-135M-T2048", "Qwen3-0.6B-T1024"))
    assert f"a full step takes {small:.3f} of the dense one's time (V = 49152; {large:.3f} at 151936)" in text()
    # What was asked for: 0.08 and 0.04 at a mean of 8, 0.15 at 64.
    assert small <= 0.08
    assert large <= 0.04
    assert all(value <= 0.15 for name, value in ratio.items() if name.endswith("support64"))


def test_numbers_of_the_demo_on_supports() -> None:
    table = support_demo.summarize(support_demo.load(RESULTS / "support" / "demo"))

    def of(quantity: str, arm: str, digits: int) -> str:
        values = table[quantity][arm]
        return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    arms = ("support", "off", "everything")
    reward = [of("reward, mean of all steps", arm, 2) for arm in arms]
    update = [of("the same, ms a token", arm, 2) for arm in arms]
    off = [of("first step: |log p - sampler's|, nats, mean", arm, 3) for arm in arms]
    page = " ".join(text().split())
    assert f"a mean reward over all 40 steps of {reward[0]}, {reward[1]} and {reward[2]}." in page
    assert f"The update takes {update[0]}, {update[1]} and {update[2]} ms a token:" in page
    assert f"log p is off the sampler's by {off[0]}, {off[1]} and {off[2]} nats:" in page
    assert all(len(values) == 3 for by_arm in table.values() for values in by_arm.values())
    for arm in ("support", "off"):
        assert table["first step: least ratio"][arm] == table["first step: largest ratio"][arm] == [1.0] * 3


def test_memory_of_supports_does_not_grow_with_the_vocabulary() -> None:
    extra = [
        timed(record)["grpo-fast"]["peak_bytes"] - record["case"]["gradient_bytes"]
        for record in report.load([RESULTS / "support" / "growth.json"])
        if record["growth"] == "support_vocab"
    ]
    assert len(extra) == 4
    assert max(extra) - min(extra) < 2**20, extra


def test_numbers_inside_trl() -> None:
    rows = json.loads((RESULTS / "trl_step.json").read_text())["rows"]
    found = {(row["mode"], row["contender"]): row for row in rows if row["weights"] == "autocast"}
    theirs, ours = found["loss part", "trl"], found["loss part", "grpo-fast"]
    times = f"{theirs['median_seconds']:.2f} s and {ours['median_seconds']:.2f} s"
    assert f"{times} ({ours['faster_than_trl']:.1f} times faster)" in text()
    assert ours["faster_than_trl"] >= 2.5
    theirs, ours = found["update", "trl"], found["update", "grpo-fast"]
    peaks = [round(row["peak_bytes"] / 2**20) for row in (theirs, ours)]
    update = f"{theirs['median_seconds']:.1f} and {ours['median_seconds']:.1f} s in {peaks[0]} and {peaks[1]} MiB"
    assert f"the whole update {update}" in text()


def test_numbers_of_trls_own_tests() -> None:
    record = json.loads((RESULTS / "trl_tests.json").read_text())
    different = [name for name, test in record["tests"].items() if len(set(test["outcomes"].values())) > 1]
    assert not different
    counts = record["counts"]["trl"]
    page = (REPO / "examples" / "README.md").read_text()
    assert f"`tests/test_grpo_trainer.py`: {len(record['tests'])} tests" in page
    assert f"({counts['passed']} pass; {counts['skipped']} need" in page
    assert f"{counts['xfailed']} is expected to fail; {counts['failed']} fail with TRL's class too" in page


@pytest.mark.parametrize("name", ["race.json", "race-top-p-0.95.json"])
def test_numbers_of_the_race(name: str) -> None:
    race = json.loads((RESULTS / "race" / name).read_text())
    ours, theirs = (race["summary"][name] for name in ("grpo-fast", "trl"))
    ratio = theirs["seconds_to_target"] / ours["seconds_to_target"]
    assert f"{ours['seconds_to_target']:.0f} s against {theirs['seconds_to_target']:.0f} s" in text()
    assert f"{ratio:.1f} times sooner" in text()
    for one in (ours, theirs):
        split = f"{one['step_seconds']:.1f} s ({one['rollout_seconds']:.1f} + {one['update_seconds']:.1f})"
        assert split in text(), split
    assert race["same_prompts"]
    assert ratio >= 5
