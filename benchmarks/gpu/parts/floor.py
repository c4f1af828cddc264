"""The step against the library GEMMs of the same run, by head, backend, scenario and workspace; and where it goes.

Result of `<head>-<backend>`:
    gemms       {name: times}; each scenario's floor is the sum of the medians of those it needs
    steps       {"<scenario> at <workspace>": times, floor (seconds), fraction (floor / median), errors, ...}

Result of `<head>-<backend>-parts`: the pieces that a full step is made of, each timed alone over all T rows, as the
library calls them: logits (tiles), row functions, dHidden and dWeight (chunks); beside the step and its plain GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.cases import SCENARIOS, Batch, Model
from benchmarks.gpu.contest import Entry
from benchmarks.gpu.exact import Exact
from benchmarks.gpu.parts import Context, Task
from benchmarks.gpu.parts.rows import objective_of
from benchmarks.gpu.step import Step, batch_of, failures, gemm_entries, results, variant
from grpo_fast.backends.base import RowChunk, Transform, get_backend, objective_rows_of, statistics_of
from grpo_fast.config import HeadConfig
from grpo_fast.ops.call import row_budget

MEASURED = ("full", "frozen_head", "no_grad", "half")


def tasks(context: Context) -> Iterable[Task]:
    backends = context.backends("triton", "cuda", "torch")
    for backend in backends[:1]:  # what "auto" takes, on every head, before the rest
        for model in context.shapes.heads:
            yield Task(f"{model.name}-{backend}", 60, _steps_task(context, model, backend))
            yield Task(f"{model.name}-{backend}-parts", 30, _parts_task(context, model, backend))
    for backend in backends[1:]:
        for model in context.shapes.heads[:3]:
            yield Task(f"{model.name}-{backend}", 60, _steps_task(context, model, backend))


def _steps_task(context: Context, model: Model, backend: str) -> Callable[[], dict[str, Any]]:
    return lambda: all_steps(context, model, backend)


def _parts_task(context: Context, model: Model, backend: str) -> Callable[[], dict[str, Any]]:
    return lambda: parts_of_step(context, model, backend)


def all_steps(context: Context, model: Model, backend: str) -> dict[str, Any]:
    batch = batch_of(context, model)
    steps = []
    for scenario in MEASURED:
        inputs = variant(batch, scenario)
        exact = Exact(inputs)
        for label, size in context.shapes.workspaces.items():
            options = {"workspace_bytes": context.workspace(backend, model.vocab, size)}
            step = Step(f"{scenario} at {label}", inputs, backend, options)
            step.prepare(context, exact)
            steps.append(step)
        del exact
    gemms = gemm_entries(batch)
    measured = context.contest([*gemms, *(step.entry() for step in steps if "failed" not in step.facts)])
    found = results(steps, measured)
    medians = {gemm.name: measured[gemm.name]["median"] for gemm in gemms}
    for step in steps:
        scenario = step.batch.case.scenario
        share = step.batch.case.active_tokens / batch.case.tokens if scenario.gradient else 1.0
        floor = sum(medians[name] for name in scenario.gemms) * share
        found[step.name]["floor"] = floor
        if "median" in found[step.name]:
            found[step.name]["fraction"] = floor / found[step.name]["median"]
    return {
        "model": model.name,
        "hidden": model.hidden,
        "vocab": model.vocab,
        "tokens": batch.case.tokens,
        "backend": backend,
        "gemms": {name: measured[name] for name in medians},
        "gemm_tflops": {name: batch.case.gemm_flops / seconds / 1e12 for name, seconds in medians.items()},
        "steps": found,
        "failures": failures(found),
    }


def parts_of_step(context: Context, model: Model, backend: str) -> dict[str, Any]:
    """What the pieces of a full step take alone, at the first workspace; what is left is between them."""
    batch, engine = batch_of(context, model), get_backend(backend)
    size = context.workspace(backend, model.vocab, next(iter(context.shapes.workspaces.values())))
    budget = row_budget(backend, model.vocab, model.hidden, torch.bfloat16, context.device.torch, size)
    pieces = _pieces(context, batch, engine, budget)
    step = Step("step", batch, backend, {"workspace_bytes": size})
    entries = [*gemm_entries(batch), *(Entry(name, run) for name, run in pieces.items()), step.entry()]
    measured = context.contest(entries)
    known = sum(measured[name].get("median", 0.0) for name in pieces)
    rest = measured["step"]["median"] - known if "median" in measured["step"] else None
    return {
        "budget": budget._asdict(),
        "times": measured,
        "pieces": list(pieces),
        "rest_seconds": rest,
        "failures": failures(measured),
    }


def _pieces(context: Context, batch: Batch, engine: Any, budget: Any) -> dict[str, Callable[[], None]]:
    """Name: all T rows of one kind of work, in the tiles and chunks of `budget`."""
    model, device = batch.case.model, context.device.torch
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    tokens, pitch = hidden.shape[0], engine.row_pitch(model.vocab)
    tile = min(budget.tile_rows, tokens)
    chunk = min(budget.rows_at_once, -(-tokens // tile) * tile)
    logits = torch.empty(tile, pitch, device=device)[:, : model.vocab]
    dx = torch.empty(chunk, pitch, device=device, dtype=torch.bfloat16)[:, : model.vocab]
    for rows in dx.split(tile):
        rows.copy_(torch.randn(rows.shape, device=device) * 1e-3)
    grad_hidden = torch.zeros(tokens, model.hidden, device=device)
    grad_weight = torch.zeros(model.vocab, model.hidden, device=device)
    transform = Transform(HeadConfig(softcap=model.softcap), None, 1.0)
    full_tiles, rows = range(0, tokens - tokens % tile, tile), RowChunk(logits, batch.targets[:tile], transform)
    engine.logits(hidden[:tile], weight, logits, tile)
    objective = objective_of(statistics_of(engine, rows)[0], SCENARIOS["full"].config)

    def products() -> None:
        for start in full_tiles:
            engine.logits(hidden[start : start + tile], weight, logits, tile)

    def rows_only() -> None:
        for _ in full_tiles:
            objective_rows_of(engine, rows, objective, dtype=torch.bfloat16, out=dx[:tile])

    def hidden_gradient() -> None:
        for start in range(0, tokens, chunk):
            out = grad_hidden[start : start + chunk]
            engine.grad_hidden(dx[: out.shape[0]], weight, out)

    def weight_gradient() -> None:
        for start in range(0, tokens, chunk):
            part = hidden[start : start + chunk]
            engine.grad_weight(dx[: part.shape[0]], part, grad_weight, grad_weight)

    return {
        "logits tiles": products,
        "rows": rows_only,
        "dHidden chunks": hidden_gradient,
        "dWeight chunks": weight_gradient,
    }
