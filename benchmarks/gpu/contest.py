"""Timing side by side: contenders take turns, beginning one further every round; medians, with all that was seen.

    results = contest(device, [Entry("gemm", ...), Entry("step", ...)], rounds=7, warm_ups=2)
    results["step"]["median"]

Each result: median, min, max, n, seconds (all of them) and spread ((max - min) / median); or failed: the reason, for an
entry that raised, whose rivals go on.
"""

from __future__ import annotations

import gc
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.device import Device

SLOW_SECONDS, SLOW_ROUNDS = 4.0, 3  # an action this slow is repeated less


def _nothing() -> None:
    pass


@dataclass
class Entry:
    """A contender. `before` runs untimed before each timed run: it frees gradients, or refills what is consumed."""

    name: str
    run: Callable[[], Any]
    before: Callable[[], Any] = _nothing
    seconds: list[float] = field(default_factory=list)
    failed: str | None = None

    def wants(self, rounds: int) -> bool:
        if self.failed is not None:
            return False
        slow = bool(self.seconds) and self.seconds[0] > SLOW_SECONDS
        return len(self.seconds) < (min(rounds, SLOW_ROUNDS) if slow else rounds)

    def result(self) -> dict[str, Any]:
        return {"failed": self.failed} if self.failed is not None else times(self.seconds)


def times(seconds: Sequence[float]) -> dict[str, Any]:
    """A contender's numbers."""
    median = statistics.median(seconds)
    return {
        "median": median,
        "min": min(seconds),
        "max": max(seconds),
        "spread": (max(seconds) - min(seconds)) / median,
        "n": len(seconds),
        "seconds": list(seconds),
    }


def contest(
    device: Device,
    entries: Sequence[Entry],
    *,
    rounds: int,
    warm_ups: int,
    queued: bool = False,
    cold: bool = False,
) -> dict[str, dict[str, Any]]:
    """Time the entries: each once a round.

    Args:
        queued: as in `Device.timed`. cold: the L2 cache is overwritten before each run, for small working sets.
    """

    def turn(entry: Entry, *, counts: bool) -> None:
        try:
            entry.before()
            if cold:
                device.clear_cache()
            seconds = device.timed(entry.run, queued=queued)
        except Exception as error:
            entry.failed = complaint(device, error)
            return
        if counts:
            entry.seconds.append(seconds)

    for _ in range(warm_ups):
        for entry in entries:
            if entry.failed is None:
                turn(entry, counts=False)
    gc.collect()
    collects = gc.isenabled()
    gc.disable()  # a collection in the middle of a step would be timed with it
    try:
        for shift in range(rounds):
            first = shift % len(entries)
            for entry in (*entries[first:], *entries[:first]):
                if entry.wants(rounds):
                    turn(entry, counts=True)
    finally:
        if collects:
            gc.enable()
    return {entry.name: entry.result() for entry in entries}


class BrokenDeviceError(RuntimeError):
    """The device answers nothing any more in this process (an illegal access does that)."""


def complaint(device: Device, error: Exception) -> str:
    """What went wrong, in a line; memory is given back.

    Raises:
        BrokenDeviceError: the process needs to be started again.
    """
    text = f"{type(error).__name__}: {error}".strip()
    try:
        device.synchronize()
    except Exception as trouble:
        raise BrokenDeviceError(text) from trouble
    if isinstance(error, torch.OutOfMemoryError):
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that were too many
        gc.collect()
        device.release()
    return text.splitlines()[0][:500]
