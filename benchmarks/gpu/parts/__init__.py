"""The parts, in the order in which they run: `PARTS`. To add one, write a module with `tasks` and a row here.

A part's `tasks(context)` says what is to be measured, the most telling first; each task's `run` returns a result that
JSON can hold, raises `Skip` with the reason why it cannot run here, `Unfinished` if it wants to go on next time, or
anything else if it failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.contest import Entry, contest
from benchmarks.gpu.device import Device
from benchmarks.gpu.shapes import Shapes
from benchmarks.machine import REPO

PART_SECONDS = 540.0
"""No part runs longer than this in one go."""


class Skip(Exception):  # noqa: N818 - an outcome, no error
    """A measurement cannot be made here; the message says why."""


class Unfinished(Exception):  # noqa: N818
    """Time is over in the middle of a measurement that goes on where it stopped."""


@dataclass
class Clock:
    """When to stop: a time of the monotonic clock."""

    deadline: float

    @staticmethod
    def of(seconds: float) -> Clock:
        return Clock(time.monotonic() + seconds)

    def left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass
class Context:
    """What a part gets.

    Attributes:
        out: the folder of the results. python: the interpreter for what a part starts.
        notes: `stamp`, what a measurement of this run is of.
    """

    device: Device
    shapes: Shapes
    out: Path
    clock: Clock
    python: str = sys.executable
    notes: dict[str, Any] = field(default_factory=dict)

    def contest(self, entries: Sequence[Entry], **options: bool) -> dict[str, dict[str, Any]]:
        """`contest.contest` with this run's rounds; options: `queued`, `cold`."""
        return contest(self.device, entries, rounds=self.shapes.rounds, warm_ups=self.shapes.warm_ups, **options)

    def workspace(self, backend: str, vocab: int, num_bytes: int) -> int:
        """A cap: as it stands; of tiny shapes, beside what a backend's scratch takes, which does not shrink with V."""
        if not self.shapes.tiny:
            return num_bytes
        import torch

        from grpo_fast.backends.base import get_backend

        return num_bytes + get_backend(backend).scratch_bytes(vocab, torch.bfloat16, self.device.torch)

    def backends(self, *names: str, slow: bool = False) -> list[str]:
        """Those of the names that run here, in that order (none: all); slow ones if asked for."""
        present = [name for name, why in self.device.backends().items() if why is None]
        left_out = frozenset() if slow else self.device.slow
        return [name for name in (names or present) if name in present and name not in left_out]


def start(
    context: Context, command: Sequence[str], *, variables: Mapping[str, str] | None = None, shown: bool = False
) -> tuple[int, str]:
    """Run a command in the checkout for as long as there is time; returns (exit status, what it printed).

    Args:
        variables: of the environment, besides ours. shown: what it prints goes to this process's output instead.

    Raises:
        Unfinished: time was over, and there may be more next time.
        RuntimeError: it took all of a part's time.
    """
    left = max(context.clock.left(), 1.0)
    process = subprocess.Popen(
        command, cwd=REPO, env={**os.environ, **(variables or {})}, text=True, start_new_session=True,
        stdout=None if shown else subprocess.PIPE, stderr=None if shown else subprocess.STDOUT,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=left)[0]
    except subprocess.TimeoutExpired:
        words = f"{' '.join(command)} was not done in {left:.0f} s"
        if left < 0.75 * PART_SECONDS:
            raise Unfinished(words) from None
        raise RuntimeError(words) from None
    finally:
        if process.poll() is None:  # with all that it started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, output or ""


@dataclass(frozen=True)
class Task:
    """A measurement: a key, about how many seconds it takes, and how it is made."""

    key: str
    seconds: float
    run: Callable[[], Any]


@dataclass(frozen=True)
class Part:
    """A row of the table. `needs_device`: all of it runs in the device's environment."""

    name: str
    title: str
    needs_device: bool = True

    def tasks(self, context: Context) -> Iterable[Task]:
        made: Iterable[Task] = import_module(f"benchmarks.gpu.parts.{self.name}").tasks(context)
        return made


PARTS = {
    part.name: part
    for part in (
        Part("build", "the extensions", needs_device=False),
        Part("run", "does it run at all", needs_device=False),
        Part("floor", "the step against the library GEMMs"),
        Part("rows", "row kernels against copies of equal bytes"),
        Part("right", "pytest -m gpu", needs_device=False),
        Part("tuning", "second stream, tile rows, workspace"),
        Part("scenarios", "every scenario beside the competitors"),
        Part("memory", "peak memory against the cap"),
        Part("sanitizers", "compute-sanitizer", needs_device=False),
        Part("demo", "the trainer", needs_device=False),
    )
}

__all__ = ["PARTS", "PART_SECONDS", "REPO", "Clock", "Context", "Part", "Skip", "Task", "Unfinished", "start"]
