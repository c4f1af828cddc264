"""The folder of a run: what is in it, when it may be used, and the batch that a NaN leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo_fast.trainer.batch import Experience
from grpo_fast.trainer.checkpoint import checkpoints, find_checkpoint, remove_debris
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.errors import ConfigError

CONFIG_FILE, MODEL_DIR = "config.yaml", "model"
# What a run writes: `overwrite=true` removes this and nothing else.
_RUN_FILES = (
    CONFIG_FILE,
    MODEL_DIR,
    "metrics.jsonl",
    "completions.jsonl",
    "plot.png",
    "tensorboard",
    "wandb_id",
    "checkpoint-*",
    ".checkpoint-*",
    "nonfinite-*",
)


def prepare_output_dir(config: TrainConfig) -> Path | None:
    """Make `output_dir` ready; returns the checkpoint to continue from, or None to start anew.

    With both `resume=auto` and `overwrite=true` a run is continued if it can be, else replaced.

    Raises:
        ConfigError: the folder is not empty and neither `resume` nor `overwrite` says what to do with it.
        CheckpointError: `resume` names no checkpoint.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: expected a folder; {folder} is a file")
    checkpoint = None
    if config.resume is not None:
        checkpoint = find_checkpoint(config.resume, folder)
    elif folder.exists() and any(folder.iterdir()) and not config.overwrite:
        found = checkpoints(folder)
        where = f"a run with checkpoints up to {found[-1].name}" if found else "other files"
        go_on = "resume=auto to continue it, " if found else ""
        raise ConfigError(
            f"output_dir: {folder} holds {where}; add {go_on}overwrite=true to replace what a run writes, or choose "
            "another output_dir"
        )
    if checkpoint is None and config.overwrite and folder.exists():
        for pattern in _RUN_FILES:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    remove_debris(folder)
    return checkpoint


def save_bad_batch(
    output_dir: Path,
    step: int,
    reason: str,
    experience: Experience,
    completions: Sequence[int],
    metrics: Mapping[str, float],
    tokenizer: Any,
) -> Path:
    """Keep the batch of a step that gave NaN: tensors as safetensors, texts and metrics as JSON."""
    from safetensors.torch import save_file

    folder = output_dir / f"nonfinite-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**experience.tensors(), "completions": torch.tensor(list(completions))}, folder / "batch.safetensors")
    texts = []
    for number in completions:
        span = experience.span(number)
        texts.append(
            {
                "number": number,
                "prompt": tokenizer.decode(experience.prompt(number).tolist()),
                "completion": tokenizer.decode(experience.tokens[span.start : span.stop].tolist()),
                "advantage": float(experience.advantages[number]),
            }
        )
    # repr: JSON has no NaN.
    shown = {name: repr(value) for name, value in metrics.items()}
    info = {"step": step, "reason": reason, "metrics": shown, "completions": texts}
    (folder / "info.json").write_text(json.dumps(info, indent=2, ensure_ascii=False), encoding="utf-8")
    return folder
