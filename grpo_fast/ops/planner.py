"""Which execution plan to run, and how many rows a chunk may have under the workspace cap.

Legend: T tokens (rows), H hidden size, V vocabulary, R rows of a chunk.

| plan          | when                                                      | GEMM FLOPs |
|---------------|-----------------------------------------------------------|------------|
| `single_pass` | token-local objective                                     | 6 T H V    |
| `frozen_head` | neither weight nor bias needs a gradient                  | 4 T H V    |
| `resident`    | objective within sequences, each sequence fits in a chunk | 6 T H V    |
| `recompute`   | always                                                    | 8 T H V    |
| `lean`        | always; recompute without a float32 `[V, H]` accumulator  | 8 T H V    |
| `forward`     | nothing needs a gradient                                  | 2 T H V    |
| `fused_forward` | on request, nothing needs a gradient                    | 2 T H V    |

`fused_forward` (backend triton) takes the statistics inside the product and never writes a logit. It sums in another
order than the library's GEMM, so that a pass compared with a gradient pass, as old logprobs are, would no longer agree
with it bit for bit: "auto" never takes it, a caller may for reference logprobs. Predicted on an H200: ahead where H is
below about 1700 (kernels/PREDICTIONS.md); not measured.

`resident` is `single_pass` on chunks of whole sequences: a chunk's float32 logits stay until the sequence-level
quantities of its rows are known. (Keeping logits rather than unscaled gradients lets one pair of row functions serve
every plan and the entropy gradient, and rows found clipped can still leave before the backward GEMMs.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.backends.base import Backend, get_backend
from grpo_fast.backends.devices import traits

logger = logging.getLogger("grpo_fast")

PLANS = ("single_pass", "frozen_head", "resident", "recompute", "lean", "fused_forward")
MIN_TILE_ROWS = 16
_reported: set[tuple[object, ...]] = set()


class RowBudget(NamedTuple):
    """Rows the workspace holds.

    Attributes:
        tile_rows: rows of every logits GEMM. It depends on V, H, dtype and workspace, never on T, the plan or the
            compaction, so that all passes over the same weights compute a row with the same instructions.
        chunk_rows: rows whose logits are held at once where they fill the workspace, a multiple of `tile_rows`.
        staged_rows: rows of dx in a buffer of its own beside `num_buffers` tiles of logits, a multiple of `tile_rows`;
            0 where dx always goes over the logits.
        num_buffers: tiles of logits beside a staged dx.
    """

    tile_rows: int
    chunk_rows: int
    staged_rows: int = 0
    num_buffers: int = 1

    @property
    def rows_at_once(self) -> int:
        """Rows of a chunk of an objective that couples no rows."""
        return self.staged_rows or self.chunk_rows


class _Tuning(NamedTuple):
    """What a benchmark may set; None: as it comes."""

    tile_rows: int | None = None
    row_stream: bool | None = None


_tuning = _Tuning()


@contextmanager
def tuning(*, tile_rows: int | None = None, row_stream: bool | None = None) -> Iterator[None]:
    """For benchmarks and tests: other rows a logits product, and row functions on a second stream or not.

    Args:
        tile_rows: a power of two, at least 16. row_stream: see `row_stream_wanted`.
    """
    global _tuning
    if tile_rows is not None and (tile_rows < MIN_TILE_ROWS or tile_rows & (tile_rows - 1)):
        raise ValueError(f"tile_rows: expected a power of two, at least {MIN_TILE_ROWS}; got {tile_rows}")
    before, _tuning = _tuning, _Tuning(tile_rows, row_stream)
    try:
        yield
    finally:
        _tuning = before


def row_stream_wanted() -> bool:
    """Whether row functions run on a second stream beside the products, which has yet to be measured: off by default.

    GRPO_FAST_ROW_STREAM=1 turns it on. A product that fills the multiprocessors leaves little for a second stream.
    """
    return os.environ.get("GRPO_FAST_ROW_STREAM") == "1" if _tuning.row_stream is None else _tuning.row_stream


MEMORY_SHARE = 16
LEAST_WORKSPACE, MOST_WORKSPACE = 2**29, 2**32


def default_workspace_bytes(device: torch.device) -> int:
    """A sixteenth of a GPU's memory, from 512 MiB to 4 GiB; 256 MiB elsewhere.

    Of all its memory, not of what is free: rows of a product, and so bits, would depend on what else is there.
    """
    memory = traits(device).total_memory(device)
    return 2**28 if memory is None else min(max(memory // MEMORY_SHARE, LEAST_WORKSPACE), MOST_WORKSPACE)


def _row_bytes(engine: Backend, vocab: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of a row of logits, float32 (float64 for float64 inputs), and of a row of dx with a place of its own, if any."""
    pitch = engine.row_pitch(vocab)
    return pitch * max(4, dtype.itemsize), pitch * dtype.itemsize * engine.stages_dx


def least_workspace_bytes(backend: str, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """The smallest workspace that a backend takes: one tile of the fewest rows."""
    engine = get_backend(backend)
    return engine.scratch_bytes(vocab, dtype, device) + MIN_TILE_ROWS * sum(_row_bytes(engine, vocab, dtype))


@torch.compiler.assume_constant_result  # plain values in and out: nothing for a compiler to trace
def row_budget(
    backend: str, vocab: int, width: int, dtype: torch.dtype, device: torch.device, workspace_bytes: int
) -> RowBudget:
    """Turn the workspace cap into rows, for a `[vocab, width]` head.

    Raises:
        ValueError: the workspace does not hold the smallest tile.
    """
    engine = get_backend(backend)
    row_bytes, staged_bytes = _row_bytes(engine, vocab, dtype)
    least = least_workspace_bytes(backend, vocab, dtype, device)
    if workspace_bytes < least:
        raise ValueError(
            f"workspace_bytes: expected at least {least} for a vocabulary of {vocab} and backend {backend!r}; "
            f"got {workspace_bytes}"
        )
    available = workspace_bytes - engine.scratch_bytes(vocab, dtype, device)
    tile_rows = _tuning.tile_rows or engine.preferred_tile_rows(dtype, device)
    # Two tiles at least: whole tiles leave little room unused, or half of the room for dx. Tiles of more than 512 rows,
    # which near the memory's bandwidth at small H, only where dx keeps three quarters.
    while tile_rows > max(available // row_bytes // (4 if tile_rows > 512 else 2), MIN_TILE_ROWS):
        tile_rows //= 2
    chunk_rows = available // row_bytes // tile_rows * tile_rows
    if not engine.stages_dx:
        return RowBudget(tile_rows, chunk_rows)
    two = row_stream_wanted() and traits(device).streams is not None and 4 * tile_rows * row_bytes <= available
    num_buffers = 2 if two else 1
    staged_rows = (available - num_buffers * tile_rows * row_bytes) // staged_bytes // tile_rows * tile_rows
    return RowBudget(tile_rows, chunk_rows, staged_rows, num_buffers)


@dataclass(frozen=True)
class Demand:
    """What a call asks of the planner.

    Attributes:
        needs_grad, needs_weight_grad: whether anything, and whether weight or bias, needs a gradient.
        couples_tokens, couples_sequences: of the objective; both True when it is not known (`token_logprobs`).
        entropy_grad: the entropy is known to need a gradient.
        longest: rows of the longest sequence, or None if the host does not know it.
        fused_forward: whether the backend has that plan.
    """

    needs_grad: bool
    needs_weight_grad: bool
    couples_tokens: bool
    couples_sequences: bool
    entropy_grad: bool
    longest: int | None
    fused_forward: bool


def choose_plan(plan: str, demand: Demand, budget: RowBudget) -> str:
    """The plan to run: the cheapest that fits for "auto", otherwise the one asked for.

    Raises:
        ValueError: unknown plan, or one that cannot serve this call (with the reason).
    """
    if plan != "auto" and plan not in PLANS:
        raise ValueError(f"plan: expected auto or one of {', '.join(PLANS)}; got {plan!r}")
    obstacle = None if plan == "auto" else _obstacle(plan, demand, budget)
    if obstacle is not None:
        raise ValueError(f"plan: {plan!r} cannot serve this call: {obstacle}")
    if not demand.needs_grad:
        return "fused_forward" if plan == "fused_forward" else "forward"
    if plan != "auto":
        return plan
    # With an entropy gradient the frozen head would have to recompute: 6 T H V at best.
    frozen = () if demand.entropy_grad else ("frozen_head",)
    candidates = (*frozen, "single_pass", "resident", "recompute")
    return next(name for name in candidates if _obstacle(name, demand, budget) is None)


def _obstacle(plan: str, demand: Demand, budget: RowBudget) -> str | None:
    """Why `plan` cannot serve the call, or None."""
    if plan == "single_pass" and demand.couples_tokens:
        return "the objective couples tokens, so a row's gradient is not known when its logits are"
    if plan == "fused_forward":
        if demand.needs_grad:
            return "it keeps nothing for a backward, and hidden or weight needs a gradient; use torch.no_grad()"
        if not demand.fused_forward:
            return "only the backend 'triton' has it"
    if plan == "frozen_head" and demand.needs_grad and demand.needs_weight_grad:
        return "weight or bias needs a gradient"
    if plan == "resident":
        if demand.couples_sequences:
            return "the objective couples sequences (or is not known yet)"
        if demand.longest is None:
            return "sequence lengths are not known on the host while compiling"
        if demand.longest > budget.chunk_rows:
            return (
                f"the longest sequence has {demand.longest} rows and the workspace holds {budget.chunk_rows}; "
                "raise workspace_bytes or use recompute"
            )
    return None


def report(plan: str, backend: str, weight: Tensor, budget: RowBudget) -> None:
    """Log the choice, once per shape."""
    facts = (plan, backend, weight.shape, weight.dtype, budget)
    if facts not in _reported:
        _reported.add(facts)
        logger.info(
            "plan %s on backend %s: weight %s %s, tiles of %d rows, chunks of at most %d (dx of %d beside %d tiles)",
            *facts[:2],
            list(weight.shape),
            weight.dtype,
            *budget,
        )
