"""One call of the LM head: its operands, which rows are computed, by which plan, and how many at a time.

Legend: T packed tokens, n rows that are computed (the others keep zeros), H hidden size, V vocabulary.

| plan          | when                                                      | product FLOPs |
|---------------|-----------------------------------------------------------|---------------|
| `single_pass` | token-local objective                                     | 6 T H V       |
| `frozen_head` | neither weight nor bias needs a gradient                  | 4 T H V       |
| `resident`    | objective within sequences, each sequence fits in a chunk | 6 T H V       |
| `recompute`   | always                                                    | 8 T H V       |
| `lean`        | always; recompute without a float32 `[V, H]` accumulator  | 8 T H V       |
| `forward`     | nothing needs a gradient                                  | 2 T H V       |
| `fused_forward` | on request, nothing needs a gradient                    | 2 T H V       |

`fused_forward` (backend triton) takes the statistics inside the product and never writes a logit. It sums in another
order than the library's product, so that a pass compared with a gradient pass, as old logprobs are, would no longer
agree with it bit for bit: "auto" never takes it, a caller may for reference logprobs. Predicted on an H200: ahead where
H is below about 1700 (kernels/PREDICTIONS.md); not measured.

`resident` is `single_pass` on chunks of whole sequences: a chunk's float32 logits stay until the sequence-level
quantities of its rows are known. (Keeping logits rather than unscaled gradients lets one pair of row functions serve
every plan and the entropy gradient, and rows found clipped can still leave before the backward products.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from grpo_fast.backends.base import Backend, Transform, get_backend
from grpo_fast.config import HeadConfig
from grpo_fast.devices import TRAITS
from grpo_fast.losses import Segments
from grpo_fast.objectives import Scope
from grpo_fast.ops.support import Split, Supported, split_rows
from grpo_fast.packing import Support

logger = logging.getLogger("grpo_fast")

PlanName = Literal["auto", "single_pass", "frozen_head", "resident", "recompute", "lean", "fused_forward"]
PLANS: tuple[str, ...] = get_args(PlanName)[1:]
MIN_TILE_ROWS = 16
_reported: set[tuple[object, ...]] = set()
_head_config = lru_cache(maxsize=64)(HeadConfig)


# -- how many rows ----------------------------------------------------------------------------------------------------


class RowBudget(NamedTuple):
    """Rows the workspace holds.

    Attributes:
        tile_rows: rows of every logits product. It depends on V, H, dtype and workspace, never on T, the plan or the
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


_tuning: dict[str, Any] = {"tile_rows": None, "row_stream": None}


@contextmanager
def tuning(*, tile_rows: int | None = None, row_stream: bool | None = None) -> Iterator[None]:
    """For benchmarks and tests: other rows a logits product, and row functions on a second stream or not.

    Args:
        tile_rows: a power of two, at least 16. row_stream: see `row_stream_wanted`.
    """
    if tile_rows is not None and (tile_rows < MIN_TILE_ROWS or tile_rows & (tile_rows - 1)):
        raise ValueError(f"tile_rows: expected a power of two, at least {MIN_TILE_ROWS}; got {tile_rows}")
    before = dict(_tuning)
    _tuning.update(tile_rows=tile_rows, row_stream=row_stream)
    try:
        yield
    finally:
        _tuning.update(before)


def row_stream_wanted() -> bool:
    """Whether row functions run on a second stream beside the products, which has yet to be measured: off by default.

    GRPO_FAST_ROW_STREAM=1 turns it on. A product that fills the multiprocessors leaves little for a second stream.
    """
    asked: bool | None = _tuning["row_stream"]
    return os.environ.get("GRPO_FAST_ROW_STREAM") == "1" if asked is None else asked


MEMORY_SHARE = 16
LEAST_WORKSPACE, MOST_WORKSPACE = 2**29, 2**32


def default_workspace_bytes(device: torch.device) -> int:
    """A sixteenth of a GPU's memory, from 512 MiB to 4 GiB; 256 MiB elsewhere.

    Of all its memory, not of what is free: rows of a product, and so bits, would depend on what else is there.
    """
    memory = TRAITS[device.type].total_memory
    return 2**28 if memory is None else min(max(memory(device) // MEMORY_SHARE, LEAST_WORKSPACE), MOST_WORKSPACE)


def _row_bytes(engine: Backend, vocab: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of a row of logits, float32 (float64 for float64 inputs), and of a row of dx with a place of its own, if any."""
    pitch = engine.row_pitch(vocab)
    return pitch * max(4, dtype.itemsize), pitch * dtype.itemsize * engine.stages_dx


def workspace_for(backend: str, vocab: int, dtype: torch.dtype, device: torch.device, rows: int = MIN_TILE_ROWS) -> int:
    """Bytes of a workspace that holds `rows` rows of logits, and of dx where that is beside them; 16 is the least."""
    engine = get_backend(backend)
    return engine.scratch_bytes(vocab, dtype, device) + rows * sum(_row_bytes(engine, vocab, dtype))


@torch.compiler.assume_constant_result  # plain values in and out: nothing for a compiler to trace
def row_budget(
    backend: str, vocab: int, width: int, dtype: torch.dtype, device: torch.device, workspace_bytes: int
) -> RowBudget:
    """Turn the workspace cap into rows, for a `[vocab, width]` head.

    Raises:
        ValueError: the workspace does not hold the smallest tile.
    """
    engine, kind = get_backend(backend), TRAITS[device.type]
    row_bytes, staged_bytes = _row_bytes(engine, vocab, dtype)
    least = workspace_for(backend, vocab, dtype, device)
    if workspace_bytes < least:
        raise ValueError(
            f"workspace_bytes: expected at least {least} for a vocabulary of {vocab} and backend {backend!r}; "
            f"got {workspace_bytes}"
        )
    available = workspace_bytes - engine.scratch_bytes(vocab, dtype, device)
    tile_rows = _tuning["tile_rows"] or engine.preferred_tile_rows(dtype, device)
    # Two tiles at least: whole tiles leave little room unused, or half of the room for dx. Tiles of more than 512 rows,
    # which near the memory's bandwidth at small H, only where dx keeps three quarters.
    while tile_rows > max(available // row_bytes // (4 if tile_rows > 512 else 2), MIN_TILE_ROWS):
        tile_rows //= 2
    chunk_rows = available // row_bytes // tile_rows * tile_rows
    if not engine.stages_dx:
        return RowBudget(tile_rows, chunk_rows)
    two = row_stream_wanted() and kind.streams is not None and 4 * tile_rows * row_bytes <= available
    num_buffers = 2 if two else 1
    staged_rows = (available - num_buffers * tile_rows * row_bytes) // staged_bytes // tile_rows * tile_rows
    return RowBudget(tile_rows, chunk_rows, staged_rows, num_buffers)


@dataclass(frozen=True)
class ActiveRows:
    """The rows of the LM head to compute.

    Attributes:
        mask: `[T]` bool.
        listed: their indices, increasing, at the front of `[T]` int64, and how many there are, 0-dim int64; or None.
    """

    mask: Tensor
    listed: tuple[Tensor, Tensor] | None = None


# -- the call ---------------------------------------------------------------------------------------------------------


@dataclass
class HeadCall:
    """The LM head, the rows to compute, and how.

    Attributes:
        hidden: `[T, H]`. weight: `[V, H]`, same dtype. bias: `[V]` or None. targets: `[T]` int64.
        temperature: a float, or `[T]` float32.
        active: which rows to compute, or None for all.
        rows: `[n]` int64, their numbers; None: all, or to be found from `active` inside the operator.
        backend: its name, resolved. budget: rows at a time. plan: its name, once `planned`.
        support: of all T tokens, or None; where it is given the passes split the rows (`split`).
        masked: supports of the last of the `rows`, whose logits are masked; or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: float | Tensor
    head: HeadConfig
    active: ActiveRows | None
    backend: str
    budget: RowBudget
    rows: Tensor | None = None
    plan: str = ""
    support: Support | None = None
    masked: Supported | None = None

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float | Tensor,
        head: HeadConfig,
        active: ActiveRows | None,
        backend: str,
        workspace_bytes: int | None,
        support: Support | None = None,
    ) -> HeadCall:
        """From arguments of any shape prefix; None is the default workspace."""
        if workspace_bytes is None:
            workspace_bytes = default_workspace_bytes(hidden.device)
        return HeadCall(
            hidden=hidden.reshape(-1, hidden.shape[-1]),
            weight=weight,
            bias=bias,
            targets=_savable(targets.reshape(-1).long()),
            temperature=_savable(temperature.reshape(-1)) if isinstance(temperature, Tensor) else float(temperature),
            head=head,
            active=active,
            backend=backend,
            budget=row_budget(backend, *weight.shape, weight.dtype, weight.device, workspace_bytes),
            support=None if support is None else _savable_support(support),
        )

    def rows_of_sequences(self, segments: Segments, mask: Tensor) -> list[int] | None:
        """Computed rows of each sequence, on the host (a GPU is waited for once); None while compiling."""
        if torch.compiler.is_compiling():
            return None
        counts: list[int] = segments.sum(mask if self.active is None else self.active.mask).tolist()
        return counts

    def planned(
        self, plan: str, *, scope: Scope, entropy_grad: bool = False, row_counts: list[int] | None = None
    ) -> HeadCall:
        """The call with its plan and its rows.

        Args:
            scope: of the objective's slopes; "batch" where it is not known (`token_logprobs`).
            entropy_grad: the entropy is known to need a gradient.
            row_counts: computed rows of each sequence, where the host knows them.

        Raises:
            ValueError: unknown plan, or one that cannot serve this call (with the reason).
        """
        # An objective that does not couple tokens could be cut anywhere: sequences of one row.
        longest = 1 if scope == "row" else None if row_counts is None else max(row_counts, default=0)
        chosen = _choose(self, plan, scope, entropy_grad, longest)
        rows = self.rows
        if not torch.compiler.is_compiling():
            _report(chosen, self.backend, self.weight, self.budget)
            if self.active is not None:
                rows = listed_rows(self.active, -1 if row_counts is None else sum(row_counts))
        return replace(self, plan=chosen, rows=rows)

    def wants(self) -> list[bool]:
        """Whether hidden, weight and bias need gradients."""
        given = (self.hidden, self.weight, self.bias)
        return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in given]

    # -- through an operator, which takes no objects --

    def to_wire(self) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None], list[float], list[int], str]:
        """The call as the first arguments of every operator, in their order."""
        by_row = self.temperature if isinstance(self.temperature, Tensor) else None
        number = 1.0 if isinstance(self.temperature, Tensor) else self.temperature
        active = None if self.active is None else self.active.mask
        support = (None, None) if self.support is None else (self.support.token_ids, self.support.offsets)
        tensors = [self.targets, by_row, active, self.rows, *support]
        numbers = [number, float(self.head.logit_scale), float(self.head.softcap or 0.0)]
        budget = self.budget  # not unpacked: torch 2.11's compiler cannot iterate over it
        rows = [budget.tile_rows, budget.chunk_rows, budget.staged_rows, budget.num_buffers]
        return self.hidden, self.weight, self.bias, tensors, numbers, rows, f"{self.backend} {self.plan}"

    @staticmethod
    def from_wire(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: Sequence[Tensor | None],
        numbers: Sequence[float],
        budget: Sequence[int],
        names: str,
    ) -> HeadCall:
        """What `to_wire` was asked of, with the rows found."""
        targets, by_row, mask, rows, ids, offsets = tensors
        temperature, logit_scale, softcap = numbers
        backend, plan = names.split(" ")
        active = None if mask is None else ActiveRows(mask)
        assert targets is not None
        return HeadCall(
            hidden,
            weight,
            bias,
            targets,
            temperature if by_row is None else by_row,
            _head_config(logit_scale=logit_scale, softcap=softcap or None),
            active,
            backend,
            RowBudget(*budget),
            mask.nonzero()[:, 0] if rows is None and mask is not None else rows,
            plan,
            None if ids is None or offsets is None else Support.trusted(ids, offsets),
        )

    def split(self) -> Split | None:
        """The rows by kind; None where there are no supports."""
        if self.support is None:
            return None
        vocab, dtype = self.weight.shape[0], self.weight.dtype
        limit = self.engine.sparse_limit(vocab, dtype, self.hidden.device)
        return split_rows(self.support, self.rows, self.targets, vocab, limit)

    @property
    def engine(self) -> Backend:
        return get_backend(self.backend)

    @cached_property
    def row_targets(self) -> Tensor:
        """`[n]`."""
        return self.gather(self.targets)

    @cached_property
    def transform(self) -> Transform:
        """Of the computed rows: its temperature is a float or `[n]`."""
        temperature = self.temperature
        return Transform(
            self.head, self.bias, self.gather(temperature) if isinstance(temperature, Tensor) else temperature
        )

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0] if self.rows is None else self.rows.numel()

    @property
    def num_whole(self) -> int:
        """Of the rows, those whose logits are not masked, which come first."""
        return self.num_rows - (0 if self.masked is None else self.masked.places.numel())

    @property
    def accumulator(self) -> torch.dtype:
        """float32, or float64 for float64 inputs."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of the gradients handed back."""
        return grad_dtype(self.hidden.dtype)

    @property
    def scales_dx(self) -> bool:
        """Whether dx is held larger than it is, by `grad_scale`: float16, where a weight of 1/T would underflow."""
        return self.hidden.dtype == torch.float16

    def gather(self, values: Tensor) -> Tensor:
        """The computed rows `[n, ...]` of `[T, ...]` values."""
        return values if self.rows is None else values[self.rows]

    def scatter(self, values: Tensor) -> Tensor:
        """`[T, ...]` values from those of the computed rows; zero elsewhere."""
        if self.rows is None:
            return values
        return values.new_zeros(self.hidden.shape[0], *values.shape[1:]).index_copy_(0, self.rows, values)

    def new_rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """Memory `[n]` for a result of the row functions, in the accumulator's dtype by default."""
        return self.hidden.new_empty(self.num_rows, dtype=self.accumulator if dtype is None else dtype)

    def grad_scale(self, *slopes: Tensor | None) -> Tensor:
        """The power of two by which dx is held larger, 0-dim float32.

        It brings the largest of the rows' |dloss/dlogprob| and |dloss/dentropy| (of what is known of them), times the
        largest d z / d x, to between 1 and 2: 2^15 is left for ratios above 1.
        """
        largest = self.hidden.new_zeros((), dtype=torch.float32)
        if self.num_rows == 0:
            return largest + 1
        for slope in slopes:
            if slope is not None:
                known = torch.where(slope.isfinite(), slope.abs(), 0.0)
                largest = torch.maximum(largest, known.amax().float())
        temperature = self.transform.temperature
        sharpest = temperature.amin().float() if isinstance(temperature, Tensor) else temperature
        largest = largest * abs(self.head.logit_scale) / sharpest
        return torch.where(largest > 0, _power_of_two_over(largest), 1.0)


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the gradients that operators return: the inputs', but float32 for float16, which a loss scaler multiplies."""
    return torch.float32 if dtype == torch.float16 else dtype


def listed_rows(active: ActiveRows, num_rows: int = -1) -> Tensor | None:
    """Indices `[n]` of the rows; a GPU is waited for, once, unless the host knows how many there are.

    None where the operators may as well find them: they need not wait for a CPU.
    """
    if active.listed is not None:
        index, count = active.listed
        return index[: int(count) if num_rows < 0 else num_rows]
    if not TRAITS[active.mask.device.type].asynchronous:
        return None
    size = int(active.mask.sum()) if num_rows < 0 else num_rows
    return torch.nonzero_static(active.mask, size=size)[:, 0]


def _savable(tensor: Tensor) -> Tensor:
    """A rollout's tensors may be of `torch.inference_mode`, which autograd does not save: then a copy."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def _savable_support(support: Support) -> Support:
    return Support.trusted(_savable(support.token_ids), _savable(support.offsets))


def _power_of_two_over(largest: Tensor) -> Tensor:
    """The power of two s with 1 <= s largest < 2, exactly, within 2^-100 and 2^100; float32."""
    exponent = torch.frexp(largest).exponent  # largest = m 2^exponent, m in [1/2, 1)
    return ((128 - exponent.clamp(-99, 101)).to(torch.int32) << 23).view(torch.float32)


# -- which plan -------------------------------------------------------------------------------------------------------


def _choose(call: HeadCall, plan: str, scope: Scope, entropy_grad: bool, longest: int | None) -> str:
    """The plan to run: the cheapest that fits for "auto", otherwise the one asked for."""
    if plan != "auto" and plan not in PLANS:
        raise ValueError(f"plan: expected auto or one of {', '.join(PLANS)}; got {plan!r}")
    obstacle = None if plan == "auto" else _obstacle(call, plan, scope, longest)
    if obstacle is not None:
        raise ValueError(f"plan: {plan!r} cannot serve this call: {obstacle}")
    if not any(call.wants()):
        return "fused_forward" if plan == "fused_forward" else "forward"
    if plan != "auto":
        return plan
    # With an entropy gradient the frozen head would have to recompute: 6 T H V at best.
    frozen = () if entropy_grad else ("frozen_head",)
    candidates = (*frozen, "single_pass", "resident", "recompute")
    return next(name for name in candidates if _obstacle(call, name, scope, longest) is None)


def _obstacle(call: HeadCall, plan: str, scope: Scope, longest: int | None) -> str | None:
    """Why `plan` cannot serve the call, or None. `longest`: rows of the longest sequence, where the host knows it."""
    _, *head_wants = wants = call.wants()
    if plan == "single_pass" and scope != "row":
        return "the objective couples tokens, so a row's gradient is not known when its logits are"
    if plan == "fused_forward":
        if any(wants):
            return "it keeps nothing for a backward, and hidden or weight needs a gradient; use torch.no_grad()"
        if call.support is not None:
            return "it never writes logits that a support could mask"
        if not call.engine.has_fused_forward:
            return "only the backend 'triton' has it"
    if plan == "frozen_head" and any(head_wants):
        return "weight or bias needs a gradient"
    if plan == "resident":
        if call.support is not None:
            return "rows of a sequence are of different kinds where supports are given"
        if scope == "batch":
            return "the objective couples sequences (or is not known yet)"
        if longest is None:
            return "sequence lengths are not known on the host while compiling"
        if longest > call.budget.chunk_rows:
            return (
                f"the longest sequence has {longest} rows and the workspace holds {call.budget.chunk_rows}; "
                "raise workspace_bytes or use recompute"
            )
    return None


def _report(plan: str, backend: str, weight: Tensor, budget: RowBudget) -> None:
    """Log the choice, once per shape."""
    facts: tuple[Any, ...] = (plan, backend, weight.shape, weight.dtype, budget)
    if facts not in _reported:
        _reported.add(facts)
        logger.info(
            "plan %s on backend %s: weight %s %s, tiles of %d rows, chunks of at most %d (dx of %d beside %d tiles)",
            *facts[:2],
            list(weight.shape),
            weight.dtype,
            *budget,
        )
