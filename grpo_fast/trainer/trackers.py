"""Trackers: where metrics go besides metrics.jsonl, if asked for (`logging.report_to`)."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.trainer.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass
class Tracker:
    """Takes metrics. One that fails is let go with a warning: metrics.jsonl has it all, and the run matters more."""

    name: str
    send: Callable[[int, dict[str, float]], None]
    finish: Callable[[], None]
    works: bool = True

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.works:
            self._guarded(lambda: self.send(step, metrics))

    def close(self) -> None:
        if self.works:
            self._guarded(self.finish)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # anything, from a full disk to a lost network
            self.works = False
            _log.warning("%s failed and gets no more metrics: %s: %s", self.name, type(error).__name__, error)


def _tensorboard(output_dir: Path, start_step: int, run_config: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted run wrote of later steps is hidden.
    purge_step = start_step + 1 if start_step else None
    writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def send(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", send, writer.close)


def _wandb(output_dir: Path, start_step: int, run_config: dict[str, Any]) -> Tracker:
    import wandb

    id_file = output_dir / "wandb_id"
    if not (start_step and id_file.is_file()):
        id_file.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "grpo-fast"),
        name=output_dir.resolve().name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=str(output_dir),
        config=run_config,
    )
    # wandb's own step only grows, but a resumed run repeats the steps after its checkpoint.
    run.define_metric("*", step_metric="global_step")
    return Tracker("wandb", lambda step, metrics: run.log(metrics | {"global_step": step}), run.finish)


def _trackio(output_dir: Path, start_step: int, run_config: dict[str, Any]) -> Tracker:
    import trackio

    trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", "grpo-fast"),
        name=output_dir.resolve().name,
        config=run_config,
        resume="allow" if start_step else "never",
    )
    return Tracker("trackio", lambda step, metrics: trackio.log(metrics, step=step), trackio.finish)


_TRACKERS: dict[str, Callable[[Path, int, dict[str, Any]], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def make_tracker(name: str, output_dir: Path, start_step: int, run_config: dict[str, Any]) -> Tracker:
    """Start the tracker `name`; `start_step` > 0 continues the run of `output_dir`.

    Raises:
        ConfigError: no such tracker, not installed, or it does not start.
    """
    if name not in _TRACKERS:
        raise ConfigError(f"logging.report_to: expected any of {', '.join(_TRACKERS)}; got {name!r}")
    try:
        return _TRACKERS[name](output_dir, start_step, run_config)
    except ImportError as error:
        raise ConfigError(f"logging.report_to: {name} is not installed (pip install {name}): {error}") from error
    except Exception as error:  # no login, no network, a name it refuses: each has errors of its own
        raise ConfigError(
            f"logging.report_to: {name} does not start ({type(error).__name__}: {error}); mend it or leave it out"
        ) from error
