"""How time and peak memory grow: with T, with V, and with the share of sequences that have an advantage.

    pytest benchmarks/test_growth.py -s --benchmark-json=results/growth.json

A full step with the head of SmolLM2-135M. A rival stops, with the reason, where its memory would not fit the machine.
With supports (`-k support`): time and memory with V at a mean of 8 tokens; time with the size of all rows' supports,
each way of computing them forced, which is where the limit between them (`sparse_share`) was taken from.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.baselines import MASKED, SPARSE
from benchmarks.cases import Case, growth_cases
from benchmarks.measure import run_case

NAMES = ("grpo-fast", "plain log-softmax", "TRL chunked")
ON_SUPPORTS = {"support_vocab": ("grpo-fast", "grpo-fast dense"), "support_size": (SPARSE, MASKED, "grpo-fast dense")}
ROUNDS = 3
CASES = [pytest.param(axis, case, id=f"{axis}-{case.name}") for axis, cases in growth_cases().items() for case in cases]


@pytest.mark.parametrize(("axis", "case"), CASES)
def test_growth(benchmark: Any, contenders: list[str] | None, axis: str, case: Case) -> None:
    """Times are reported, not judged; but this library must fit and be right everywhere."""
    names = next((names for start, names in ON_SUPPORTS.items() if axis.startswith(start)), NAMES)
    record = run_case(benchmark, case, contenders or names, ROUNDS, growth=axis)
    ours = [c for c in record["contenders"] if c["name"].startswith("grpo-fast")]
    assert all(c["status"] == "timed" for c in ours), ours
