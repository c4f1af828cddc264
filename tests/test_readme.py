"""The README's Python runs as printed, and the numbers it shows are those of the committed raw files."""

from __future__ import annotations

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
