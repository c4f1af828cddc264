"""What packed tokens carry into the loss, and which rows of the LM head are computed: the device twin of `token_rows`
in csrc/group_cpu.h, in two launches, without a wait for the device.

Legend: T packed tokens, S sequences, m mask, L_s unmasked tokens of sequence s. Real: the advantages' float32 or
float64.

    weight_t = m_t / D      or, as sequence_mean, m_t / D / max(L_s, 1)
    D = `normalizer`, or max(sum of m, 1) as token_mean, or max(S, 1)
    active_t = m_t and (every_row or advantage_t != 0 and importance_t != 0);      rows = the active t, increasing

Launch 1, counts: a program for each tile of BLOCK tokens counts the active and the unmasked ones; as sequence_mean
under a mask, one for each sequence besides counts its unmasked tokens. Launch 2, results: each program sums the counts
of all tiles (two int32 each, from L2), from which it knows D and where its own rows begin in the list, and writes its
tile: a prefix sum inside the tile makes the list stable and increasing. Counts are integers and every place in memory
has one writer, so that the same inputs give the same bits. A token finds its sequence by bisection of cu_seqlens.

Bytes a token: 2 mask (each launch 1), 1 more as sequence_mean, 4 or 8 each for importance and per-token advantages in
each launch; written weight and advantage, 1 of `active` and 8 for each active row. T = 32768 float32 tokens are about
0.6 MB, under a microsecond of an H100's memory: what it costs is two launches of 64 programs, and their latency.
The longest sequence of sequence_mean is counted by one program, 4096 tokens a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_fast.kernels.configuration import Configuration
from grpo_fast.kernels.launcher import launch


@triton.jit
def _sequence_of(cu_seqlens, t, num_sequences, steps):
    """s with cu_seqlens[s] <= t < cu_seqlens[s + 1], never an empty sequence; `steps` is log2 S, rounded up."""
    low = tl.zeros_like(t)
    high = low + num_sequences
    for _ in range(steps):
        middle = (low + high) // 2
        reached = tl.load(cu_seqlens + middle) <= t
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def _tile(
    advantages, importance, mask, cu_seqlens, tile, num_tokens, num_sequences, steps,
    PER_TOKEN: tl.constexpr, EVERY_ROW: tl.constexpr, WANT_SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a tile's tokens [BLOCK]: their numbers, whether they exist, carry loss and are active, advantage, sequence."""
    t = tile * BLOCK + tl.arange(0, BLOCK)
    inside = t < num_tokens
    carries = inside
    if mask is not None:
        carries = tl.load(mask + t, mask=inside, other=0) != 0
    s = t
    if WANT_SEQUENCE or not PER_TOKEN:
        s = _sequence_of(cu_seqlens, t, num_sequences, steps)
    # Of masked tokens nothing is read: anything may stand there.
    advantage = tl.load(advantages + (t if PER_TOKEN else s), mask=carries, other=0.0)
    active = carries
    if not EVERY_ROW:
        active = active & (advantage != 0.0)
        if importance is not None:
            active = active & (tl.load(importance + t, mask=carries, other=0.0) != 0.0)
    return t, inside, carries, active, advantage, s


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_tiles", "steps"])
def _count_kernel(
    advantages,  # [S], or [T] if PER_TOKEN, Real
    importance,  # [T] Real or None
    mask,  # [T] one byte each, nonzero: carries loss; None: all do
    cu_seqlens,  # [S + 1] integers
    tile_counts,  # [2, num_tiles] int32, out: active rows, unmasked tokens
    lengths,  # [S] int32, out: L_s; None: not wanted
    num_tokens,
    num_sequences,
    num_tiles,
    steps,
    PER_TOKEN: tl.constexpr,
    EVERY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,  # tokens of a sequence counted at a time
):
    program = tl.program_id(0)
    if program < num_tiles:
        _, _, carries, active, _, _ = _tile(
            advantages, importance, mask, cu_seqlens, program, num_tokens, num_sequences, steps,
            PER_TOKEN, EVERY_ROW, False, BLOCK,
        )  # fmt: skip
        tl.store(tile_counts + program, tl.sum(active.to(tl.int32), 0))
        tl.store(tile_counts + num_tiles + program, tl.sum(carries.to(tl.int32), 0))
    elif lengths is not None:
        s = program - num_tiles
        begin = tl.load(cu_seqlens + s).to(tl.int32)
        end = tl.load(cu_seqlens + s + 1).to(tl.int32)
        counts = tl.zeros([STRIDE], tl.int32)
        for start in range(begin, end, STRIDE):
            t = start + tl.arange(0, STRIDE)
            counts += (tl.load(mask + t, mask=t < end, other=0) != 0).to(tl.int32)
        tl.store(lengths + s, tl.sum(counts, 0))


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_tiles", "steps"])
def _write_kernel(
    advantages,  # [S], or [T] if PER_TOKEN, Real
    importance,  # [T] Real or None
    mask,  # [T] one byte each, nonzero: carries loss; None: all do
    cu_seqlens,  # [S + 1] integers
    tile_counts,  # [2, num_tiles] int32
    lengths,  # [S] int32; None with SEQUENCE_MEAN: those of cu_seqlens
    normalizer,  # one number, or None
    weights,  # [T] Real, out
    token_advantages,  # [T] Real, out
    active_rows,  # [T] bool, out
    rows,  # [T] int64, out as far as there are active rows
    num_active,  # one int64, out
    num_tokens,
    num_sequences,
    num_tiles,
    steps,
    PER_TOKEN: tl.constexpr,
    EVERY_ROW: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr,
    TOKEN_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,  # tiles whose counts are summed at a time
):
    tile = tl.program_id(0)
    REAL: tl.constexpr = weights.dtype.element_ty
    before = tl.zeros([STRIDE], tl.int32)
    unmasked = tl.zeros([STRIDE], tl.int32)
    for start in range(0, num_tiles, STRIDE):
        i = start + tl.arange(0, STRIDE)
        before += tl.load(tile_counts + i, mask=i < tile, other=0)
        unmasked += tl.load(tile_counts + num_tiles + i, mask=i < num_tiles, other=0)
    first_row = tl.sum(before, 0)

    t, inside, carries, active, advantage, s = _tile(
        advantages, importance, mask, cu_seqlens, tile, num_tokens, num_sequences, steps,
        PER_TOKEN, EVERY_ROW, SEQUENCE_MEAN, BLOCK,
    )  # fmt: skip
    if normalizer is not None:
        denominator = tl.load(normalizer).to(REAL)
    else:
        counted = tl.sum(unmasked, 0) if TOKEN_MEAN else num_sequences
        denominator = tl.maximum(counted, 1).to(REAL)
    # Quotients of float32 numbers, rounded from float64: Triton's own division is not correctly rounded.
    weight = (1.0 / denominator.to(tl.float64)).to(REAL)
    if SEQUENCE_MEAN:
        if lengths is not None:
            length = tl.load(lengths + s, mask=inside, other=1)
        else:
            length = tl.load(cu_seqlens + s + 1, mask=inside, other=1) - tl.load(cu_seqlens + s, mask=inside, other=0)
        weight = (weight.to(tl.float64) / tl.maximum(length, 1).to(REAL).to(tl.float64)).to(REAL)
    tl.store(weights + t, tl.where(carries, weight, 0.0), mask=inside)
    tl.store(token_advantages + t, advantage, mask=inside)
    tl.store(active_rows + t, active, mask=inside)

    last_row = first_row + tl.cumsum(active.to(tl.int32), 0)
    tl.store(rows + last_row - 1, t.to(tl.int64), mask=active)
    if tile == num_tiles - 1:
        tl.store(num_active, (first_row + tl.sum(active.to(tl.int32), 0)).to(tl.int64))


# By occupancy arithmetic, not measured: 64 programs for 32768 tokens, and the counts of 2^20 tokens' tiles are 16 KB.
BLOCK = 512
STRIDE = 1024
SEQUENCE_STRIDE = 4096
NUM_WARPS = 4


def token_rows(
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None,
    importance: Tensor | None,
    normalizer: Tensor | None,
    aggregation: str,
    every_row: bool,
    weights: Tensor,
    token_advantages: Tensor,
    active: Tensor,
    rows: Tensor,
    num_active: Tensor,
) -> None:
    """Write weights, advantages and active rows of T packed tokens; safe to capture in a CUDA graph.

    Args:
        advantages: `[S]`, or else one a token, `[T]`; float32 or float64. importance: `[T]`, the same dtype.
        cu_seqlens: `[S+1]` int32 or int64, from 0 to T without decreasing.
        mask: `[T]` bool or uint8; None: every token carries loss.
        normalizer: one number of any dtype on the device; replaces D.
        aggregation: "sequence_mean", "sequence_sum" or "token_mean".
        weights, token_advantages: `[T]` in the advantages' dtype, out; 0 where masked.
        active: `[T]` bool, out. rows: `[T]` int64, out; what stands after the active rows is not written.
        num_active: 0-dim int64, out.
    """
    if weights.numel() == 0:
        num_active.zero_()
        return
    count = _count_arguments(advantages, cu_seqlens, mask, importance, weights.numel(), aggregation, every_row)
    outputs = {
        "weights": weights,
        "token_advantages": token_advantages,
        "active_rows": active,
        "rows": rows,
        "num_active": num_active,
    }
    num_tiles, lengths = count["num_tiles"], count["lengths"]
    programs = num_tiles if lengths is None else num_tiles + lengths.numel()
    launch(_count_kernel, (programs,), count, weights.device)
    launch(_write_kernel, (num_tiles,), _write_arguments(count, normalizer, aggregation, outputs), weights.device)


def _count_arguments(
    advantages: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    importance: Tensor | None,
    num_tokens: int,
    aggregation: str,
    every_row: bool,
) -> dict[str, Any]:
    num_tiles, num_sequences = triton.cdiv(num_tokens, BLOCK), cu_seqlens.numel() - 1
    lengths = None
    if aggregation == "sequence_mean" and mask is not None:
        lengths = cu_seqlens.new_empty(num_sequences, dtype=torch.int32)
    return {
        "advantages": advantages,
        "importance": importance,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
        "tile_counts": cu_seqlens.new_empty((2, num_tiles), dtype=torch.int32),
        "lengths": lengths,
        "num_tokens": num_tokens,
        "num_sequences": num_sequences,
        "num_tiles": num_tiles,
        "steps": (num_sequences - 1).bit_length(),
        "PER_TOKEN": tuple(advantages.shape) != (num_sequences,),
        "EVERY_ROW": every_row,
        "BLOCK": BLOCK,
        "STRIDE": SEQUENCE_STRIDE,
        "num_warps": NUM_WARPS,
    }


def _write_arguments(
    count: dict[str, Any], normalizer: Tensor | None, aggregation: str, outputs: dict[str, Tensor]
) -> dict[str, Any]:
    """Those of the first launch, and where the results go."""
    means = {"SEQUENCE_MEAN": aggregation == "sequence_mean", "TOKEN_MEAN": aggregation == "token_mean"}
    return count | outputs | means | {"normalizer": normalizer, "STRIDE": STRIDE}


def aot_configurations() -> Iterator[Configuration]:
    """Every aggregation, with all that is optional and with nothing, and both dtypes."""
    cases = [("sequence_mean", True), ("sequence_mean", False), ("sequence_sum", True), ("token_mean", True)]
    for (aggregation, full), dtype in [(case, torch.float32) for case in cases] + [(cases[0], torch.float64)]:
        tokens, sequences, number = (torch.empty(size, dtype=dtype, device="meta") for size in (4096, 16, ()))
        mask, importance = (tokens.bool(), tokens) if full else (None, None)
        indices = tokens.long()
        count = _count_arguments(
            sequences if full else tokens, indices[:17], mask, importance, 4096, aggregation, every_row=not full
        )
        outputs = {"weights": tokens, "token_advantages": tokens, "active_rows": tokens.bool()}
        outputs |= {"rows": indices, "num_active": number.long()}
        write = _write_arguments(count, None if full else number.double(), aggregation, outputs)
        case = f"{aggregation} {'full' if full else 'bare'} {str(dtype).removeprefix('torch.')}"
        yield Configuration.of_launch(f"count {case}", _count_kernel, count)
        yield Configuration.of_launch(f"write {case}", _write_kernel, write)
