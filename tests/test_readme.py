"""The README's Python runs as printed, and the numbers it shows are those of the committed raw files."""

from __future__ import annotations

import json
import re
from pathlib import Path

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


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(links) >= 5
    missing = [link for link in links if "://" not in link and not (REPO / link).exists()]
    assert not missing


def test_numbers_are_those_of_the_raw_files() -> None:
    results = REPO / "benchmarks" / "results" / "cpu-epyc-avx512bf16-2core"
    text = " ".join(README.read_text().split())
    rows = [json.loads(line) for line in (results / "demo" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "step_time" in row]
    rewards = [row["reward"] for row in steps]
    held_out = [row["eval/pass@1"] for row in rows if "eval/pass@1" in row]
    assert f"the {len(steps)} steps took {sum(row['step_time'] for row in steps):.0f} s" in text
    assert f"mean reward {sum(rewards[:5]) / 5:.3f} over the first five" in text
    assert f"{sum(rewards[-5:]) / 5:.3f} over the last five" in text
    assert f"held-out accuracy {held_out[0]:.3f} before, {held_out[-1]:.3f} after" in text
    ratios = [b["extra_info"]["ratio"] for b in json.loads((results / "compaction.json").read_text())["benchmarks"]]
    assert f"cost {ratios[0]:.2f} of the dense step" in text
    assert f"and {ratios[1]:.2f} at T = 512" in text
    assert max(ratios) <= 0.62
