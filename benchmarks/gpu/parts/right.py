"""`pytest -m gpu`, in a process that notes every test as it ends, stops in time and goes on next time (noted_tests.py).

Result of `tests`: passed, failed, skipped (counts), failures {test: the end of its report}, skips {reason: count}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from benchmarks.gpu.noted_tests import LOG_VARIABLE, SECONDS_VARIABLE, STAMP_VARIABLE, outcomes
from benchmarks.gpu.parts import Context, Task, Unfinished, start

SELECTION = ("tests/test_gpu.py", "tests/test_gpu_cuda.py", "tests/test_kernels_group.py")
STAND_IN_SELECTION = ("tests/test_gpu.py", "-k", "stand-in and (wide_products or per_token_temperature)")
PROCESSES = 20
"""A test that breaks the GPU's context ends its process; the next one goes on behind it, this many times."""


def tasks(context: Context) -> Iterable[Task]:
    yield Task("tests", 30, lambda: run_tests(context))


def run_tests(context: Context) -> dict[str, Any]:
    stand_in = context.device.stand_in
    selection = STAND_IN_SELECTION if stand_in else ("-m", "gpu", *SELECTION)
    command = [context.python, "-m", "pytest", "-q", "-p", "benchmarks.gpu.noted_tests", *selection]
    log, stamp = context.out / "right-tests.jsonl", str(context.notes.get("stamp", ""))
    for _ in range(PROCESSES):
        left = context.clock.left() - 10
        if left < 10:
            raise Unfinished(_progress(outcomes(log, stamp)))
        variables = {LOG_VARIABLE: str(log), STAMP_VARIABLE: stamp, SECONDS_VARIABLE: str(left)}
        code, _ = start(context, command, variables=variables | {"TRITON_INTERPRET": "0"}, shown=True)
        found = outcomes(log, stamp)
        if code in (2, 3, 4) and not found:
            raise RuntimeError(f"{' '.join(command)} ended with {code}: see the output above")
        if found.get("complete"):
            if not _counts(found):
                raise RuntimeError(f"{' '.join(command)} found no test")
            return summary(found)
    raise RuntimeError(f"{PROCESSES} processes ended in the middle of the tests: {_progress(outcomes(log, stamp))}")


def _progress(found: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in _counts(found).items()) or "nothing yet"


def _counts(found: dict[str, dict[str, Any]]) -> Counter[str]:
    return Counter(test["outcome"] for name, test in found.items() if name != "complete")


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    tests = {name: test for name, test in found.items() if name != "complete"}
    return {
        **{outcome: _counts(found)[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": {name: test["report"] for name, test in tests.items() if test["outcome"] == "failed"},
        "skips": Counter(test["report"] for test in tests.values() if test["outcome"] == "skipped"),
        "seconds": sum(test.get("seconds", 0.0) for test in tests.values()),
    }
