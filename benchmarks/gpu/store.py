"""The file of a part: its measurements by key, written anew, atomically, whenever one begins or ends.

    {"schema": 1, "part": "floor", "written": UNIX seconds, "machine": {...}, "measurements": {key: measurement}}

machine: `machine.machine_facts()` and the device's own facts, of the process that wrote last. A measurement:

    status      running | ok | failed | skipped
    reason      why it failed or was skipped
    origin      what it was measured on: sources (digest), device, driver, torch, triton, commit, dirty, stand_in
    began       UTC; seconds: how long it took; attempts: how often it was begun
    result      what the part says it is (see there)

A measurement that was left `running` was killed: by an operator or a clock, or by its own crash. It is tried once more.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
MAX_ATTEMPTS = 2
IDENTITY = ("sources", "device", "driver", "torch", "triton", "stand_in", "tiny")
"""What must agree for a measurement to count as done; commit and dirty flag are kept beside it."""


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader, or a run that is killed here, finds the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A part's file, or an empty one where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {"measurements": {}}
    usable = isinstance(content, dict) and content.get("schema") == SCHEMA
    return content if usable else {"measurements": {}}


class Store:
    """Measurements of one part.

    Args:
        folder: where `<part>.json` is.
        machine: facts that the file carries.
        again: a time (UNIX seconds): what was measured before it does not count.
        retry: a time: what failed before it does not count.
    """

    def __init__(
        self, folder: Path, part: str, machine: Mapping[str, Any], *, again: float = 0.0, retry: float = 0.0
    ) -> None:
        self.path, self.part, self.machine = folder / f"{part}.json", part, dict(machine)
        self.again, self.retry = again, retry
        self.measurements: dict[str, dict[str, Any]] = read(self.path)["measurements"]

    @property
    def origin(self) -> dict[str, Any]:
        return {name: self.machine.get(name) for name in (*IDENTITY, "commit", "dirty")}

    def is_done(self, key: str) -> bool:
        """Whether a measurement is finished and was made of what there is now."""
        made = self.measurements.get(key)
        if made is None or any(made["origin"].get(name) != self.machine.get(name) for name in IDENTITY):
            return False
        if made["at"] < self.again or made["status"] in ("running", "skipped"):  # what it lacked may be there now
            return False
        return made["status"] == "ok" or made["at"] >= self.retry

    def begin(self, key: str) -> None:
        before, now = self.measurements.get(key), time.time()
        unfinished = before is not None and before["status"] == "running" and before["at"] >= self.again
        attempts = before["attempts"] if unfinished and before is not None else 0
        self.measurements[key] = {
            "status": "running",
            "origin": self.origin,
            "at": now,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
            "attempts": attempts + 1,
        }
        self.write()

    def finish(self, key: str, status: str, result: Any = None, reason: str | None = None) -> None:
        made = self.measurements[key]
        made |= {"status": status, "seconds": round(time.time() - made["at"], 3)}
        if reason is not None:
            made["reason"] = reason[-4000:]
        if result is not None:
            made["result"] = result
        self.write()

    def interrupt(self, key: str, reason: str) -> None:
        """A measurement that time did not suffice for: it is begun again, and this beginning does not count."""
        made = self.measurements[key]
        made |= {"attempts": made["attempts"] - 1, "reason": reason[-4000:]}
        self.write()

    def give_up_on_crashed(self, reason: str) -> list[str]:
        """Write down as failed what ended its process as often as it may; returns the keys."""
        crashed = [
            key
            for key, made in self.measurements.items()
            if made["status"] == "running" and made["attempts"] >= MAX_ATTEMPTS
        ]
        for key in crashed:
            self.finish(key, "failed", reason=reason)
        return crashed

    def write(self) -> None:
        content = {
            "schema": SCHEMA,
            "part": self.part,
            "written": time.time(),
            "machine": self.machine,
            "measurements": self.measurements,
        }
        write_atomically(self.path, json.dumps(content, indent=1, allow_nan=True) + "\n")
