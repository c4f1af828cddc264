"""Measure a case: contenders and library GEMMs in interleaved rounds, checked first; one record of JSON per case.

    measurement = Measurement(case, names)
    measurement.prepare()                      # availability, correctness, warm-up
    for _ in range(5): measurement.round()     # each contender and GEMM once a round, the order rotating
    measurement.record()

A record, `extra_info` of a pytest-benchmark test (times in seconds, memory in bytes):

    schema      1
    case        name, title, scenario, model, hidden, vocab, softcap, tokens, sequences, ragged, padded_tokens,
                active_tokens, flops, gradient_bytes (what a call returns), compulsory_bytes (least DRAM traffic;
                computed, not measured); flops and compulsory_bytes are those of a step without supports
    support     null, or of the rows' supports: kind (see `supports.py`), mean, median, max (tokens of a row), token_ids
                (all), distinct_ids, sparse_limit (tokens of the largest that is computed from gathered rows), shares
                (of the rows: single tokens, not computed; sparse; masked; whole)
    machine     `machine.machine_facts()`
    memory_method   how peak_bytes was read, or null
    floor       median (the sum of the medians below), gemms: {name: {seconds, median, min, max, n}}
    contenders  a list, in the order of `baselines.CONTENDERS`; of each
                name, package, version, entropy (whether it computes entropies), status, reason
                status: timed | failed (wrong, or raised) | not installed | not offered | too large
                if timed: seconds, median, min, max, n; first_run_counted (runs above 20 s are not warmed up);
                floor_ratio (median / floor), floor_fraction (its inverse), tflops (the cheapest plan's flops / median),
                peak_bytes (beyond the inputs, gradients included; the most of all runs), errors
                errors: logprobs, entropy (RMS, nats, on 64 rows of this shape), loss, grad_hidden, grad_weight
                (relative, on a small shape), all against float64
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.baselines import CONTENDERS, Contender
from benchmarks.cases import Batch, Case, make_batch
from benchmarks.machine import PeakMemory, available_bytes, device_name, machine_facts, timed
from benchmarks.oracle import Errors, SampledRows, check_small
from benchmarks.report import text_table
from benchmarks.supports import facts as support_facts
from grpo_fast.loss import sparse_limit
from grpo_fast.packing import Support

ROUNDS = 5
SLOW_SECONDS, SLOW_ROUNDS = 8.0, 2
# A timed run shorter than this follows an untimed one. What others freed in between has gone back to the system, on a
# virtual machine to its host, and touching memory anew then costs more than the work that is measured.
SHORT_SECONDS = 3.0
UNWARMED_SECONDS = 20.0  # what so long a run gains from a warm-up is less than its spread


@dataclass
class Entry:
    """One contender, or one GEMM of the floor, in a case."""

    name: str
    run: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)
    contender: Contender | None = None
    batch: Batch | None = None
    status: str = "timed"
    reason: str | None = None
    errors: Errors = field(default_factory=dict)
    first_run_counted: bool = False
    typical: float = 0.0  # seconds of the first run, checks aside

    def reject(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    def wants(self, rounds: int) -> bool:
        """Whether another round is due: slow ones get two."""
        slow = bool(self.seconds) and self.seconds[0] > SLOW_SECONDS
        return self.status == "timed" and len(self.seconds) < (min(rounds, SLOW_ROUNDS) if slow else rounds)

    def times(self) -> dict[str, Any]:
        s = self.seconds
        return {"seconds": s, "median": statistics.median(s), "min": min(s), "max": max(s), "n": len(s)}


def floor_gemms(case: Case, batch: Batch) -> list[Entry]:
    """The library GEMMs that a case must do, over all its active tokens at once, bf16 in and out, into ready memory."""
    hidden, weight = batch.hidden.detach()[: case.active_tokens], batch.weight.detach()
    logits = hidden @ weight.T  # stands in for its own gradient: random and of the right shape
    outs = {"grad_hidden": torch.empty_like(hidden), "grad_weight": torch.empty_like(weight)}
    calls: dict[str, Callable[[], Any]] = {
        "logits": lambda: torch.mm(hidden, weight.T, out=logits),
        "grad_hidden": lambda: torch.mm(logits, weight, out=outs["grad_hidden"]),
        "grad_weight": lambda: torch.mm(logits.T, hidden, out=outs["grad_weight"]),
    }
    return [Entry(name, calls[name]) for name in case.scenario.gemms]


class Measurement:
    """A case in progress.

    Args:
        names: of `CONTENDERS`; None: all, but those for cases with supports only where there are some.
        rounds: timed runs of each contender; those above 8 s a run get 2.
    """

    def __init__(self, case: Case, names: Sequence[str] | None = None, rounds: int = ROUNDS) -> None:
        unknown = set(names or ()) - set(CONTENDERS)
        if unknown:
            raise ValueError(f"names: expected some of {', '.join(CONTENDERS)}; got {', '.join(sorted(unknown))}")
        self.case, self.rounds, self.device = case, rounds, device_name()
        everyone = [n for n, c in CONTENDERS.items() if case.scenario.support is not None or not c.needs_support]
        self.names = everyone if names is None else [name for name in CONTENDERS if name in names]
        self.memory = PeakMemory()
        self.entries: list[Entry] = []
        self.gemms: list[Entry] = []
        self.support: Support | None = None
        self.limit = 0
        self.turn = 0

    def too_large(self) -> str | None:
        """Why the inputs and the floor's operands do not fit this machine, or None."""
        logits = 2 * self.case.active_tokens * self.case.model.vocab
        # A float32 copy of the weight draws the targets.
        return self._shortage(self.case.input_bytes + logits + 6 * self.case.model.hidden * self.case.model.vocab)

    def _shortage(self, needed: int) -> str | None:
        free = available_bytes()
        if free is None or needed <= free:
            return None
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"

    def prepare(self) -> None:
        """Make the inputs, decide who takes part, check results, warm up."""
        packed = make_batch(self.case, self.device)
        self.support, self.limit = packed.support, sparse_limit(packed.weight)
        views: dict[tuple[bool, bool], Batch] = {}
        sampled: dict[bool, SampledRows] = {}
        for name in self.names:
            contender = CONTENDERS[name]
            entry = Entry(name, lambda: None, contender=contender)
            self.entries.append(entry)
            absent = self._why_absent(contender)
            if absent is not None:
                entry.reject(*absent)
                continue
            dense = contender.support == "ignores"
            view = (contender.padded, dense)
            if view not in views:
                views[view] = contender.view(packed)
            batch = views[view]
            if dense not in sampled:
                sampled[dense] = SampledRows(batch if dense else packed)
            entry.batch, entry.run = batch, lambda c=contender, b=batch: c.run(b)  # type: ignore[misc]
            self._admit(entry, contender, batch, sampled[dense])
        self.gemms = floor_gemms(self.case, packed)
        for gemm in self.gemms:
            gemm.run()
        # What has been imported and compiled stays: without this every collection between runs walks through it.
        gc.collect()
        gc.freeze()

    def _why_absent(self, contender: Contender) -> tuple[str, str] | None:
        """(status, reason) of a contender that does not take part, or None."""
        missing = contender.why_missing()
        withheld = contender.why_not_offered(self.case, self.device)
        large = self._shortage(contender.peak_bytes(self.case))
        for status, reason in (("not offered", withheld), ("not installed", missing), ("too large", large)):
            if reason is not None:
                return status, reason
        return None

    def _admit(self, entry: Entry, contender: Contender, batch: Batch, sampled: SampledRows) -> None:
        """Warm an entry up, or reject it as failed."""
        scenario, softcap = self.case.scenario, self.case.model.softcap
        try:
            entry.errors, wrong = check_small(contender, scenario, softcap, self.device)
            if wrong is None:
                outcome, seconds, peak = self._run(entry, batch)
                entry.typical = seconds
                errors, wrong = sampled.check(batch, outcome)
                entry.errors |= errors
                if seconds > UNWARMED_SECONDS and not contender.compiles:
                    entry.seconds, entry.peaks, entry.first_run_counted = [seconds], [peak], True
        except Exception as error:  # a competitor may fail in any way: it is shown as failed, the others go on
            wrong = f"{type(error).__name__}: {error}"
        finally:
            batch.clear_gradients()
        if wrong is not None:
            entry.reject("failed", wrong)

    def _run(self, entry: Entry, batch: Batch | None) -> tuple[Any, float, int | None]:
        """(outcome, seconds, bytes) of one run; gradients are freed before it and kept through it."""
        if batch is not None:
            batch.clear_gradients()
        self.memory.start()
        outcome, seconds = timed(entry.run)
        return outcome, seconds, self.memory.stop()

    def round(self) -> None:
        """Run every contender and GEMM that still wants a turn, beginning one further than last time."""
        entries = [*self.gemms, *self.entries]
        shift = self.turn % len(entries)
        self.turn += 1
        for entry in entries[shift:] + entries[:shift]:
            if not entry.wants(self.rounds):
                continue
            batch = entry.batch
            if entry.typical < SHORT_SECONDS:
                self._run(entry, batch)
            outcome, seconds, peak = self._run(entry, batch)
            del outcome
            entry.seconds.append(seconds)
            entry.peaks.append(peak)
            if batch is not None:
                batch.clear_gradients()

    def record(self) -> dict[str, Any]:
        """The numbers, as the module's docstring describes them."""
        case, model = self.case, self.case.model
        floor = sum(statistics.median(gemm.seconds) for gemm in self.gemms)
        return {
            "schema": 1,
            "case": {
                "name": case.name,
                "title": case.scenario.title,
                "scenario": case.scenario.name,
                "model": model.name,
                "hidden": model.hidden,
                "vocab": model.vocab,
                "softcap": model.softcap,
                "sequences": case.sequences,
                "ragged": case.scenario.ragged,
                **{
                    name: getattr(case, name)
                    for name in "tokens padded_tokens active_tokens flops gradient_bytes compulsory_bytes".split()
                },
            },
            "support": self._supports(),
            "machine": machine_facts(),
            "memory_method": self.memory.method,
            "floor": {"median": floor, "gemms": {gemm.name: gemm.times() for gemm in self.gemms}},
            "contenders": [self._result(entry, floor) for entry in self.entries],
        }

    def _supports(self) -> dict[str, Any] | None:
        kind = self.case.scenario.support
        if kind is None or self.support is None:
            return None
        return support_facts(self.support, kind, self.case.model.vocab, self.limit)

    def _result(self, entry: Entry, floor: float) -> dict[str, Any]:
        assert entry.contender is not None
        result: dict[str, Any] = {
            "name": entry.name,
            "package": entry.contender.package,
            "version": entry.contender.version(),
            "entropy": entry.contender.entropy,
            "status": entry.status,
            "reason": entry.reason,
            "errors": entry.errors,
        }
        if entry.status == "timed":
            times = entry.times()
            peaks = [peak for peak in entry.peaks if peak is not None]
            result |= times | {
                "first_run_counted": entry.first_run_counted,
                "floor_ratio": times["median"] / floor,
                "floor_fraction": floor / times["median"],
                "tflops": self.case.flops / times["median"] / 1e12,
                "peak_bytes": max(peaks) if peaks else None,
            }
        return result


def run_case(
    benchmark: Any, case: Case, names: Sequence[str] | None = None, rounds: int = ROUNDS, **labels: Any
) -> dict[str, Any]:
    """Measure a case under pytest-benchmark (whose own times are those of whole rounds) and print its table.

    Args:
        labels: more keys of the record, as the axis that a growth test walks along.
    """
    import pytest

    measurement = Measurement(case, names, rounds)
    shortage = measurement.too_large()
    if shortage:
        pytest.skip(f"{case.name} {shortage}")
    measurement.prepare()
    benchmark.pedantic(measurement.round, rounds=rounds, iterations=1, warmup_rounds=0)
    record = measurement.record() | labels
    benchmark.extra_info.update(record)
    print("\n" + text_table(record))
    return record
