"""One part, in this process: its measurements one after another, each written down as it begins and as it ends."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu.contest import BrokenDeviceError
from benchmarks.gpu.device import Device
from benchmarks.gpu.parts import Clock, Context, Part, Skip, Task, Unfinished
from benchmarks.gpu.shapes import FULL, TINY
from benchmarks.gpu.store import IDENTITY, Store
from benchmarks.machine import machine_facts

DONE, UNFINISHED, RESTART = 0, 3, 4
"""What a worker's process returns: nothing is left; time is over; something is left that needs a new process."""


def facts_of(device: Device, *, tiny: bool) -> dict[str, Any]:
    """What the files carry: machine, versions, commit, device."""
    machine = machine_facts()
    of_device = device.facts()
    # Of the device measured, whatever else torch sees.
    return {
        **machine,
        **of_device,
        "device": of_device["gpu"],
        "triton": machine["packages"].get("triton"),
        "stand_in": device.stand_in,
        "tiny": tiny,
        "state": device.state(),
    }


def run_part(
    part: Part,
    device: Device,
    out: Path,
    seconds: float,
    *,
    tiny: bool,
    again: float = 0.0,
    retry: float = 0.0,
) -> int:
    """Run what is left of a part; returns `DONE`, `UNFINISHED` or `RESTART`."""
    store = Store(out, part.name, facts_of(device, tiny=tiny), again=again, retry=retry)
    store.give_up_on_crashed("it ended its process, twice")
    stamp = "/".join(str(store.machine.get(name)) for name in IDENTITY) + f"/{again}"
    context = Context(device, TINY if tiny else FULL, out, Clock.of(seconds), notes={"stamp": stamp})
    try:
        with _environment(device, part):
            return _run_tasks(part, context, store)
    finally:
        store.machine["state"] = device.state()
        store.write()


@contextmanager
def _environment(device: Device, part: Part):  # type: ignore[no-untyped-def]
    if part.needs_device:
        with device.environment():
            yield
    else:
        yield


def _run_tasks(part: Part, context: Context, store: Store) -> int:
    longest, left_over = 0.0, False
    try:
        tasks = list(part.tasks(context))
    except Exception as error:  # a part that cannot even say what it measures is a finding like others
        tasks = [Task("tasks", 0, _raises(error))]
    for task in tasks:
        if store.is_done(task.key):
            continue
        expected = max(longest, 1.0 if context.shapes.tiny else task.seconds)
        if context.clock.left() < expected:
            print(f"  {task.key}: about {expected:.0f} s, {context.clock.left():.0f} s are left; next time", flush=True)
            left_over = True
            continue
        start = time.monotonic()
        status = _run_task(task, context, store)
        longest = max(longest, 0.8 * (time.monotonic() - start))
        if status == "broken":
            return RESTART
        left_over = left_over or status == "unfinished"
    return UNFINISHED if left_over else DONE


def _raises(error: Exception):  # type: ignore[no-untyped-def]
    def run() -> None:
        raise error

    return run


def _run_task(task: Task, context: Context, store: Store) -> str:
    """Make a measurement and write it down; "ok", "skipped", "failed", "unfinished" or "broken"."""
    store.begin(task.key)
    start, status, result, reason = time.monotonic(), "ok", None, None
    try:
        result = task.run()
    except Skip as error:
        status, reason = "skipped", str(error)
    except Unfinished as error:
        print(f"  {task.key}: goes on next time ({error})", flush=True)
        store.interrupt(task.key, str(error))
        return "unfinished"
    except BrokenDeviceError as error:
        store.finish(task.key, "failed", reason=f"{error}; the device answered no more")
        print(f"  {task.key}: BROKE the device: {error}", flush=True)
        return "broken"
    except Exception:
        status, reason = "failed", traceback.format_exc()
    store.finish(task.key, status, result, reason)
    if not context.device.stand_in:
        gc.collect()
    last = reason.strip().splitlines()[-1][:150] if reason else ""
    print(f"  {task.key}: {status} {last} ({time.monotonic() - start:.1f} s)", flush=True)
    if not context.device.stand_in:
        try:
            context.device.synchronize()
        except Exception:
            return "broken"
        context.device.release()
    return status


def die_with_parent() -> None:
    """On Linux: end when the process that started this one does, however it does."""
    import ctypes
    import signal

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() == 1:
            raise SystemExit("the process that started this one is gone")
