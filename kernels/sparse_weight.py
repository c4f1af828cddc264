"""The weight's gradient from rows on small supports: a sum over the entries of each id that occurs, and nowhere else.

Legend: N entries in the order of their ids, S ids that occur, H hidden size, V vocabulary; entry j has the token ids_j,
the row rows_j and the number dx[entries_j].

    out[v] = round(float32(out[v]) + sum_j dx[entries_j] hidden[rows_j])        over starts[s] <= j < starts[s + 1],
                                                                                v = ids[starts[s]]

Program to data: programs walk over ids with the grid's stride, each for one block of columns; an id's entries are taken
in blocks `[K, B]`, in order, with one sum for each of the K places, and the sums meet at the end. One program alone
writes a place of `out`, so that there are no atomic additions, and the same bits on every run. How many ids occur only
the device knows: it is read there.

Bytes: s H loaded for an entry (s to an element of hidden), 20 of its numbers for each block of columns; 2 s' H for an
id (s' to an element of out). An id in many rows is one program's work in each block of columns: 16 entries in about
0.7 us, so 0.07 ms for one in 1600 rows and 0.7 ms for one in all of 16384. Ids are walked in ascending order and the
frequent ones of a byte-pair vocabulary are small: they begin first, beside all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_fast.kernels import launcher
from grpo_fast.kernels.configuration import Configuration
from grpo_fast.kernels.launch_table import INTERPRETED_PROGRAMS, SPARSE_WEIGHT, SPARSE_WEIGHT_PROGRAMS
from grpo_fast.kernels.sparse_rows import gathered, row_stride


@triton.jit(do_not_specialize_on_alignment=["ids", "entries", "rows", "starts", "num_ids", "dx"])
def _sparse_weight_kernel(
    dx,  # [N] float32
    hidden,  # [R, H]
    hidden_stride,
    ids,  # [N] int32, ascending
    entries,  # [N] int64, places in dx
    rows,  # [N] int64
    starts,  # [N + 1] int64, of which S + 1 count
    num_ids,  # one int64: S
    out,  # [V, H], in and out
    out_stride,
    width,  # H
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [B]
    inside = columns < width
    for number in range(tl.program_id(0), tl.load(num_ids).to(tl.int32), tl.num_programs(0)):
        begin = tl.load(starts + number)
        num_entries = (tl.load(starts + number + 1) - begin).to(tl.int32)
        total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
        for first in range(0, num_entries, ENTRIES):
            places = first + tl.arange(0, ENTRIES)  # [K]
            valid = places < num_entries
            index = tl.load(rows + begin + places, mask=valid, other=0)
            d = tl.load(dx + tl.load(entries + begin + places, mask=valid, other=0), mask=valid, other=0.0)
            h = gathered(hidden, index, columns, valid, inside, hidden_stride)
            total = tl.fma(h, tl.broadcast_to(d[:, None], [ENTRIES, COLUMNS]), total)
        place = out + tl.load(ids + begin).to(tl.int64) * out_stride + columns
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32) + tl.sum(total, axis=0)
        tl.store(place, value.to(out.dtype.element_ty), mask=inside)


class IdStarts(NamedTuple):
    """Where an id's entries begin: `starts` `[N+1]` int64, of which the first S + 1 count; `num_ids` `[1]` int64: S."""

    starts: Tensor
    num_ids: Tensor


def id_starts(ids: Tensor) -> IdStarts:
    """Of ids `[N]`, ascending, N > 0, without a wait for the device."""
    first = torch.ones_like(ids, dtype=torch.bool)
    torch.ne(ids[1:], ids[:-1], out=first[1:])
    numbers = first.cumsum(0)
    total = ids.numel()
    # Entries that are not the first of their id go to the last place, which is none of those that count unless all are.
    places = torch.where(first, numbers - 1, total)
    starts = numbers.new_full((total + 1,), total)
    starts.scatter_(0, places, torch.arange(total, out=torch.empty_like(numbers)))
    return IdStarts(starts, numbers[-1:])


def sparse_grad_weight(dx: Tensor, hidden: Tensor, ids: Tensor, entries: Tensor, rows: Tensor, out: Tensor) -> None:
    """Add to out `[V, H]`, at the ids that occur: out[v] += sum_j dx[entries_j] hidden[rows_j], rounded once.

    Args:
        dx: `[N]` float32. hidden: `[R, H]`.
        ids, entries, rows: `[N]`, int32, int64, int64, in the order of the ids.

    Raises:
        ValueError: columns of `hidden` or `out` are not contiguous.
    """
    if ids.numel() == 0:
        return
    arguments = _arguments(dx, hidden, ids, entries, rows, out, id_starts(ids))
    blocks = triton.cdiv(hidden.shape[1], arguments["COLUMNS"])
    grid = (_num_programs(ids.numel(), blocks, dx.device), blocks)
    launcher.launch(_sparse_weight_kernel, grid, arguments, dx.device)


def _num_programs(num_entries: int, blocks: int, device: torch.device) -> int:
    """For each of the blocks of columns."""
    if device.type != "cuda":
        return min(num_entries, INTERPRETED_PROGRAMS)
    wanted = SPARSE_WEIGHT_PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    return min(num_entries, triton.cdiv(wanted, blocks))


def _arguments(
    dx: Tensor, hidden: Tensor, ids: Tensor, entries: Tensor, rows: Tensor, out: Tensor, found: IdStarts
) -> dict[str, Any]:
    width = hidden.shape[1]
    return {
        "dx": dx,
        "hidden": hidden,
        "hidden_stride": row_stride("hidden", hidden),
        "ids": ids,
        "entries": entries,
        "rows": rows,
        "starts": found.starts,
        "num_ids": found.num_ids,
        "out": out,
        "out_stride": row_stride("out", out),
        "width": width,
        "ENTRIES": SPARSE_WEIGHT.entries,
        "COLUMNS": SPARSE_WEIGHT.width(width),
        "num_warps": SPARSE_WEIGHT.num_warps,
    }


def aot_configurations() -> Iterator[Configuration]:
    """Every dtype, and a gradient that is wider than the hidden states."""
    meta = {"device": "meta"}
    for dtype, out_dtype, width in (
        (torch.bfloat16, torch.bfloat16, 2048),
        (torch.bfloat16, torch.float32, 2048),
        (torch.float16, torch.float16, 100),
        (torch.float32, torch.float32, 2048),
        (torch.bfloat16, torch.bfloat16, 1),
    ):
        ids, places = torch.empty(4096, dtype=torch.int32, **meta), torch.empty(4096, dtype=torch.int64, **meta)
        arguments = _arguments(
            torch.empty(4096, **meta),
            torch.empty(64, width, dtype=dtype, **meta),
            ids,
            places,
            places,
            torch.empty(1000, width, dtype=out_dtype, **meta),
            IdStarts(places, places),
        )
        names = [str(each).removeprefix("torch.") for each in (dtype, out_dtype)]
        label = f"sparse_weight, {names[0]} to {names[1]}, H {width}"
        yield Configuration.of_launch(label, _sparse_weight_kernel, arguments)
