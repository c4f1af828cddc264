"""The allocator's peak of a step, by plan and workspace, against the cap.

Result of `<head>-<backend>`: {"<plan> at <workspace>": peak_bytes, bound_bytes (the cap, gradients, one float32
accumulator, O(T H)), within, plan, seconds}; plans of sequences run GSPO. `long`: four times the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from benchmarks.baselines.implementations import own
from benchmarks.cases import Batch, Model
from benchmarks.gpu.contest import complaint
from benchmarks.gpu.parts import Context, Task
from benchmarks.gpu.step import batch_of, failures, peak_bound, variant

PLANS = {
    "single_pass": "full",
    "recompute": "full",
    "lean": "full",
    "resident": "gspo",
    "frozen_head": "frozen_head",
    "auto": "no_grad",
}
"""Plan: the scenario that it serves."""


def tasks(context: Context) -> Iterable[Task]:
    for backend in context.backends("triton", "cuda", "torch"):
        for model in context.shapes.heads[:3]:
            yield Task(f"{model.name}-{backend}", 30, _task(context, model, backend, 1))
    model = context.shapes.heads[0]
    for backend in context.backends("triton", "cuda", "torch")[:1]:
        yield Task(f"{model.name}-{backend}-long", 30, _task(context, model, backend, 4))


def _task(context: Context, model: Model, backend: str, times: int) -> Callable[[], dict[str, Any]]:
    return lambda: peaks(context, model, backend, times)


def peaks(context: Context, model: Model, backend: str, times: int) -> dict[str, Any]:
    longer = replace(context, shapes=replace(context.shapes, tokens=times * context.shapes.tokens))
    batch = batch_of(longer, model)
    found: dict[str, Any] = {}
    for plan, scenario in PLANS.items():
        if times > 1 and plan not in ("single_pass", "auto"):
            continue
        for label, size in context.shapes.workspaces.items():
            inputs = variant(batch, scenario)
            found[f"{plan} at {label}"] = _peak(
                context, inputs, backend, plan, context.workspace(backend, model.vocab, size)
            )
    return {
        "model": model.name,
        "backend": backend,
        "tokens": batch.case.tokens,
        "peaks": found,
        "failures": failures(found),
    }


def _peak(context: Context, batch: Batch, backend: str, plan: str, workspace: int) -> dict[str, Any]:
    options: dict[str, Any] = {"workspace_bytes": workspace, "plan": plan}

    def step() -> Any:
        return own(batch, backend, **options)

    batch.clear_gradients()
    try:
        step()
        batch.clear_gradients()
        outcome, peak = context.device.peak(step)
        del outcome
        batch.clear_gradients()
        seconds = context.device.timed(step)
    except Exception as error:
        return {"failed": complaint(context.device, error)}
    finally:
        batch.clear_gradients()
    bound = peak_bound(batch, workspace)
    return {
        "peak_bytes": peak,
        "bound_bytes": bound,
        "workspace_bytes": workspace,
        "within": None if peak is None else peak <= bound,
        "seconds": seconds,
    }
