"""The README's Python runs as printed, and the numbers it shows are those of the committed raw files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
README = REPO / "README.md"


def test_the_loss_in_fifteen_lines() -> None:
    transformers = pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    code = next(block for block in blocks if "grpo_loss(" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    names = {
        "model": model,
        "ids": torch.randint(0, 50, (4, 9)),
        "attention_mask": torch.ones(4, 9, dtype=torch.int64),
        "completion_mask": torch.arange(9).expand(4, 9) >= 4,
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0]),
    }
    exec(code, names)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert names["out"].metrics.as_dict()["ratio/max"] == 1.0


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
    found = json.loads((RESULTS / "bench.json").read_text())["benchmarks"]
    return {bench["extra_info"]["case"]["name"]: bench["extra_info"] for bench in found}


def timed(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in record["contenders"] if c["status"] == "timed"}


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
            cells += [f"{c['median']:.2f} s", f"{c['floor_ratio']:.2f}", "" if error is None else f"{error:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
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
    ratios = {name: timed(record)["grpo-fast"]["floor_ratio"] for name, record in records().items()}
    claims = [ratio for name, ratio in ratios.items() if f"{ratio:.2f}" not in text()]
    assert not claims, ratios


def test_numbers_of_growth() -> None:
    found = json.loads((RESULTS / "growth.json").read_text())["benchmarks"]
    by_axis = {(b["extra_info"]["growth"], b["extra_info"]["case"]["name"]): b["extra_info"] for b in found}
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
    assert f"ours is {timed(largest)['grpo-fast']['floor_ratio']:.1f} times the floor" in text()


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


def test_numbers_of_the_race() -> None:
    race = json.loads((RESULTS / "race" / "race.json").read_text())
    ours, theirs = (race["summary"][name] for name in ("grpo-fast", "trl"))
    ratio = theirs["seconds_to_target"] / ours["seconds_to_target"]
    assert f"{ours['seconds_to_target']:.0f} s against {theirs['seconds_to_target']:.0f} s" in text()
    assert f"{ratio:.1f} times" in text()
    for one in (ours, theirs):
        split = f"{one['step_seconds']:.1f} s ({one['rollout_seconds']:.1f} + {one['update_seconds']:.1f})"
        assert split in text(), split
    assert race["same_prompts"]
    assert ratio >= 5
