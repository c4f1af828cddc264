"""The tables of both PREDICTIONS.md are those of their formulas, and the formulas are sane."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_fast.kernels import predictions

ROOT = Path(__file__).resolve().parent.parent
TABLES = {
    "rows": ("kernels", predictions.row_table),
    "step": ("kernels", predictions.step_table),
    "other": ("kernels", predictions.other_table),
    "sparse": ("kernels", predictions.sparse_table),
    "share": ("kernels", predictions.share_table),
    "cuda": ("csrc", predictions.cuda_table),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_come_from_formulas(name: str) -> None:
    folder, table = TABLES[name]
    assert table() in (ROOT / folder / "PREDICTIONS.md").read_text(), "python -m grpo_fast.kernels.predictions"


def test_plans_are_the_planners() -> None:
    import torch

    from grpo_fast.ops.call import row_budget

    for workspace in (predictions.SMALL_WORKSPACE, predictions.WORKSPACE):
        budget = row_budget("triton", predictions.V, 2048, torch.bfloat16, torch.device("cuda", 0), workspace)
        assert predictions.plan(workspace) == predictions.Plan(budget.tile_rows, budget.staged_rows)
        assert budget.num_buffers == 1


@pytest.mark.parametrize("card", predictions.CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("width", predictions.WIDTHS)
def test_nothing_beats_its_floor(card: predictions.Card, width: int) -> None:
    small, large = (
        predictions.step(card, width, size) for size in (predictions.SMALL_WORKSPACE, predictions.WORKSPACE)
    )
    for step in (small, large):
        products = step.logits + step.grad_hidden + step.grad_weight
        assert step.floor < products < 1.4 * step.floor
    assert large.total < small.total
    assert 0.3 < predictions.frozen_head(card, width) < 1
    assert 0.3 < predictions.without_gradient(card, width) < 1


@pytest.mark.parametrize("card", predictions.CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("width", predictions.WIDTHS)
def test_supports_cost_what_their_bytes_do(card: predictions.Card, width: int) -> None:
    few, many = (predictions.sparse_step(card, width, mean) for mean in (8, 64))
    for mean, step in ((8, few), (64, many)):
        nothing_missed = 3 * 2 * predictions.T * mean * width / predictions.L2_BANDWIDTH
        assert nothing_missed < step.rows + step.grad_weight < 4 * nothing_missed
    assert 7 < many.rows / few.rows < 9
    dense = predictions.step(card, width, predictions.WORKSPACE).total
    assert few.total < 0.04 * dense
    assert many.total < 0.15 * dense


def test_the_limit_is_the_predicted_one() -> None:
    """Above every prediction, and not by much."""
    import torch

    from grpo_fast.backends.base import get_backend

    taken = get_backend("triton").sparse_share(torch.bfloat16, torch.device("cuda"))  # type: ignore[attr-defined]
    predicted = [predictions.sparse_share(card, width) for card in predictions.CARDS for width in predictions.WIDTHS]
    assert max(predicted) <= taken <= 1.6 * min(predicted)
