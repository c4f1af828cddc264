"""`group_advantages` against the oracle and against hand-computed numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from grpo_fast.advantages import AGGREGATIONS, SCALES, group_advantages
from grpo_fast.backends import cpu as cpu_backend
from grpo_fast.reference import reference_advantages

NAN = math.nan


@pytest.fixture(params=["native", "torch"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here runs on both."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_backend, "_C", None)
    elif cpu_backend.native() is None:
        pytest.skip("grpo_fast._C is not built")


def make_rewards(num: int, kinds: int | None, missing: float, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    shape = (num,) if kinds is None else (num, kinds)
    rewards = torch.randn(shape, generator=gen, dtype=torch.float64)
    rewards[torch.rand(shape, generator=gen) < missing] = NAN
    return rewards


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("kinds", [None, 1, 3])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    ("scale", "aggregation"),
    # normalize_then_sum fixes its own scaling and refuses the other two
    [pair for pair in itertools.product(SCALES, AGGREGATIONS) if pair[1] == AGGREGATIONS[0] or pair[0] in SCALES[:2]],
)
def test_matches_oracle(scale: str, aggregation: str, equal: bool, kinds: int | None, missing: float) -> None:
    rewards = make_rewards(24, kinds, missing, seed=3)
    ids = torch.tensor([7, 7, 2, 7, 2, 2, 9, 2, 7, 7, 4, 4, 4, 2, 7, 4, 4, 4, 4, 7, 2, 2, 4, 7])
    grouping = {"group_size": 6} if equal else {"group_ids": ids}
    weights = None if kinds is None else [1.0, 0.5, -2.0][:kinds]
    options = {"scale": scale, "aggregation": aggregation, "weights": weights, **grouping}
    expected = reference_advantages(rewards, **options)
    torch.testing.assert_close(group_advantages(rewards, **options), expected, rtol=1e-10, atol=1e-12)
    assert expected.abs().max() > 0.1


def test_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 3.0])
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]) / (std + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, group_size=4), expected)
    leave_one_out = group_advantages(rewards, group_size=4, scale="leave_one_out")
    torch.testing.assert_close(leave_one_out, torch.tensor([1, -1 / 3, -1 / 3, -1 / 3, 0, 0, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
def test_agreeing_groups_are_exactly_zero(scale: str, dtype: torch.dtype) -> None:
    """Row compaction looks for advantages that are exactly 0; 0.1 and 1/3 are not binary fractions."""
    rewards = torch.tensor([0.1] * 7 + [1 / 3] * 7 + [0.0, 1.0] + [0.7] * 5, dtype=dtype)
    advantages = group_advantages(rewards, group_size=7, scale=scale)
    assert advantages[:14].eq(0).all()
    assert advantages[14:].ne(0).all()


def test_missing_rewards() -> None:
    rewards = torch.tensor([[1.0, NAN], [NAN, NAN], [0.0, 2.0], [NAN, 1.0]])
    advantages = group_advantages(rewards, group_size=4, scale="none")
    torch.testing.assert_close(advantages, torch.tensor([1 - 4 / 3, 0.0, 2 - 4 / 3, 1 - 4 / 3]))


def test_group_of_one_and_nothing() -> None:
    assert group_advantages(torch.tensor([5.0]), group_size=1).tolist() == [0.0]
    assert group_advantages(torch.zeros(0), group_size=4).shape == (0,)
    assert group_advantages(torch.zeros(0), group_ids=torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert group_advantages(torch.full((4,), NAN), group_size=4).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [1.0, 2.0]}, r"rewards: expected a tensor \[N\] or \[N, K\]; got list"),
        ({"rewards": torch.zeros(2, 2, 2)}, r"rewards: expected .*\[2, 2, 2\]"),
        ({"group_size": 3}, "group_size: expected a positive divisor of the 4 rewards; got 3"),
        ({"group_size": 0}, "group_size: expected a positive divisor"),
        ({"group_size": None}, "exactly one of them; got neither"),
        ({"group_ids": torch.zeros(4, dtype=torch.int64)}, "exactly one of them; got both"),
        ({"group_size": None, "group_ids": torch.zeros(3, dtype=torch.int64)}, r"group_ids: expected .*\[4\]"),
        ({"group_size": None, "group_ids": torch.zeros(4)}, "group_ids: expected an integer tensor"),
        ({"scale": "std"}, "scale: expected one of group, batch, none, leave_one_out; got 'std'"),
        ({"aggregation": "sum"}, "aggregation: expected one of"),
        ({"weights": [1.0, 2.0]}, "weights: expected 1 numbers"),
        ({"aggregation": "normalize_then_sum", "scale": "none"}, "scale: normalize_then_sum"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    arguments = {"rewards": torch.arange(4.0), "group_size": 2} | changes
    with pytest.raises(ValueError, match=message):
        group_advantages(arguments.pop("rewards"), **arguments)
