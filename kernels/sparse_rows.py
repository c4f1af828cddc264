"""Rows on small supports: dot products with the rows of the weight that a support names, and the way back.

Legend: R rows, V vocabulary, H hidden size, N tokens of all supports, K and B entries and columns of a block. Row t is
entries offsets[t] ... offsets[t + 1] of everything `[N]`; its tokens are ids[.], its hidden state is h.

    x_j = h . W[id_j]        statistics, objective and dx of x: row_sweeps.py        dh = sum_j dx_j W[id_j]

Program to data: one program a row, one row a program. Blocks `[K, B]` of gathered rows are multiplied in float32 by
fused multiply-add into as many sums, which meet at the end: after the last column of K dot products, or after the last
entry of B columns of dh. Nothing depends on other rows, and `_dots` is one function wherever it is used: with the
launch fixed by H alone, old, current and reference passes agree bit for bit.

`_sparse_objective_kernel` does all of it in one visit: what a row's products leave in x (4 bytes an entry, in the L1
cache) its threads read back behind a barrier, and its rows of the weight are read again soon after they were read.
Rows with g = e = 0 gather nothing on the way back, and are zeros.

Bytes of an entry, s to an element of the weight: s H loaded for x and s H for dh, 4 of its id and for each block of
columns once more; x written once, read by the statistics, read and overwritten by dx, read for dh. Of a row: s H of h
for every K entries, dh written. Entries that a block has and a row has not cost instructions, not bytes. Arithmetic:
2 H multiply-adds an entry, and as many conversions: a fifth of the time that the bytes take from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_fast.kernels import launcher
from grpo_fast.kernels.configuration import Configuration
from grpo_fast.kernels.launch_table import SPARSE_ROWS
from grpo_fast.kernels.objective import POLICIES
from grpo_fast.kernels.row_objective import _NUMBERS, _OPTIONAL, _TOKENS, _VARIANTS, RESULTS, Objective, objective_row
from grpo_fast.kernels.row_sweeps import row_bias, row_place, row_scales
from grpo_fast.kernels.rows import UNALIGNED, Rows, support_example

LOADS_PER_ENTRY = {"logits": {"weight": 1, "ids": 4}, "back": {"weight": 1, "ids": 4, "dx": 4}}
"""Of an entry: elements of the weight for each column of H; bytes of the others."""


# -- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def gathered(values, index, columns, valid, inside, row_stride):
    """`[K, B]` float32 of values[index_k, columns_b]; 0 where `valid` `[K]` or `inside` `[B]` is not."""
    places = values + tl.cast(index, tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(places, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _dots(
    x, hidden, weight, ids, num_entries, width, weight_stride, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write a row's x; x, hidden and ids point at the row."""
    for first in range(0, num_entries, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)  # [K]
        valid = entries < num_entries
        tokens = tl.load(ids + entries, mask=valid, other=0)
        total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
        for column in range(0, width, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)  # [B]
            inside = columns < width
            h = tl.load(hidden + columns, mask=inside, other=0.0).to(tl.float32)
            w = gathered(weight, tokens, columns, valid, inside, weight_stride)
            total = tl.fma(w, tl.broadcast_to(h[None, :], [ENTRIES, COLUMNS]), total)
        tl.store(x + entries, tl.sum(total, axis=1), mask=valid)


@triton.jit
def _grad_hidden(
    dx, weight, ids, out, num_entries, width, weight_stride, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write a row's dh; dx, ids and out point at the row. Of no entries it is zero."""
    for column in range(0, width, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)  # [B]
        inside = columns < width
        total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
        for first in range(0, num_entries, ENTRIES):
            entries = first + tl.arange(0, ENTRIES)  # [K]
            valid = entries < num_entries
            tokens = tl.load(ids + entries, mask=valid, other=0)
            d = tl.load(dx + entries, mask=valid, other=0.0)
            w = gathered(weight, tokens, columns, valid, inside, weight_stride)
            total = tl.fma(w, tl.broadcast_to(d[:, None], [ENTRIES, COLUMNS]), total)
        tl.store(out + columns, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


# -- kernels ----------------------------------------------------------------------------------------------------------

_UNALIGNED = [*UNALIGNED, "ids"]


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _sparse_logits_kernel(
    hidden,  # [R, H]
    hidden_stride,
    weight,  # [V, H]
    weight_stride,
    ids,  # [N] int32
    offsets,  # [R + 1] int64
    products,  # [N] float32, out: x
    width,  # H
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    start, num_entries = row_place(row, None, offsets, None)
    h = hidden + tl.cast(row, tl.int64) * hidden_stride
    _dots(products + start, h, weight, ids + start, num_entries, width, weight_stride, ENTRIES, COLUMNS)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _sparse_grad_hidden_kernel(
    dx,  # [N] float32
    weight,  # [V, H]
    weight_stride,
    ids,  # [N] int32
    offsets,  # [R + 1] int64
    grad_hidden,  # [R, H], out
    grad_stride,
    width,  # H
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    start, num_entries = row_place(row, None, offsets, None)
    out = grad_hidden + tl.cast(row, tl.int64) * grad_stride
    _grad_hidden(dx + start, weight, ids + start, out, num_entries, width, weight_stride, ENTRIES, COLUMNS)


@triton.jit(do_not_specialize_on_alignment=[*_UNALIGNED, *_TOKENS, *_NUMBERS, "live"])
def _sparse_objective_kernel(
    hidden,  # [R, H]
    hidden_stride,
    weight,  # [V, H]
    weight_stride,
    ids,  # [N] int32
    offsets,  # [R + 1] int64
    dx,  # [N] float32, out; x before
    grad_hidden,  # [R, H], out, or None
    grad_stride,
    targets,  # [R] int64, places in the row
    bias,  # [N] or None
    row_temperature,  # [R] float32 or None
    weights,  # [R] float32
    advantages,  # [R] float32
    old_logprobs,  # [R] float32 or None
    ref_logprobs,  # [R] float32 or None
    sampling_logprobs,  # [R] float32 or None
    importance,  # [R] float32 or None
    parameters,  # [P] float32, of objective.PARAMETERS
    entropy_gradient,  # [1] float32 or None
    grad_scale,  # [1] float32 or None: multiplies dx
    logprobs,  # [R] float32, out
    entropy,  # [R] float32, out
    live,  # [R] bool, out: whether dx is not zero
    width,  # H
    factor,
    cap_scale,
    chain,
    POLICY: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    CORRECTION: tl.constexpr,
    TRANSFORM: tl.constexpr,
    LANES: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    wide_row = tl.cast(row, tl.int64)
    start, num_entries = row_place(row, None, offsets, None)
    x = dx + start
    h = hidden + wide_row * hidden_stride
    _dots(x, h, weight, ids + start, num_entries, width, weight_stride, ENTRIES, COLUMNS)
    tl.debug_barrier()  # x has been written by other threads
    row_factor, row_chain = row_scales(row, row_temperature, factor, chain)
    g, e = objective_row(
        row,
        x,
        x,
        row_bias(bias, start, offsets),
        tl.load(targets + row),
        num_entries,
        row_factor,
        cap_scale,
        row_chain,
        weights,
        advantages,
        old_logprobs,
        ref_logprobs,
        sampling_logprobs,
        importance,
        parameters,
        entropy_gradient,
        grad_scale,
        logprobs,
        entropy,
        live,
        POLICY,
        KL,
        KL_TIMES_RATIO,
        CORRECTION,
        TRANSFORM,
        True,
        LANES,
    )
    if grad_hidden is not None:
        tl.debug_barrier()  # so has dx
        summed = tl.where((g == 0) & (e == 0), 0, num_entries)
        out = grad_hidden + wide_row * grad_stride
        _grad_hidden(x, weight, ids + start, out, summed, width, weight_stride, ENTRIES, COLUMNS)


# -- launches ---------------------------------------------------------------------------------------------------------


def sparse_logits(hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Write out `[N]` float32: out_j = hidden[row of j] . weight[ids_j].

    Args:
        hidden: `[R, H]`. weight: `[V, H]`, the same dtype. ids: `[N]` int32. offsets: `[R+1]` int64.

    Raises:
        ValueError: columns of `hidden` or `weight` are not contiguous.
    """
    arguments = {**_operands(hidden, weight, ids, offsets), "products": out}
    _launch(_sparse_logits_kernel, offsets, arguments)


def sparse_grad_hidden(dx: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Write out `[R, H]`: sum_j dx_j weight[ids_j] over each row's entries, rounded once to the dtype of `out`.

    Args:
        dx: `[N]` float32. weight, ids, offsets: as in `sparse_logits`.

    Raises:
        ValueError: columns of `weight` or `out` are not contiguous.
    """
    arguments = {"dx": dx, **_gathers(weight, ids, offsets), **_output(out)}
    _launch(_sparse_grad_hidden_kernel, offsets, arguments)


def sparse_objective(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    rows: Rows,
    objective: Objective,
    tokens: Mapping[str, Tensor | None],
    grad_hidden: Tensor | None,
    *,
    entropy_gradient: Tensor | None,
    grad_scale: Tensor | None,
    results: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write dx `[N]` over `rows.logits`, and dHidden; return (logprobs, entropy, live) `[R]`.

    Args:
        hidden, weight, ids: as in `sparse_logits`.
        rows: with offsets; its logits, float32, need not be there yet.
        grad_hidden: `[R, H]`, or None where it is not wanted.
        tokens, entropy_gradient, grad_scale, results: as in `row_objective_of`.

    Raises:
        ValueError: columns of `hidden`, `weight` or `grad_hidden` are not contiguous.
    """
    written = rows.results(results, RESULTS)
    assert rows.offsets is not None
    arguments = _objective_arguments(hidden, weight, ids, rows, objective, grad_hidden)
    given = {"entropy_gradient": entropy_gradient, "grad_scale": grad_scale}
    _launch(_sparse_objective_kernel, rows.offsets, {**arguments, **written, **tokens, **given})
    return written["logprobs"], written["entropy"], written["live"]


def _launch(kernel: Any, offsets: Tensor, arguments: Mapping[str, Any]) -> None:
    num_rows = offsets.numel() - 1
    if num_rows > 0:
        launcher.launch(kernel, (num_rows,), arguments, offsets.device)


def _gathers(weight: Tensor, ids: Tensor, offsets: Tensor) -> dict[str, Any]:
    """What kernels are told that gather rows of the weight."""
    width = weight.shape[1]
    return {
        "weight": weight,
        "weight_stride": row_stride("weight", weight),
        "ids": ids,
        "offsets": offsets,
        "width": width,
        "ENTRIES": SPARSE_ROWS.entries,
        "COLUMNS": SPARSE_ROWS.width(width),
        "num_warps": SPARSE_ROWS.num_warps,
    }


def _operands(hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor) -> dict[str, Any]:
    """Those that multiply hidden states besides."""
    if hidden.stride() != (hidden.shape[1], 1) or hidden.data_ptr() % 16:
        # Where it lies must not change how a product is summed: the compiler has one case less to tell apart.
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    return {"hidden": hidden, "hidden_stride": hidden.stride(0), **_gathers(weight, ids, offsets)}


def _output(grad_hidden: Tensor | None) -> dict[str, Any]:
    stride = None if grad_hidden is None else row_stride("grad_hidden", grad_hidden)
    return {"grad_hidden": grad_hidden, "grad_stride": stride}


def row_stride(name: str, values: Tensor) -> int:
    """Of a matrix `[., H]`.

    Raises:
        ValueError: its columns are not contiguous.
    """
    if values.dim() != 2 or values.stride(1) != 1:
        raise ValueError(
            f"{name}: expected [., H] with contiguous columns; got shape {list(values.shape)}, strides "
            f"{list(values.stride())}"
        )
    return values.stride(0)


def _objective_arguments(
    hidden: Tensor, weight: Tensor, ids: Tensor, rows: Rows, objective: Objective, grad_hidden: Tensor | None
) -> dict[str, Any]:
    """All but tokens and results."""
    assert rows.offsets is not None
    of_rows = rows.arguments(rows.launch)
    used = ("targets", "bias", "row_temperature", "factor", "cap_scale", "chain", "TRANSFORM", "LANES")
    return {
        **{name: of_rows[name] for name in used},
        **_operands(hidden, weight, ids, rows.offsets),
        **_output(grad_hidden),
        "dx": rows.logits,
        "parameters": objective.parameters,
        "POLICY": POLICIES[objective.policy],
        "KL": objective.kl,
        "KL_TIMES_RATIO": objective.kl_times_ratio,
        "CORRECTION": objective.correction,
    }


# -- without a GPU ----------------------------------------------------------------------------------------------------


def aot_configurations() -> Iterator[Configuration]:
    """Wide and narrow rows, of both kinds of dtype; the objective plain, with everything, and without dHidden."""
    for dtype, width in ((torch.bfloat16, 2048), (torch.float16, 100), (torch.float32, 2048)):
        case = f"{str(dtype).removeprefix('torch.')}, H {width}"
        hidden = torch.empty(64, width, dtype=dtype, device="meta")
        weight = torch.empty(1000, width, dtype=dtype, device="meta")
        for full in (False, True):
            example = support_example(full)
            rows, per_row = example.rows, example.per_row()
            assert rows.offsets is not None
            ids = torch.empty(rows.logits.numel(), dtype=torch.int32, device="meta")
            if not full:
                logits = {**_operands(hidden, weight, ids, rows.offsets), "products": rows.logits}
                yield Configuration.of_launch(f"sparse_logits, {case}", _sparse_logits_kernel, logits)
                back = {"dx": rows.logits, **_gathers(weight, ids, rows.offsets), **_output(hidden)}
                yield Configuration.of_launch(f"sparse_grad_hidden, {case}", _sparse_grad_hidden_kernel, back)
            policy, kl, times, correction, given = _VARIANTS[3 if full else 0]
            objective = Objective(policy, kl, times, correction, per_row)
            arguments = _objective_arguments(hidden, weight, ids, rows, objective, None if full else hidden)
            tokens = {name: per_row if name in given else None for name in _OPTIONAL}
            results = {name: example.per_row(kind) for name, kind in RESULTS.items()}
            yield Configuration.of_launch(
                f"sparse_objective, {policy}, {case}{', bias, soft cap, no dHidden' if full else ''}",
                _sparse_objective_kernel,
                {**arguments, **tokens, **results, "weights": per_row, "advantages": per_row},
            )
