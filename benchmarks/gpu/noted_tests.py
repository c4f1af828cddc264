"""A plugin of pytest (`-p benchmarks.gpu.noted_tests`) that writes each test's outcome to a file as soon as it ends.

Started again, it leaves out what that file has under the same stamp; it stops before the seconds that it is given are
over, and at the first error that leaves the GPU's context unusable. A test that ended its process twice has failed.
Lines of the file: {"stamp", "test", "outcome": began | passed | failed | skipped, "seconds", "report"}; the last one of
a complete run has the test "complete".
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

LOG_VARIABLE, STAMP_VARIABLE, SECONDS_VARIABLE = (f"GRPO_FAST_TESTS_{name}" for name in ("LOG", "STAMP", "SECONDS"))
BROKEN = ("CUDA error", "illegal memory access", "an illegal instruction", "unspecified launch failure")


def outcomes(log: Path, stamp: str) -> dict[str, dict[str, Any]]:
    """Test: its last line under this stamp; of those that only began, only what ended its process twice, as failed."""
    found: dict[str, dict[str, Any]] = {}
    begun: dict[str, int] = {}
    lines = log.read_text().splitlines() if log.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # half a line, of a process that was killed
        if entry["stamp"] != stamp:
            continue
        if entry["outcome"] == "began":
            begun[entry["test"]] = begun.get(entry["test"], 0) + 1
        else:
            found[entry["test"]] = entry
    for test, count in begun.items():
        if test not in found and count >= 2:
            found[test] = {"test": test, "outcome": "failed", "report": "it ended its process, twice"}
    return found


class Notes:
    """What pytest calls; one object a session."""

    def __init__(self, log: Path, stamp: str, seconds: float) -> None:
        self.log, self.stamp, self.deadline = log, stamp, time.monotonic() + seconds
        self.known = outcomes(log, stamp)
        self.stopped = self.known.get("complete") is not None
        self.longest = 0.0

    def write(self, test: str, outcome: str, **more: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps({"stamp": self.stamp, "test": test, "outcome": outcome, **more}) + "\n")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = [item for item in items if item.nodeid in self.known]
        config.hook.pytest_deselected(items=known)
        items[:] = [item for item in items if item.nodeid not in self.known]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(nodeid, "began")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        """Outcomes: a failed set-up or tear-down fails the test."""
        report = (yield).get_result()
        test = item.nodeid
        text = str(report.longrepr or "")
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else text
            self.write(test, "skipped", report=reason[:300])
        elif report.failed:
            self.write(test, "failed", report=text[-3000:], seconds=report.duration)
        elif report.when == "call":
            self.write(test, "passed", seconds=report.duration)
        self.longest = max(self.longest, report.duration)
        broken = report.failed and any(word in text for word in BROKEN)
        if broken or time.monotonic() + self.longest > self.deadline:
            item.session.shouldstop = "the GPU's context may be gone" if broken else "time is over; again: go on"
            self.stopped = True

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not self.stopped and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED,
                                               pytest.ExitCode.NO_TESTS_COLLECTED):  # fmt: skip
            self.write("complete", "passed")


def pytest_configure(config: pytest.Config) -> None:
    if LOG_VARIABLE in os.environ:
        log = Path(os.environ[LOG_VARIABLE])
        log.parent.mkdir(parents=True, exist_ok=True)
        notes = Notes(log, os.environ[STAMP_VARIABLE], float(os.environ[SECONDS_VARIABLE]))
        config.pluginmanager.register(notes, "noted_tests")
