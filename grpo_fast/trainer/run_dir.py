"""The folder of a run: what is in it, when it may be used, and the batch that a NaN leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo_fast.trainer.batch import Experience
from grpo_fast.trainer.checkpoint import checkpoints, find_checkpoint, later_checkpoints
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.errors import ConfigError
from grpo_fast.trainer.files import recover, remove_folder

CONFIG_FILE, MODEL_DIR, ASIDE = "config.yaml", "model", "replaced"
_LINES = ("metrics.jsonl", "completions.jsonl")
# What a run writes: this and nothing else is ever moved or removed.
_RUN_FILES = (CONFIG_FILE, MODEL_DIR, *_LINES, "plot.png", "tensorboard", "wandb_id", "checkpoint-*", "nonfinite-*")
_MOVING = f".{ASIDE}-moving"


def find_start(config: TrainConfig) -> Path | None:
    """The checkpoint to continue from, or None to start anew. Nothing is touched, but for what a kill left half done.

    With both `resume=auto` and `overwrite=true` a run is continued if it can be, else replaced.

    Raises:
        ConfigError: the folder is not empty and neither `resume` nor `overwrite` says what to do with it; or something
            that the run needs lies in what it replaces.
        CheckpointError: `resume` names no checkpoint.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: expected a folder; {folder} is a file")
    _recover(folder)
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
    if checkpoint is None or not _is_of(checkpoint, folder):
        _refuse_inputs_among(_run_files(folder), config)
    return checkpoint


def begin(folder: Path, checkpoint: Path | None, step: int) -> list[str]:
    """Make `output_dir` ready for a run that goes on after `step` steps: what is in its way is set aside, whole.

    Args:
        checkpoint: that it goes on from, or None.

    Returns:
        lines that say what was set aside, and where.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None and _is_of(checkpoint, folder):
        moved, copied = later_checkpoints(folder, step), [folder / name for name in _LINES]
        what = f"checkpoints after step {step} and the metrics of all steps"
    else:
        moved, copied, what = _run_files(folder), [], "the earlier run"
    if not moved:
        return []
    number = 1 + max((_number_of(path) for path in folder.glob(f"{ASIDE}-*")), default=0)
    moving, aside = folder / _MOVING, folder / f"{ASIDE}-{number}"
    moving.mkdir()
    for path in moved:
        path.rename(moving / path.name)
    for path in copied:
        if path.exists():
            shutil.copy2(path, moving)
    moving.rename(aside)
    return [f"set aside, in {aside}: {what}"]


def remove_replaced(folder: Path) -> None:
    """Remove what was set aside: the run that replaced it has ended."""
    for path in folder.glob(f"{ASIDE}-*"):
        if _number_of(path):
            remove_folder(path)


def _recover(folder: Path) -> None:
    moving = folder / _MOVING
    if moving.is_dir():  # killed while it was set aside: as it was before
        for path in moving.iterdir():
            if not (folder / path.name).exists():  # else it is a copy
                path.rename(folder / path.name)
        shutil.rmtree(moving)
    recover(folder, ("checkpoint-*", MODEL_DIR, f"{ASIDE}-*"))


def _run_files(folder: Path) -> list[Path]:
    return [path for pattern in _RUN_FILES for path in sorted(folder.glob(pattern))]


def _is_of(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == folder.resolve()


def _number_of(aside: Path) -> int:
    number = aside.name.removeprefix(f"{ASIDE}-")
    return int(number) if number.isdecimal() else 0


def _refuse_inputs_among(files: Sequence[Path], config: TrainConfig) -> None:
    places = [path.resolve() for path in files]
    inputs = {"model.path": config.model.path, "data.train": config.data.train, "data.eval": config.data.eval}
    inputs |= {f"rewards[{i}].function": reward.function.rpartition(":")[0] for i, reward in enumerate(config.rewards)}
    inputs |= {f"plugins[{i}]": name for i, name in enumerate(config.plugins)}
    for name, value in inputs.items():
        path = Path(value or "").expanduser().resolve()
        if value and any(path == place or place in path.parents for place in places):
            raise ConfigError(
                f"{name}: expected something outside of what this run replaces in {config.output_dir}; got {value} "
                "(choose another output_dir)"
            )


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
