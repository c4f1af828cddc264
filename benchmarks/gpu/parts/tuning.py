"""What is open until it is measured: the second stream, rows of a logits tile, the default workspace.

Result of `<head>-<backend>-<scenario>`: gemms, floor, and steps {"<workspace>, <rows> rows, one stream | two streams":
times, fraction, errors, peak_bytes, budget}, all in one contest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.cases import Model
from benchmarks.gpu.exact import Exact
from benchmarks.gpu.parts import Context, Task
from benchmarks.gpu.step import Step, batch_of, failures, gemm_entries, results, variant
from grpo_fast.ops.call import tuning

STREAMS = {"one stream": False, "two streams": True}


def tasks(context: Context) -> Iterable[Task]:
    backends = context.backends("triton", "cuda")[:1] or context.backends("torch")
    for backend in backends:
        for scenario in ("full", "frozen_head")[: 1 if context.shapes.tiny else 2]:
            for model in context.shapes.heads[: 1 if context.shapes.tiny else 3]:
                yield Task(f"{model.name}-{backend}-{scenario}", 60, _task(context, model, backend, scenario))


def _task(context: Context, model: Model, backend: str, scenario: str) -> Callable[[], dict[str, Any]]:
    return lambda: settings(context, model, backend, scenario)


def _tuned(rows: int, row_stream: bool) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: tuning(tile_rows=rows, row_stream=row_stream)


def settings(context: Context, model: Model, backend: str, scenario: str) -> dict[str, Any]:
    """Every combination beside the GEMMs."""
    batch = variant(batch_of(context, model), scenario)
    exact = Exact(batch)
    steps = []
    for label, size in context.shapes.tuning_workspaces.items():
        for rows in context.shapes.tile_rows:
            for stream, on in STREAMS.items():
                options = {"workspace_bytes": context.workspace(backend, model.vocab, size)}
                step = Step(f"{label}, {rows} rows, {stream}", batch, backend, options, _tuned(rows, on))
                step.prepare(context, exact)
                steps.append(step)
    del exact
    gemms = gemm_entries(batch)
    measured = context.contest([*gemms, *(step.entry() for step in steps if "failed" not in step.facts)])
    floor = sum(measured[gemm.name]["median"] for gemm in gemms)
    found = results(steps, measured)
    for numbers in found.values():
        if "median" in numbers:
            numbers["fraction"] = floor / numbers["median"]
    return {
        "model": model.name,
        "hidden": model.hidden,
        "vocab": model.vocab,
        "backend": backend,
        "scenario": scenario,
        "floor": floor,
        "gemms": {gemm.name: measured[gemm.name] for gemm in gemms},
        "steps": found,
        "failures": failures(found),
    }
