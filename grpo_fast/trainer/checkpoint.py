"""Checkpoints: a folder that appears whole or not at all, and everything a run needs to continue to the last bit.

checkpoint-000020/
  trainer.safetensors      float32 weights and AdamW moments, `<kind>/<parameter>`
  experience.safetensors   the rollout in use, if its steps are not all done
  rng.safetensors          torch, CUDA and numpy generators
  state.json               step, counters, data position, Python's generator, config
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_fast.trainer.errors import CheckpointError
from grpo_fast.trainer.files import put_in_place, remove_folder, scratch_of

_NAME = re.compile(r"checkpoint-(\d+)")
_TRAINER, _EXPERIENCE, _RNG, _STATE = "trainer.safetensors", "experience.safetensors", "rng.safetensors", "state.json"
_FORMAT = 1


@dataclass
class RngState:
    """The state of every generator that code outside this package may draw from."""

    tensors: dict[str, Tensor]
    python: Any

    @staticmethod
    def take() -> RngState:
        """The generators as they are now."""
        _, keys, position, has_gauss, gauss = np.random.get_state()
        tensors = {
            "torch": torch.get_rng_state(),
            "numpy/keys": torch.from_numpy(np.asarray(keys, dtype=np.uint32).view(np.int32).copy()),
            "numpy/rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        }
        if torch.cuda.is_available():
            tensors |= {f"cuda/{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
        return RngState(tensors, random.getstate())

    def restore(self) -> None:
        """Put the generators back."""
        version, internal, gauss = self.python
        random.setstate((version, tuple(internal), gauss))
        position, has_gauss, cached = self.tensors["numpy/rest"].tolist()
        keys = self.tensors["numpy/keys"].numpy().view(np.uint32)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
        torch.set_rng_state(self.tensors["torch"])
        count = sum(name.startswith("cuda/") for name in self.tensors)
        if torch.cuda.is_available() and count == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([self.tensors[f"cuda/{number}"] for number in range(count)])


@dataclass
class Checkpoint:
    """A run after `step` optimiser steps.

    Attributes:
        trainer: weights and moments. experience: the rollout in use, or None.
        rng: generators. state: JSON values of the loop and the sampler, and the config.
    """

    step: int
    trainer: dict[str, Tensor]
    experience: dict[str, Tensor] | None
    rng: RngState
    state: dict[str, Any]


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return output_dir / f"checkpoint-{step:06d}"


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and _is_whole(path)]
    return sorted(found, key=_step_of)


def save_checkpoint(output_dir: Path, checkpoint: Checkpoint, *, keep: int | None = None) -> Path:
    """Write a checkpoint into a folder beside its place, then rename; remove the oldest beyond `keep`.

    A kill at any moment leaves the earlier checkpoints as they were, also one of the same step.
    """
    from safetensors.torch import save_file

    target = checkpoint_path(output_dir, checkpoint.step)
    scratch = scratch_of(target)
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.trainer.items()}, scratch / _TRAINER)
    if checkpoint.experience is not None:
        save_file(checkpoint.experience, scratch / _EXPERIENCE)
    save_file(checkpoint.rng.tensors, scratch / _RNG)
    state = {"format": _FORMAT, "step": checkpoint.step, "python_rng": checkpoint.rng.python, **checkpoint.state}
    (scratch / _STATE).write_text(json.dumps(state), encoding="utf-8")
    put_in_place(target)
    if keep is not None:
        for old in [path for path in checkpoints(output_dir) if path != target][: -(keep - 1) or None]:
            remove_folder(old)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: there is none, or it is not complete.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not _is_whole(path):
        raise CheckpointError(f"resume: expected a checkpoint folder with {_STATE}; got {path}")
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        trainer = load_file(path / _TRAINER)
        rng = load_file(path / _RNG)
        experience = load_file(path / _EXPERIENCE) if (path / _EXPERIENCE).is_file() else None
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"resume: {path} cannot be read: {error}") from error
    if state.get("format") != _FORMAT:
        raise CheckpointError(f"resume: expected checkpoint format {_FORMAT}; {path} has {state.get('format')}")
    return Checkpoint(state["step"], trainer, experience, RngState(rng, state["python_rng"]), state)


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights alone of a checkpoint (float32, by parameter name) and the config of its run.

    Raises:
        CheckpointError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        with safe_open(path / _TRAINER, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("weight/")]  # noqa: SIM118 - not a dict
            weights = {name.removeprefix("weight/"): file.get_tensor(name) for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {error}") from error
    return weights, state["config"]


def find_checkpoint(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that `resume` names: `auto` is the newest of `output_dir` (None if there is none).

    Raises:
        CheckpointError: a path without a checkpoint.
    """
    if resume == "auto":
        found = checkpoints(output_dir)
        return found[-1] if found else None
    checkpoint = checkpoint_at(Path(resume).expanduser())
    if checkpoint is None:
        raise CheckpointError(f"resume: expected auto, a checkpoint or a run with checkpoints; got {resume}")
    return checkpoint


def checkpoint_at(path: Path) -> Path | None:
    """`path` if it is a checkpoint, the newest one of the run that it is, or None."""
    if _is_whole(path):
        return path
    found = checkpoints(path) if path.is_dir() else []
    return found[-1] if found else None


def later_checkpoints(output_dir: Path, step: int) -> list[Path]:
    """Those of steps after `step`."""
    return [path for path in checkpoints(output_dir) if _step_of(path) > step]


def _is_whole(path: Path) -> bool:
    return (path / _STATE).is_file()


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))
