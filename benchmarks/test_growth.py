"""How time and peak memory grow: with T, with V, and with the share of sequences that have an advantage.

    pytest benchmarks/test_growth.py -s --benchmark-json=results/growth.json

A full step with the head of SmolLM2-135M. A rival stops, with the reason, where its memory would not fit the machine.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import Case, growth_cases
from benchmarks.measure import run_case

NAMES = ("grpo-fast", "plain log-softmax", "TRL chunked")
ROUNDS = 3
CASES = [pytest.param(axis, case, id=f"{axis}-{case.name}") for axis, cases in growth_cases().items() for case in cases]


@pytest.mark.parametrize(("axis", "case"), CASES)
def test_growth(benchmark: Any, contenders: list[str] | None, axis: str, case: Case) -> None:
    """Times are reported, not judged; but this library must fit and be right everywhere."""
    record = run_case(benchmark, case, contenders or NAMES, ROUNDS, growth=axis)
    ours = next((c for c in record["contenders"] if c["name"] == "grpo-fast"), None)
    assert ours is None or ours["status"] == "timed", ours
