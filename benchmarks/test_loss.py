"""Each head and scenario, all contenders in interleaved rounds.

    pytest benchmarks/test_loss.py -k "SmolLM2 and full" -s --benchmark-json=results/out.json

On a CPU the full step is measured with every contender, the other scenarios with this library and TRL's two faster
paths; on a GPU everything with everyone. Scenarios with supports (`-k support`) are measured with this library, with
and without them, and with masks of the full logits. `-m quick` is the selection of `make bench`.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.baselines import FEW, ON_SUPPORTS
from benchmarks.cases import Case, is_quick, loss_cases
from benchmarks.machine import device_name
from benchmarks.measure import run_case

DEVICE = device_name()
CASES = [
    pytest.param(case, id=case.name, marks=[pytest.mark.quick] if is_quick(case) else []) for case in loss_cases(DEVICE)
]


@pytest.mark.parametrize("case", CASES)
def test_loss(benchmark: Any, contenders: list[str] | None, case: Case) -> None:
    """Times are reported, not judged; but this library must not be among those that fail."""
    everyone = None if DEVICE == "cuda" or case.scenario.name == "full" else FEW
    record = run_case(benchmark, case, contenders or (ON_SUPPORTS if case.scenario.support else everyone))
    ours = [c for c in record["contenders"] if c["name"].startswith("grpo-fast")]
    assert all(c["status"] in ("timed", "not offered") for c in ours), ours
