"""SmolLM2-135M, six steps with TRL 1.16's trainer and with ours: by how much do losses and grad norms differ?

    python benchmarks/trl_parity.py --out parity.json                  every loss; half an hour on two cores
    python benchmarks/trl_parity.py --out parity.json --losses dapo --steps 2

float32, the same seeds. KL, accumulation over four micro-batches, LoRA and masked truncation take turns.
Writes what either run logged, and the largest relative difference of each metric.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import machine_facts
from trl_setup import build, model_path, remove_folder

LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}
FACTORS: dict[str, dict[str, Any]] = {
    "kl": {"beta": 0.04},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 3},
    "truncation": {"mask_truncated_completions": True},
}


def cases(names: Sequence[str]) -> list[tuple[str, list[str], dict[str, Any]]]:
    """(loss, factors that are on, options): for each loss a row with some of the factors and one with the others."""
    rows = []
    for number, (name, loss) in enumerate(LOSSES.items()):
        for flip in (0, 1):
            on = [f for bit, f in enumerate((*FACTORS, "lora")) if (number >> bit & 1) != flip]
            options = {key: value for f in on for key, value in FACTORS.get(f, {}).items()}
            rows.append((name, on, {**loss, **options}))
    return [row for row in rows if row[0] in names]


def train(contender: str, path: str, steps: int, on: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run logged at each step."""
    settings = {"per_device_train_batch_size": 6, "num_generations": 3, "max_completion_length": 8, "num_iterations": 2}
    settings |= {"max_steps": steps, "learning_rate": 1e-5, "bf16": False, "gradient_checkpointing": False}
    trainer = build(contender, path, lora="lora" in on, **(settings | options))
    trainer.train()
    remove_folder(trainer)
    return [row for row in trainer.state.log_history if "train_runtime" not in row]


def differences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """The largest |ours - theirs| / max(|theirs|, 1e-3) of each metric; names that one lacks are infinitely off."""
    worst: dict[str, float] = {}
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine.keys() | other.keys():
            if "time" in name:
                continue
            got, want = mine.get(name), other.get(name)
            if got is None or want is None:
                off = 0.0 if got == want else float("inf")
            else:
                off = abs(got - want) / max(abs(want), 1e-3)
            worst[name] = max(worst.get(name, 0.0), off)
    return worst


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases and write the raw file."""
    parser = argparse.ArgumentParser(description="TRL's trainer and ours, step by step.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a folder; default SmolLM2-135M")
    parser.add_argument("--losses", nargs="*", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args(argv)
    path = model_path(given.model)
    versions = {package: version(package) for package in ("torch", "transformers", "trl", "peft")}
    result: dict[str, Any] = {"machine": machine_facts(), "versions": versions, "steps": given.steps, "rows": []}
    for name, on, options in cases(given.losses):
        theirs, ours = (train(contender, path, given.steps, on, options) for contender in ("trl", "grpo-fast"))
        off = differences(ours, theirs)
        result["rows"].append({"loss": name, "with": on, "differences": off, "trl": theirs, "grpo-fast": ours})
        print(f"{name:<8} {' '.join(on):<36} loss {off['loss']:.1e}  grad_norm {off['grad_norm']:.1e}", flush=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")  # what is there stays if the run is stopped


if __name__ == "__main__":
    main()
