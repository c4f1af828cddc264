"""Row kernels move the bytes per logit that their modules' BYTES_PER_LOGIT claims, and a few bytes a row besides."""

from __future__ import annotations

import pytest
import torch

from grpo_fast.kernels import row_gradient, row_objective, row_statistics
from grpo_fast.kernels.objective import CORRECTIONS, KL_ESTIMATORS
from grpo_fast.kernels.rows import Rows
from tests.traffic import ELSEWHERE, Traffic, count_traffic

R = 2
# What a row moves besides its logits: scalars in and out, the target's logit once more, its gradient.
BYTES_PER_ROW = 128


def make_rows(V: int) -> tuple[Rows, torch.Tensor]:
    """Rows with padded strides, and room of their own for float16 gradients."""
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(R, V + 24, generator=generator)[:, :V]
    targets = torch.randint(V, (R,), generator=generator)
    return Rows(logits, targets), torch.empty(R, V + 24, dtype=torch.float16)[:, :V]


def assert_claim(traffic: dict[str, Traffic], claim: dict[str, int], V: int) -> None:
    moved = {"loads": traffic["logits"].loads, "stores": traffic["dx"].stores}
    for kind, count in moved.items():
        assert 0 <= count - claim[kind] * R * V <= R * BYTES_PER_ROW, f"{kind}: {count / (R * V):.3f} bytes a logit"
    assert traffic["logits"].stores == traffic["dx"].loads == 0
    assert traffic[ELSEWHERE].loads + traffic[ELSEWHERE].stores <= R * BYTES_PER_ROW


@pytest.mark.parametrize("V", [1000, 8192])
def test_statistics(V: int) -> None:
    rows, dx = make_rows(V)
    with count_traffic({"logits": rows.logits, "dx": dx}) as traffic:
        row_statistics.row_statistics_of(rows)
    assert_claim(traffic, row_statistics.BYTES_PER_LOGIT, V)


@pytest.mark.parametrize("V", [1000, 8192])
def test_gradient(V: int) -> None:
    rows, dx = make_rows(V)
    _, entropy, lse = row_statistics.row_statistics_of(rows)
    with count_traffic({"logits": rows.logits, "dx": dx}) as traffic:
        row_gradient.row_gradient_of(rows, lse, entropy, torch.ones(R), torch.ones(R), dx)
    assert_claim(traffic, row_gradient.BYTES_PER_LOGIT, V)


def test_rows_without_gradient_are_only_written() -> None:
    rows, dx = make_rows(1000)
    _, entropy, lse = row_statistics.row_statistics_of(rows)
    with count_traffic({"logits": rows.logits, "dx": dx}) as traffic:
        row_gradient.row_gradient_of(rows, lse, entropy, torch.zeros(R), None, dx)
    assert_claim(traffic, row_gradient.BYTES_PER_LOGIT | {"loads": 0}, 1000)


@pytest.mark.parametrize("V", [1000, 8192])
def test_objective(V: int) -> None:
    rows, dx = make_rows(V)
    objective = row_objective.Objective("clipped", KL_ESTIMATORS[0], False, CORRECTIONS[0], torch.ones(12))
    tokens = {"weights": torch.ones(R), "advantages": torch.ones(R)}
    tokens |= dict.fromkeys(["old_logprobs", "ref_logprobs", "sampling_logprobs", "importance"])
    with count_traffic({"logits": rows.logits, "dx": dx}) as traffic:
        row_objective.row_objective_of(rows, objective, tokens, dx, entropy_gradient=None, grad_scale=None)
    assert_claim(traffic, row_objective.BYTES_PER_LOGIT, V)
