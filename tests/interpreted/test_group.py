"""The group kernels against the float64 oracle and against plain loops, on the CPU, interpreted.

Legend: N completions, K rewards, T packed tokens, S sequences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels are interpreted by triton")

from grpo_fast import inputs as tokens_file
from grpo_fast.backends.base import get_backend
from grpo_fast.kernels import group_advantages as advantages_file
from grpo_fast.kernels import group_rows as rows_file
from grpo_fast.loss import LossConfig, grpo_loss, policy_loss
from grpo_fast.reference import reference_advantages, reference_policy_loss
from tests.cases import make_case, rel_rms

NAN = math.nan
PAIRS = [
    *((scale, "sum_then_normalize") for scale in ("group", "batch", "none", "leave_one_out")),
    *((scale, "normalize_then_sum") for scale in ("group", "batch")),
]
FLOORS = {torch.float32: 2e-6, torch.float64: 1e-12}


def sorted_groups(ids: Tensor) -> dict[str, Tensor]:
    labels, order = ids.sort(stable=True)
    return {"labels": labels, "order": order}


# -- advantages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize(("scale", "aggregation"), PAIRS)
def test_advantages_match_oracle(scale: str, aggregation: str, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(3)
    ids = torch.tensor([7, 7, -2, 7, -2, -2, 9, -2, 7, 7, 4, 4, 4, -2, 7, 4, 4, 4, 4, 7, -2, -2, 4, 7])
    for kinds, missing, equal in itertools.product((1, 3), (0.0, 0.3), (True, False)):
        rewards = torch.randn(24, kinds, generator=gen, dtype=dtype)
        rewards[torch.rand(24, kinds, generator=gen) < missing] = NAN
        factors = torch.tensor([1.0, 0.5, -2.0][:kinds], dtype=dtype) if missing else None
        options: dict[str, Any] = {"scale": scale, "aggregation": aggregation}
        grouping = {"group_size": 6} if equal else {"group_ids": ids}
        expected = reference_advantages(rewards.double(), weights=factors, **options, **grouping)
        kernels = {"group_size": 6} if equal else sorted_groups(ids)
        actual = advantages_file.group_advantages(rewards, factors=factors, **options, **kernels)
        assert actual.dtype == dtype
        assert rel_rms(actual, expected) <= FLOORS[dtype], (kinds, missing, equal)
        assert expected.abs().max() > 0.1


@pytest.mark.parametrize(("scale", "aggregation"), PAIRS)
def test_groups_longer_than_a_tile(scale: str, aggregation: str) -> None:
    """One group of more than the largest tile, in a batch of more than one; and labels, some of groups of several."""
    gen = torch.Generator().manual_seed(4)
    rewards = torch.randn(1100, 1, generator=gen, dtype=torch.float64) + 3
    ids = (torch.rand(300, generator=gen) * 2).square().long()
    options: dict[str, Any] = {"scale": scale, "aggregation": aggregation}
    expected = reference_advantages(rewards, group_size=1100, **options)
    assert rel_rms(advantages_file.group_advantages(rewards, group_size=1100, **options), expected) <= 1e-12
    expected = reference_advantages(rewards[:300], group_ids=ids, **options)
    actual = advantages_file.group_advantages(rewards[:300], **sorted_groups(ids), **options)
    assert rel_rms(actual, expected) <= 1e-12
    assert max(advantages_file.GROUP_TILES[-1][1], advantages_file.BATCH_TILE) < 1100
    assert ids.bincount().max() > advantages_file.GROUP_TILES[1][1]


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize(("scale", "aggregation"), PAIRS)
def test_agreeing_groups_are_exactly_zero(scale: str, aggregation: str, dtype: torch.dtype) -> None:
    """Twenty groups of seven: of about five of them sum / 7 is not the number summed, in float64."""
    gen = torch.Generator().manual_seed(6)
    agreed = torch.randn(20, 2, generator=gen, dtype=dtype).repeat_interleave(7, dim=0)
    rewards = torch.cat([agreed, torch.randn(7, 2, generator=gen, dtype=dtype)])
    factors = torch.tensor([0.3, 1.7], dtype=dtype)
    if dtype == torch.float64:
        total = (agreed * factors).sum(1).view(20, 7)
        assert (total.sum(1) / 7 != total[:, 0]).any()
    actual = advantages_file.group_advantages(
        rewards, group_size=7, factors=factors, scale=scale, aggregation=aggregation
    )
    if aggregation == "sum_then_normalize":  # the other centres over the batch again, which moves the zeros
        assert actual[:140].eq(0).all()
    assert actual[140:].ne(0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of inf - inf
def test_advantages_of_what_is_missing_infinite_or_alone() -> None:
    rewards = torch.tensor([[1.0, NAN], [NAN, NAN], [0.0, 2.0], [NAN, 1.0]])
    for scale, aggregation in PAIRS:
        options = {"scale": scale, "aggregation": aggregation}
        assert advantages_file.group_advantages(rewards, group_size=4, **options)[1] == 0
        assert advantages_file.group_advantages(rewards[:0], group_size=4, **options).shape == (0,)
        assert advantages_file.group_advantages(rewards[:, :0], group_size=4, **options).tolist() == [0.0] * 4
        alone = advantages_file.group_advantages(rewards, group_size=1, **options)
        assert alone.isfinite().all()
        if aggregation == "sum_then_normalize":
            assert alone.eq(0).all()
        infinite = torch.tensor([[1.0], [math.inf], [-math.inf], [2.0], [math.inf], [0.0]])
        assert advantages_file.group_advantages(infinite, group_size=3, **options).isfinite().all()
    with pytest.raises(ValueError, match=r"group_size, order, labels: expected .*; got \['group_size', 'order'\]"):
        advantages_file.group_advantages(rewards, group_size=4, order=torch.arange(4))


def test_advantages_repeat_bit_for_bit() -> None:
    rewards = torch.randn(60, 2, generator=torch.Generator().manual_seed(5))
    ids = torch.arange(60) % 3
    runs = [
        advantages_file.group_advantages(rewards, scale="batch", **sorted_groups(labels))
        for labels in (ids, ids, torch.tensor([5, -1, 2])[ids])  # whatever the groups are called
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


# -- tokens -----------------------------------------------------------------------------------------------------------


def kernel_rows(advantages: Tensor, lengths: Sequence[int], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """What the kernels write, in memory that held -77 before."""
    num_tokens = sum(lengths)
    out = {
        "weights": torch.full((num_tokens,), -77.0, dtype=dtype),
        "token_advantages": torch.full((num_tokens,), -77.0, dtype=dtype),
        "active": torch.ones(num_tokens, dtype=torch.bool),
        "rows": torch.full((num_tokens,), -77),
        "num_active": torch.tensor(-77),
    }
    arguments = {"mask": None, "importance": None, "normalizer": None, "every_row": False} | options
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    rows_file.token_rows(advantages, cu_seqlens, **arguments, **out)
    return out


def looped_rows(
    advantages: Tensor,
    lengths: Sequence[int],
    mask: Tensor | None,
    importance: Tensor | None,
    normalizer: Tensor | None,
    aggregation: str,
    every_row: bool,
) -> tuple[list[float], list[float], list[int]]:
    """Weights, advantages and active rows, token by token, in Python's floats."""
    bounds = [0, *itertools.accumulate(lengths)]
    carries = [True] * bounds[-1] if mask is None else [bool(m) for m in mask]
    default = max(sum(carries) if aggregation == "token_mean" else len(lengths), 1)
    denominator = default if normalizer is None else float(normalizer)
    weights, spread, rows = [0.0] * bounds[-1], [0.0] * bounds[-1], []
    for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
        length = sum(carries[begin:end]) if aggregation == "sequence_mean" else 1
        for t in range(begin, end):
            if carries[t]:
                weights[t] = 1 / denominator / length
                spread[t] = float(advantages[s if advantages.numel() == len(lengths) else t])
                if every_row or (spread[t] != 0 and (importance is None or importance[t] != 0)):
                    rows.append(t)
    return weights, spread, rows


RAGGED = (
    (9, 1, 14, 0, 6, 11, 3, 0),
    (600, 0, 1, 700, 0, 37),  # several tiles, boundaries inside them
    (2000,),  # one sequence over four
    (1,) * 40,
    (0, 0, 5),
)


@pytest.mark.parametrize("lengths", RAGGED, ids=lambda lengths: f"{len(lengths)}x{sum(lengths)}")
@pytest.mark.parametrize("aggregation", ["sequence_mean", "sequence_sum", "token_mean"])
def test_rows_match_plain_loops(aggregation: str, lengths: tuple[int, ...]) -> None:
    gen = torch.Generator().manual_seed(1)
    num_tokens = sum(lengths)
    for masked, per_token, weighted in itertools.product((True, False), repeat=3):
        every_row = masked ^ per_token ^ weighted
        dtype = torch.float32 if masked != weighted else torch.float64
        advantages = torch.randn(num_tokens if per_token else len(lengths), generator=gen, dtype=dtype)
        advantages[torch.rand(advantages.numel(), generator=gen) < 0.3] = 0
        importance = torch.rand(num_tokens, generator=gen, dtype=dtype).round(decimals=1) if weighted else None
        mask = torch.rand(num_tokens, generator=gen) < 0.7 if masked else None
        if mask is not None:  # whatever stands at masked places must not be looked at
            mask[: lengths[0]] = False
            for tensor in (importance, advantages if per_token and num_tokens != len(lengths) else None):
                if tensor is not None:
                    tensor[~mask] = NAN
        normalizer = torch.tensor(3.7, dtype=torch.float64) if weighted else None
        options: dict[str, Any] = {
            "mask": mask,
            "importance": importance,
            "normalizer": normalizer,
            "aggregation": aggregation,
            "every_row": every_row,
        }
        out = kernel_rows(advantages, lengths, dtype, **options)
        weights, spread, rows = looped_rows(advantages, lengths, **options)
        assert rel_rms(out["weights"], torch.tensor(weights, dtype=torch.float64)) <= FLOORS[dtype] / 10
        assert out["token_advantages"].tolist() == spread
        assert out["active"].nonzero()[:, 0].tolist() == rows
        assert out["rows"].tolist() == rows + [-77] * (num_tokens - len(rows))
        assert int(out["num_active"]) == len(rows)
    again = kernel_rows(advantages, lengths, dtype, **options)
    assert all(torch.equal(out[name], again[name]) for name in out)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "sequence_sum", "token_mean"])
def test_rows_of_nothing(aggregation: str) -> None:
    silent = kernel_rows(
        torch.ones(3), (4, 0, 2), torch.float32, mask=torch.zeros(6, dtype=torch.bool), aggregation=aggregation
    )
    assert silent["weights"].tolist() == silent["token_advantages"].tolist() == [0.0] * 6
    assert not silent["active"].any()
    assert int(silent["num_active"]) == 0
    for lengths in ((), (0, 0)):
        empty = kernel_rows(torch.ones(len(lengths)), lengths, torch.float32, aggregation=aggregation)
        assert int(empty["num_active"]) == 0
        assert empty["rows"].shape == (0,)


# -- what calls them --------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Send every tensor to the kernels; grows by an entry for each call of theirs."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        token_rows(*args, **kwargs)

    token_rows = rows_file.token_rows
    monkeypatch.setattr(rows_file, "token_rows", counted)
    functions = get_backend("triton").group_functions
    monkeypatch.setattr(tokens_file, "group_functions", lambda values, backend: functions())
    return calls


CONFIGS = [
    {},
    {"loss_type": "grpo", "beta": 0.1},
    {"loss_type": "dr_grpo", "max_completion_length": 24},
    {"loss_type": "luspo", "importance_sampling_mode": "token_mask"},
]


@pytest.mark.parametrize("kwargs", CONFIGS)
@pytest.mark.parametrize("token_advantages", [False, True])
def test_losses_by_way_of_the_kernels(kwargs: dict[str, Any], token_advantages: bool, launches: list[int]) -> None:
    config = LossConfig(**kwargs)
    case = make_case(4, dtype=torch.float64, zero_advantages=0.4, token_advantages=token_advantages)
    inputs = case.policy_inputs(config)
    for normalizer in (None, 37.0) if token_advantages else (torch.tensor(37),):
        options = {"config": config, "normalizer": normalizer, **inputs}
        expected = reference_policy_loss(case.logprobs, case.entropy, case.advantages, **options)
        fused = grpo_loss(case.hidden, case.weight, case.targets, case.advantages, **options)
        assert fused.loss.item() == pytest.approx(expected.item(), rel=1e-10)
        given = policy_loss(case.logprobs, case.advantages, entropy=case.entropy, **options)
        assert given.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert len(launches) == (4 if token_advantages else 2)
    assert 0 < fused.computed.sum() < case.loss_mask.numel()


def test_coupled_objectives_are_not_the_kernels(launches: list[int]) -> None:
    case = make_case(4, dtype=torch.float64)
    config = LossConfig(importance_sampling_level="sequence")
    policy_loss(case.logprobs, case.advantages, config=config, **case.policy_inputs(config))
    assert not launches
