"""A step of this library as a contender: its inputs in several scenarios, its options, its correctness, its peak.

Legend: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Outcome
from benchmarks.baselines.implementations import own
from benchmarks.cases import SCENARIOS, Batch, Case, Model, make_batch
from benchmarks.gpu.contest import Entry, complaint
from benchmarks.gpu.exact import Exact
from benchmarks.gpu.parts import Context
from benchmarks.measure import floor_gemms
from grpo_fast.backends.base import Backend, ObjectiveResults, RowChunk, RowObjective, RowStatistics
from grpo_fast.ops.call import row_budget


def batch_of(context: Context, model: Model, scenario: str = "full") -> Batch:
    """Random inputs of a step, made on the device."""
    case = Case(model, context.shapes.tokens, SCENARIOS[scenario], context.shapes.sequences)
    return make_batch(case, context.device.torch)


def variant(batch: Batch, scenario: str) -> Batch:
    """The full step's tensors in another scenario; hidden and weight are shared."""
    case = replace(batch.case, scenario=SCENARIOS[scenario])
    active = torch.tensor(case.active_sequences, device=batch.advantages.device)
    grad, head = case.scenario.gradient, case.scenario.gradient and case.scenario.trains_head
    return replace(
        batch,
        case=case,
        hidden=batch.hidden if grad else batch.hidden.detach(),
        weight=batch.weight if head else batch.weight.detach(),
        advantages=batch.advantages * active,
    )


def gemm_entries(batch: Batch) -> list[Entry]:
    """The floor of a packed batch: the library GEMMs that its cheapest plan must do, bf16, whole."""
    return [Entry(gemm.name, gemm.run) for gemm in floor_gemms(batch.case, batch)]


@dataclass
class Step:
    """A contender.

    Attributes:
        options: of the loss: `workspace_bytes`, `plan`. around: opens a context for each run (`call.tuning`).
        facts: what `prepare` found: errors, peak_bytes, bound_bytes, budget.
    """

    name: str
    batch: Batch
    backend: str
    options: Mapping[str, Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Outcome:
        with self.around():
            return own(self.batch, self.backend, **self.options)

    def entry(self) -> Entry:
        return Entry(self.name, self.run, before=self.batch.clear_gradients)

    def prepare(self, context: Context, exact: Exact) -> bool:
        """Check a run against float64 and note its peak; False if it may not be timed (facts has `failed`)."""
        self.batch.clear_gradients()
        try:
            self.facts |= self._budget()
            self.run()  # compiles, and lets the libraries take their own workspaces
            self.batch.clear_gradients()
            outcome, peak = context.device.peak(self.run)
            self.facts["errors"], wrong = exact.check(outcome, self.batch)
        except Exception as error:
            peak, wrong = None, complaint(context.device, error)
        finally:
            self.batch.clear_gradients()
        bound = peak_bound(self.batch, int(self.options["workspace_bytes"]))
        self.facts |= {"peak_bytes": peak, "bound_bytes": bound}
        if wrong is not None:
            self.facts["failed"] = wrong
        return wrong is None

    def _budget(self) -> dict[str, Any]:
        weight = self.batch.weight
        with self.around():
            budget = row_budget(
                self.backend, *weight.shape, weight.dtype, weight.device, int(self.options["workspace_bytes"])
            )
        return {"budget": budget._asdict()}


def peak_bound(batch: Batch, workspace: int) -> int:
    """Most bytes that a step may take: the cap, the gradients, one float32 accumulator of dWeight, and O(T H)."""
    case = batch.case
    tokens, width = case.tokens, case.model.hidden
    accumulator = 4 * case.model.vocab * width * (case.scenario.gradient and case.scenario.trains_head)
    return workspace + case.gradient_bytes + accumulator + tokens * (14 * width + 400)


def failures(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Which steps of a measurement failed, and why."""
    return {name: str(numbers["failed"]) for name, numbers in found.items() if "failed" in numbers}


def results(steps: list[Step], measured: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Facts and times of each step; one that was not timed has its reason."""
    return {step.name: {**step.facts, **measured.get(step.name, {})} for step in steps}


def statistics_of(engine: Backend, rows: RowChunk) -> RowStatistics:
    """The statistics of rows, in memory of their own."""
    out = RowStatistics(*(rows.logits.new_empty(rows.logits.shape[0]) for _ in range(3)))
    engine.statistics(rows, out)
    return out


def objective_rows_of(
    engine: Backend, rows: RowChunk, objective: RowObjective, *, dtype: torch.dtype, out: Tensor | None = None
) -> tuple[Tensor, ObjectiveResults]:
    """dx of rows and what `objective_rows` finds besides, in memory of its own."""
    logprobs, entropy = (rows.logits.new_empty(rows.logits.shape[0]) for _ in range(2))
    results = ObjectiveResults(logprobs, entropy, torch.empty_like(logprobs, dtype=torch.bool))
    return engine.objective_rows(rows, objective, results, dtype=dtype, out=out), results
