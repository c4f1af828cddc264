"""Every scenario of benchmarks/cases.py beside the competitors that import; the result is `measure.py`'s record.

The full step of every head first, then the other scenarios, head by head.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.cases import SCENARIOS, Case
from benchmarks.gpu.parts import Context, Skip, Task
from benchmarks.measure import Measurement
from benchmarks.report import text_table


def tasks(context: Context) -> Iterable[Task]:
    shapes = context.shapes
    names = [name for name in SCENARIOS if name != "full"]
    pairs = [(model, "full") for model in shapes.models]
    pairs += [(model, name) for model in shapes.models for name in (names[:1] if shapes.tiny else names)]
    for model, name in pairs:
        case = Case(model, shapes.tokens, SCENARIOS[name], shapes.sequences)
        yield Task(case.name, 90, _task(context, case))


def _task(context: Context, case: Case) -> Callable[[], dict[str, Any]]:
    return lambda: beside_competitors(context, case)


def beside_competitors(context: Context, case: Case) -> dict[str, Any]:
    measurement = Measurement(case, rounds=context.shapes.rounds)
    shortage = measurement.too_large()
    if shortage:
        raise Skip(f"the inputs and the floor's operands: {shortage}")
    try:
        measurement.prepare()
        for _ in range(context.shapes.rounds):
            measurement.round()
        record = measurement.record()
    finally:
        gc.unfreeze()  # `prepare` froze what was there, tensors and all
    print(text_table(record))
    own = [c for c in record["contenders"] if c["name"].startswith("grpo-fast") and c["status"] == "failed"]
    return record | {"failures": {c["name"]: c["reason"] for c in own}}
