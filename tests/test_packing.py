"""`packing.Support`: what it is made of, what it refuses, and how it is cut; nothing is read back from a GPU."""

from __future__ import annotations

import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.packing import Support, check_support
from tests.stand_in import stand_in
from tests.supports import as_support

ROWS = [[7, 3], [], [9], [0, 5, 2, 8], []]
CPU = torch.device("cpu")


def rows_of(support: Support) -> list[list[int]]:
    ids, offsets = support.token_ids.tolist(), support.offsets.tolist()
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    return [ids[a:b] for a, b in pairwise(offsets)]


def ids(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# -- made -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32), (torch.int32,) * 2])
def test_what_it_says(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    support = Support(ids(7, 3, 9, 0, 5, 2, 8, dtype=dtypes[0]), ids(0, 2, 2, 3, 7, 7, dtype=dtypes[1]))
    assert rows_of(support) == ROWS
    assert support.num_rows == 5
    assert support.sizes.tolist() == [2, 0, 1, 4, 0]
    assert support.rows_of_ids().tolist() == [0, 0, 2, 3, 3, 3, 3]
    assert support.nbytes == 7 * dtypes[0].itemsize + 6 * dtypes[1].itemsize
    assert support.token_ids.dtype == dtypes[0]
    assert rows_of(support[1:4]) == ROWS[1:4]
    assert rows_of(support[ids(3, 0, 3)]) == [ROWS[3], ROWS[0], ROWS[3]]


def test_no_rows_and_no_ids() -> None:
    none = Support(ids(), ids(0))
    assert none.num_rows == 0
    assert none.sizes.tolist() == none.rows_of_ids().tolist() == []
    assert rows_of(none[:]) == rows_of(none[ids()]) == []
    empty = Support(ids(), ids(0, 0, 0))
    assert rows_of(empty) == rows_of(empty[0:2]) == [[], []]
    assert rows_of(Support.cat([none, empty, none])) == [[], []]


def test_the_same_id_in_rows_beside_each_other() -> None:
    """Distinct within a row only; order is kept."""
    support = Support(ids(4, 2, 2, 4, 4), ids(0, 2, 4, 5))
    assert rows_of(support) == [[4, 2], [2, 4], [4]]


@pytest.mark.parametrize(
    ("token_ids", "offsets", "message"),
    [
        ([1, 2], ids(0, 2), "token_ids: expected a tensor of one dimension, int32 or int64; got list"),
        (ids(1)[None], ids(0, 1), "token_ids: expected a tensor of one dimension, int32 or int64; got torch.int64 of shape [1, 1]"),  # noqa: E501
        (torch.ones(2), ids(0, 2), "token_ids: expected a tensor of one dimension, int32 or int64; got torch.float32 of shape [2]"),  # noqa: E501
        (ids(1), None, "offsets: expected a tensor of one dimension, int32 or int64; got NoneType"),
        (ids(1), torch.tensor(1), "offsets: expected a tensor of one dimension, int32 or int64; got torch.int64 of shape []"),  # noqa: E501
        (ids(1), ids(0, 1).short(), "offsets: expected a tensor of one dimension, int32 or int64; got torch.int16 of shape [2]"),  # noqa: E501
        (ids(), ids(), "offsets: expected [T+1] on cpu, the device of token_ids; got torch.int64 of shape [0] on cpu"),
        (ids(1), ids(0, 1).to("meta"), "offsets: expected [T+1] on cpu, the device of token_ids; got torch.int64 of shape [2] on meta"),  # noqa: E501
        (ids(1, 2), ids(1, 2), "offsets: expected 0 = offsets[0] <= offsets[1] <= ... <= offsets[T] = N = 2; got 1 first, 2 last"),  # noqa: E501
        (ids(1, 2), ids(0, 1), "N = 2; got 0 first, 1 last"),
        (ids(1, 2), ids(0, 3), "N = 2; got 0 first, 3 last"),
        (ids(1, 2), ids(0, 2, 1, 2), "N = 2; got 0 first, 2 last, and a step down"),
        (ids(1, -2), ids(0, 2), "token_ids: expected ids in [0, 2^31); got -2"),
        (ids(1, 2**31, 5, 2**40), ids(0, 2, 4), "token_ids: expected ids in [0, 2^31); got 2147483648"),
        (ids(7, 3, 7 + 2**32), ids(0, 1, 3), "token_ids: expected ids in [0, 2^31); got 4294967303"),
        (ids(4, 9, 5, 9, dtype=torch.int32), ids(0, 1, 4), "token_ids: expected distinct ids in a row; got 9 twice in row 1"),  # noqa: E501
        (ids(5, 5), ids(0, 2), "token_ids: expected distinct ids in a row; got 5 twice in row 0"),
    ],
)  # fmt: skip
def test_refused(token_ids: Any, offsets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        Support(token_ids, offsets)


def test_of_a_mask() -> None:
    mask = torch.zeros(3, 2, 6, dtype=torch.bool)
    mask[0, 0, [1, 4]] = mask[1, 1, 5] = True
    mask[2] = True
    support = Support.from_mask(mask)
    assert rows_of(support) == [[1, 4], [], [], [5], [], []]  # all of V is an empty row
    assert support.token_ids.dtype == torch.int32
    for shape, count in (((0, 4), 0), ((3, 0), 3), ((2, 3, 0), 6)):
        assert rows_of(Support.from_mask(torch.zeros(shape, dtype=torch.bool))) == [[]] * count
    for wrong, got in (
        (mask.int(), "torch.int32 of shape [3, 2, 6]"),
        (mask[0, 0], "torch.bool of shape [6]"),
        (None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"mask: expected a bool tensor [..., V]; got {got}")):
            Support.from_mask(wrong)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_of_padded_ids(dtype: torch.dtype) -> None:
    padded = torch.tensor([[[7, -1, 3], [-1, -1, -1]], [[9, 0, 2], [-1, 5, -1]]], dtype=dtype)
    support = Support.from_padded(padded)
    assert rows_of(support) == [[7, 3], [], [9, 0, 2], [5]]
    assert support.token_ids.dtype == dtype
    assert rows_of(Support.from_padded(padded.clamp(min=0), pad=0)) == [[7, 3], [], [9, 2], [5]]
    assert Support.from_padded(padded[:0]).num_rows == 0
    assert rows_of(Support.from_padded(padded[..., :0])) == [[]] * 4
    for wrong, message in (
        (padded.float(), "ids: expected an int32 or int64 tensor [..., K]; got torch.float32 of shape [2, 2, 3]"),
        (padded[0, 0], f"ids: expected an int32 or int64 tensor [..., K]; got {dtype} of shape [3]"),
        ([[1]], "ids: expected an int32 or int64 tensor [..., K]; got list"),
        (torch.where(padded == 0, -7, padded), "token_ids: expected ids in [0, 2^31); got -7"),
        (torch.where(padded == 0, 9, padded), "token_ids: expected distinct ids in a row; got 9 twice in row 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Support.from_padded(wrong)


def test_cat() -> None:
    first, second = as_support(ROWS), as_support([[1], [], [4, 2]])
    assert rows_of(Support.cat([first, second])) == [*ROWS, [1], [], [4, 2]]
    assert rows_of(Support.cat([second])) == [[1], [], [4, 2]]
    assert rows_of(Support.cat([first[3:], second[:1]])) == [*ROWS[3:], [1]]
    with pytest.raises(ValueError, match="parts: expected at least one Support; got none"):
        Support.cat([])
    with pytest.raises(ValueError, match="parts: expected a Support; got NoneType"):
        Support.cat([first, None])  # type: ignore[list-item]


# -- cut --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        slice(None),
        slice(1, 4),
        slice(2, 2),
        slice(4, 1),
        slice(-3, None),
        slice(0, 99),
        slice(None, None, 2),
        slice(None, None, -1),
        slice(4, 0, -3),
    ],
    ids=str,
)
def test_slices_are_those_of_lists(rows: slice) -> None:
    assert rows_of(as_support(ROWS)[rows]) == ROWS[rows]
    assert rows_of(as_support(ROWS, torch.int32)[1:][rows]) == ROWS[1:][rows]


def test_indices_and_masks() -> None:
    support = as_support(ROWS)
    for index in ([3, 0, 3, 1], [], [4, 4], [-2, -5]):
        for dtype in (torch.int64, torch.int32):
            assert rows_of(support[ids(*index, dtype=dtype)]) == [ROWS[i] for i in index], (index, dtype)
    for mask in ([True] * 5, [False] * 5, [False, True, False, True, True]):
        assert rows_of(support[torch.tensor(mask)]) == [row for row, keep in zip(ROWS, mask, strict=True) if keep]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (1, "rows: expected a slice, indices [n] or a mask [T] bool; got int"),
        ([0, 1], "rows: expected a slice, indices [n] or a mask [T] bool; got list"),
        (
            torch.tensor([[0]]),
            "rows: expected a slice, indices [n] or a mask [T] bool; got torch.int64 of shape [1, 1]",
        ),
        (torch.tensor([0.0]), "rows: expected a slice, indices [n] or a mask [T] bool; got torch.float32 of shape [1]"),
        (torch.tensor([True, False]), "rows: expected a mask of 5 rows; got 2"),
        (torch.tensor([True] * 6), "rows: expected a mask of 5 rows; got 6"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_no_such_rows(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        as_support(ROWS)[rows]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets", [(0, 2, 5, 3, 7, 7), (3, 2, 9, 3, 7, 7), (0, -4, 2, 3, 90, 7), (0, 2, 2, 3, 7, 1)])
def test_rows_of_ids_are_rows_whatever_the_offsets(offsets: tuple[int, ...], dtype: torch.dtype) -> None:
    """Offsets changed after they were looked at, or never looked at: no place outside of memory comes from them."""
    support = as_support(ROWS, dtype)
    support.offsets.copy_(ids(*offsets))
    rows = support.rows_of_ids()
    assert rows.numel() == 7
    assert 0 <= rows.min() <= rows.max() < 5


def test_moved() -> None:
    support = as_support(ROWS)
    moved = support.to("meta")
    assert moved.token_ids.device.type == moved.offsets.device.type == "meta"
    assert (moved.num_rows, moved.nbytes) == (5, support.nbytes)
    assert rows_of(support.to(CPU, non_blocking=True)) == ROWS


# -- on a device whose values are not there yet -----------------------------------------------------------------------


def test_nothing_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Construction on a GPU looks at no value, so that what is wrong passes; unless it is asked to."""
    wrong = ids(5, 5, -1)
    with stand_in() as device:
        support = Support(wrong, ids(0, 2, 3))
        assert (support.num_rows, support.nbytes, support.sizes.numel()) == (2, 48, 2)
        moved = support.to("cpu")
        Support.cat([support, moved])
        assert support.rows_of_ids().numel() == 3
        assert device.waits == []
        monkeypatch.setenv("GRPO_FAST_DEBUG", "1")
        with pytest.raises(ValueError, match=r"token_ids: expected ids in \[0, 2\^31\); got -1"):
            Support(wrong, ids(0, 2, 3))
        with pytest.raises(ValueError, match=r"token_ids: expected distinct ids in a row; got 5 twice in row 0"):
            Support(wrong[:2], ids(0, 2))
        assert device.waits


def test_on_the_host() -> None:
    support = as_support(ROWS, torch.int64)
    kept = support.on_host()
    assert (kept.token_ids.dtype, rows_of(kept)) == (torch.int32, ROWS)
    # From a GPU, where nobody has looked: narrowing would make another word of it.
    there = [SimpleNamespace(device=torch.device("cuda"), cpu=lambda t=t: t) for t in (ids(7 + 2**32), ids(0, 1))]
    with pytest.raises(ValueError, match=re.escape("token_ids: expected ids in [0, 2^31); got 4294967303")):
        Support.trusted(*there).on_host()  # type: ignore[arg-type]


def test_meta_tensors_have_no_values() -> None:
    assert Support(ids(1, 1).to("meta"), ids(0, 2).to("meta")).num_rows == 1


# -- of these targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (torch.ones(4, 9), "support: expected a Support; got torch.float32 of shape [4, 9]"),
        ((ids(1), ids(0, 1)), "support: expected a Support; got tuple"),
        (as_support([[1]] * 3), "support: expected 4 rows on cpu, one a target; got 3 on cpu"),
        (as_support([[1]] * 4).to("meta"), "support: expected 4 rows on cpu, one a target; got 4 on meta"),
        (
            as_support([[1], [2], [5, 4, 7], [4]]),
            "support: expected the target of each unmasked row among the row's tokens; got target 3 at [1, 0], which "
            "is none of its 3 tokens",
        ),
    ],
)
def test_refused_for_targets(support: Any, message: str) -> None:
    targets = torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        check_support(support, targets, None)


def test_targets_of_masked_rows_may_be_anywhere() -> None:
    targets = torch.tensor([[1, 2], [-100, 4]])
    check_support(as_support([[1], [], [5], [8, 4]]), targets, torch.tensor([True, True, False, True]))
    check_support(as_support([[1], [2], [], [8, 4]]), targets, None)
