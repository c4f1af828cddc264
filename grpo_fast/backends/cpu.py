"""The `cpu` backend: row functions in C++ (csrc/), bf16 products by the micro-kernel inside torch's CPU library.

    logits, dx       float32; dx is bf16 over the same memory where bf16 products exist
    gemm_*           csrc/gemm_cpu.h; elsewhere (float32; narrow operands without the instructions) torch's products
    row_*            csrc/row_cpu.h, one row a thread, AVX-512, AVX2 or baseline instructions chosen at run time
    sparse_*         csrc/sparse_cpu.h, the same on rows' supports: gathered rows of the weight

Chunks are as large as the workspace allows, since each packs the whole weight: on two EPYC cores the full step at T =
2048, V = 49152 took 0.59, 0.54 and 0.51 s with 64, 128 and 256 MiB, at T = 1024, V = 151936 2.0, 1.7 and 1.3 s.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from grpo_fast.backends.base import (
    GroupFunctions,
    NativeRows,
    ObjectiveResults,
    RowChunk,
    RowIds,
    RowObjective,
    RowSlopes,
    RowStatistics,
    addresses,
    native_dtype,
    native_objective,
)
from grpo_fast.backends.torch import TorchBackend
from grpo_fast.install import load_extension, not_built
from grpo_fast.packing import offsets_of

# After torch: the two share one OpenMP runtime, and gemm_cpu.cpp looks into torch's library.
_C, _missing = load_extension("grpo_fast._C")

TILE_ROWS = 64
"""Rows of a logits product; any number gives the same bits, so this only rounds chunks."""
HUGE_BYTES = 2**24
"""Of a buffer for which large pages are asked: touching 256 MiB first takes 7 ms with them, 48 without."""


def native() -> Any:
    """The extension module, or None where it is not built."""
    return _C


class CpuBackend(TorchBackend):
    """See the module. What is not overridden, or not offered for a dtype, is the torch backend's."""

    name = "cpu"

    def why_unavailable(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "its functions run on the CPU; use triton, cuda or torch"
        if _C is None:
            return not_built("grpo_fast._C", _missing, "a C++17 compiler", "GRPO_FAST_CPU")
        return None

    def row_scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        return 4 * vocab  # a float32 bias

    def product_scratch_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        if not _multiplies(dtype):
            return super().product_scratch_bytes(dtype, device)
        return int(_C.GEMM_SCRATCH_PER_THREAD) * torch.get_num_threads()

    def preferred_tile_rows(self, dtype: torch.dtype, device: torch.device) -> int:
        return TILE_ROWS if _multiplies(dtype) else super().preferred_tile_rows(dtype, device)

    def new_buffer(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        buffer = super().new_buffer(like, shape, dtype)
        if buffer.nbytes >= HUGE_BYTES:
            _C.advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
        return buffer

    # -- products ----------------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor, tile_rows: int) -> None:
        if not _multiplies(hidden.dtype):
            super().logits(hidden, weight, out, tile_rows)
            return
        hidden, weight = hidden.contiguous(), weight.contiguous()
        scratch, threads = _scratch(hidden)
        _C.gemm_logits(
            _dtype(hidden.dtype),
            **addresses(hidden=hidden, weight=weight, out=out, scratch=scratch),
            rows=hidden.shape[0],
            width=hidden.shape[1],
            vocab=weight.shape[0],
            out_stride=out.stride(0),
            threads=threads,
        )

    def grad_hidden(self, dx: Tensor, weight: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        if not _multiplies(dx.dtype):
            super().grad_hidden(dx, weight, out, accumulate=accumulate)
            return
        weight = weight.contiguous()
        if not accumulate:
            out.zero_()
        scratch, threads = _scratch(out)
        _C.gemm_grad_hidden(
            _dtype(dx.dtype),
            **addresses(dx=dx, weight=weight, out=out, scratch=scratch),
            rows=dx.shape[0],
            width=weight.shape[1],
            vocab=weight.shape[0],
            dx_stride=dx.stride(0),
            threads=threads,
        )

    def grad_weight(self, dx: Tensor, hidden: Tensor, out: Tensor, base: Tensor | None) -> None:
        if not _multiplies(dx.dtype):
            super().grad_weight(dx, hidden, out, base)
            return
        hidden = hidden.contiguous()
        scratch, threads = _scratch(hidden)
        packed = hidden.new_empty(_C.gemm_packed_bytes(*hidden.shape), dtype=torch.uint8)
        _C.gemm_grad_weight(
            _dtype(dx.dtype),
            **addresses(dx=dx, hidden=hidden, base=base, out=out, packed=packed, scratch=scratch),
            narrow_out=out.dtype != torch.float32,
            rows=dx.shape[0],
            width=hidden.shape[1],
            vocab=dx.shape[1],
            dx_stride=dx.stride(0),
            threads=threads,
        )

    def dx_place(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """A narrow row takes the first half of its own logits."""
        return logits.view(dtype if _multiplies(dtype) else torch.float32)[:, : logits.shape[1]]

    # -- products on supports ----------------------------------------------------------------------------------------

    def sparse_share(self, dtype: torch.dtype, device: torch.device) -> int:
        # Where a step of sparse rows costs what one of masked rows does. On two AVX-512 cores (EPYC), bf16, T = 1024,
        # H = 576, V = 49152: 0.14 us an entry of a sparse row, 0.6 ms and 0.1 us an entry a masked one (growth.json of
        # benchmarks/results/*/support; 0.3 ms where the host is quiet), and a whole tile, 40 ms, for the first of them.
        # In float32, which torch multiplies, an entry takes 0.27 us and a dense row 1.4 ms.
        return 8 if _multiplies(dtype) else 6

    # Torch serves matrices with gaps, which C++ would have copied whole.

    def sparse_logits(self, hidden: Tensor, weight: Tensor, of: RowIds, out: Tensor) -> None:
        if not weight.is_contiguous():
            super().sparse_logits(hidden, weight, of, out)
            return
        native = NativeSupports(hidden, weight, of)
        _C.sparse_logits(native.operands, native.supports, **addresses(out=out), threads=torch.get_num_threads())

    def sparse_grad_hidden(self, dx: Tensor, weight: Tensor, of: RowIds, out: Tensor) -> None:
        if not (weight.is_contiguous() and out.is_contiguous()):
            super().sparse_grad_hidden(dx, weight, of, out)
            return
        native = NativeSupports(None, weight, of)
        _C.sparse_grad_hidden(
            native.operands,
            native.supports,
            **addresses(dx=dx, out=out),
            out_dtype=_dtype(out.dtype),
            threads=torch.get_num_threads(),
        )

    def sparse_grad_weight(self, dx: Tensor, hidden: Tensor, of: RowIds, out: Tensor) -> None:
        if not out.is_contiguous():
            super().sparse_grad_weight(dx, hidden, of, out)
            return
        native, num_entries = NativeSupports(hidden, None, of), of.ids.numel()
        scratch = of.ids.new_empty(_C.sparse_sort_bytes(num_entries), dtype=torch.uint8)
        _C.sparse_grad_weight(
            native.operands,
            **addresses(dx=dx, ids=of.ids, rows=of.rows, out=out, scratch=scratch),
            num_entries=num_entries,
            vocab=out.shape[0],
            out_dtype=_dtype(out.dtype),
            threads=torch.get_num_threads(),
        )

    def sparse_objective(
        self,
        hidden: Tensor,
        weight: Tensor,
        of: RowIds,
        rows: RowChunk,
        objective: RowObjective,
        results: ObjectiveResults,
        grad_hidden: Tensor | None,
    ) -> Tensor:
        gaps = not (weight.is_contiguous() and (grad_hidden is None or grad_hidden.is_contiguous()))
        if (kernel := objective.kernel) is None or gaps:
            return super().sparse_objective(hidden, weight, of, rows, objective, results, grad_hidden)
        native, native_rows, kept = NativeSupports(hidden, weight, of), NativeRows(_C, rows), objective.tensors()
        _C.sparse_objective(
            native.operands,
            native.supports,
            native_rows.native,
            native_objective(_C, kernel),
            **addresses(**kept, **results._asdict(), grad_hidden=grad_hidden),
            **_factors(objective),
            grad_hidden_dtype=_dtype(torch.float32 if grad_hidden is None else grad_hidden.dtype),
            threads=torch.get_num_threads(),
        )
        return rows.logits

    # -- row functions -----------------------------------------------------------------------------------------------

    def statistics(self, rows: RowChunk, out: RowStatistics) -> None:
        native_rows = NativeRows(_C, rows)
        _C.row_statistics(
            native_rows.native, **addresses(offsets=rows.offsets, **out._asdict()), threads=torch.get_num_threads()
        )

    def gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        native_rows, kept = NativeRows(_C, rows), slopes.tensors()
        _C.row_gradient(
            native_rows.native,
            **addresses(offsets=rows.offsets, **kept),
            vocab_start=rows.vocab_start,
            dtype=_dtype(_dx_dtype(rows, dtype)),
            threads=torch.get_num_threads(),
        )
        return self._dx(rows, dtype, out)

    def objective_rows(
        self,
        rows: RowChunk,
        objective: RowObjective,
        results: ObjectiveResults,
        *,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        if (kernel := objective.kernel) is None:
            return super().objective_rows(rows, objective, results, dtype=dtype, out=out)
        native_rows, kept = NativeRows(_C, rows), objective.tensors()
        _C.row_objective(
            native_rows.native,
            native_objective(_C, kernel),
            **addresses(offsets=rows.offsets, **kept, **results._asdict()),
            **_factors(objective),
            dtype=_dtype(_dx_dtype(rows, dtype)),
            threads=torch.get_num_threads(),
        )
        return self._dx(rows, dtype, out)

    def _dx(self, rows: RowChunk, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """Where C++ left it, or in `out`."""
        dx = rows.logits if rows.offsets is not None else self.dx_place(rows.logits, dtype)
        return dx if out is None else out.copy_(dx)

    def group_functions(self) -> GroupFunctions:
        return GroupFunctions(_group_advantages, _token_rows)


def _group_advantages(
    rewards: Tensor,
    *,
    factors: Tensor | None,
    group_size: int | None,
    order: Tensor | None,
    labels: Tensor | None,
    scale: str,
    aggregation: str,
) -> Tensor:
    rewards, order = rewards.contiguous(), None if order is None else order.contiguous()
    weights = None if factors is None else factors.double().contiguous()
    offsets = None
    if labels is not None:
        offsets = offsets_of(torch.unique_consecutive(labels, return_counts=True)[1])
    out = rewards.new_empty(rewards.shape[0])
    _C.group_advantages(
        _dtype(rewards.dtype),
        **addresses(rewards=rewards, weights=weights, order=order, offsets=offsets, out=out),
        num_completions=rewards.shape[0],
        num_rewards=rewards.shape[1],
        group_size=group_size or 0,
        num_groups=0 if offsets is None else offsets.numel() - 1,
        scale=getattr(_C.AdvantageScale, scale),
        aggregation=getattr(_C.RewardAggregation, aggregation),
    )
    return out


def _token_rows(
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    normalizer: Tensor | None,
    aggregation: str,
    every_row: bool,
    num_active: Tensor,
    **tensors: Tensor | None,
) -> None:
    num_sequences = cu_seqlens.numel() - 1
    weights = tensors["weights"]
    assert weights is not None
    count = _C.token_rows(
        _dtype(advantages.dtype),
        **addresses(advantages=advantages, cu_seqlens=cu_seqlens, **tensors),
        num_sequences=num_sequences,
        num_tokens=weights.numel(),
        advantages_per_token=advantages.numel() != num_sequences,
        aggregation=getattr(_C.TokenAggregation, aggregation),
        normalizer=None if normalizer is None else float(normalizer),
        every_row=every_row,
    )
    num_active.fill_(count)


def _dtype(dtype: torch.dtype) -> Any:
    return native_dtype(_C, dtype)


@cache
def gemm_obstacle(dtype: torch.dtype) -> str | None:
    """Why torch multiplies operands of `dtype`, or None where `_C` does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return "torch's own products do"
    obstacle: str | None = _C.gemm_obstacle(_dtype(dtype))
    return obstacle


def _multiplies(dtype: torch.dtype) -> bool:
    return gemm_obstacle(dtype) is None


def _dx_dtype(rows: RowChunk, dtype: torch.dtype) -> torch.dtype:
    """Of dx for operands of `dtype`: narrow where narrow products exist, float32 for torch's and for rows' supports."""
    return dtype if rows.offsets is None and _multiplies(dtype) else torch.float32


def _factors(objective: RowObjective) -> dict[str, float]:
    return {
        "entropy_gradient": -objective.config.entropy_coef / float(objective.tokens.bonus_count),
        "grad_scale": 1.0 if objective.grad_scale is None else float(objective.grad_scale),
    }


class NativeSupports:
    """Rows' supports and what is gathered for them as C++ takes them, and what the addresses point to."""

    def __init__(self, hidden: Tensor | None, weight: Tensor | None, of: RowIds) -> None:
        hidden = None if hidden is None else hidden.contiguous()
        like = hidden if weight is None else weight
        assert like is not None
        self.kept = (hidden, weight, of)
        self.operands = _C.Operands(
            **addresses(hidden=hidden, weight=weight), dtype=_dtype(like.dtype), width=like.shape[1]
        )
        self.supports = _C.Supports(**addresses(ids=of.ids, offsets=of.offsets), num_rows=of.offsets.numel() - 1)


def _scratch(like: Tensor) -> tuple[Tensor, int]:
    threads = torch.get_num_threads()
    return like.new_empty(threads * _C.GEMM_SCRATCH_PER_THREAD, dtype=torch.uint8), threads
