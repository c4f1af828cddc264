"""The `triton` backend: row functions as Triton kernels (kernels/), products by cuBLAS through torch.

    logits   float32 from bf16 operands (`out_dtype`), in tiles of `tile_rows` rows
    row_*    kernels/row_*.py; one launch a tile, or for all rows on supports
    sparse_* kernels/sparse_*.py; no products
    dx       bf16 or fp16 in memory of its own, many tiles of it, so that the weight's gradient is added up rarely

Rows are padded to 64 elements, so that 16-byte accesses serve every vocabulary. Runs on NVIDIA sm_80 and up, and on the
CPU under Triton's interpreter (TRITON_INTERPRET=1), where `auto` never takes it.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from grpo_fast.backends.base import (
    GroupFunctions,
    ObjectiveResults,
    RowChunk,
    RowIds,
    RowObjective,
    RowSlopes,
    RowStatistics,
    Transform,
)
from grpo_fast.backends.torch import TorchBackend
from grpo_fast.devices import old_gpu, padded
from grpo_fast.objectives import KernelObjective


class TritonBackend(TorchBackend):
    """See the module. What is not overridden is the torch backend's."""

    name = "triton"
    stages_dx = has_fused_forward = True

    def why_unavailable(self, device: torch.device) -> str | None:
        if find_spec("triton") is None:
            return "Triton is not installed; pip install triton"
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if device.type != "cuda":
            return "its kernels run on NVIDIA GPUs (TRITON_INTERPRET=1 runs them on the CPU, slowly)"
        return old_gpu(device) or _why_not_running(device)

    def row_scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        return 0

    def row_pitch(self, vocab: int) -> int:
        return padded(vocab)

    def dx_place(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        from grpo_fast.kernels.rows import dx_over

        return dx_over(logits, dtype)

    def statistics(self, rows: RowChunk, out: RowStatistics) -> None:
        from grpo_fast.kernels.row_statistics import row_statistics_of

        row_statistics_of(_rows(rows), out)

    def gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        from grpo_fast.kernels.row_gradient import row_gradient_of

        chunk, dx = _rows(rows), self._dx(rows, dtype, out)
        row_gradient_of(chunk, **slopes.tensors(), dx=dx, vocab_start=rows.vocab_start)
        return dx

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
        from grpo_fast.kernels.row_objective import row_objective_of

        dx = self._dx(rows, dtype, out)
        row_objective_of(
            _rows(rows),
            _objective(kernel, rows.logits.device),
            objective.tensors(),
            dx,
            entropy_gradient=objective.entropy_slope(),
            grad_scale=objective.scale_tensor(),
            results=results,
        )
        return dx

    def _dx(self, rows: RowChunk, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """Where dx goes: of rows of their own lengths over the products, in float32."""
        if rows.offsets is not None:
            return rows.logits
        return self.dx_place(rows.logits, dtype) if out is None else out

    def sparse_share(self, dtype: torch.dtype, device: torch.device) -> int:
        """Predicted (kernels/PREDICTIONS.md): 6 V flops an element of H at a product's rate, against three gathers."""
        return 192 if dtype.itemsize == 2 else 32

    # Torch serves matrices with gaps between columns, which kernels would have copied whole.

    def sparse_logits(self, hidden: Tensor, weight: Tensor, of: RowIds, out: Tensor) -> None:
        if _have_gaps(weight):
            super().sparse_logits(hidden, weight, of, out)
            return
        from grpo_fast.kernels.sparse_rows import sparse_logits

        sparse_logits(hidden, weight, of.ids, of.offsets, out)

    def sparse_grad_hidden(self, dx: Tensor, weight: Tensor, of: RowIds, out: Tensor) -> None:
        if _have_gaps(weight, out):
            super().sparse_grad_hidden(dx, weight, of, out)
            return
        from grpo_fast.kernels.sparse_rows import sparse_grad_hidden

        sparse_grad_hidden(dx, weight, of.ids, of.offsets, out)

    def sparse_grad_weight(self, dx: Tensor, hidden: Tensor, of: RowIds, out: Tensor) -> None:
        if _have_gaps(hidden, out):
            super().sparse_grad_weight(dx, hidden, of, out)
            return
        from grpo_fast.kernels.sparse_weight import sparse_grad_weight

        sparse_grad_weight(dx, hidden, *of.by_id, out)

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
        if (kernel := objective.kernel) is None or _have_gaps(weight, grad_hidden):
            return super().sparse_objective(hidden, weight, of, rows, objective, results, grad_hidden)
        from grpo_fast.kernels.sparse_rows import sparse_objective

        sparse_objective(
            hidden,
            weight,
            of.ids,
            _rows(rows),
            _objective(kernel, rows.logits.device),
            objective.tensors(),
            grad_hidden,
            entropy_gradient=objective.entropy_slope(),
            grad_scale=objective.scale_tensor(),
            results=results,
        )
        return rows.logits

    def scale(self, gradient: Tensor, factor: Tensor) -> Tensor:
        """Without any traffic where the factor is 1, which the host does not know."""
        from grpo_fast.kernels.scale import scale_unless_one

        scale_unless_one(gradient, factor.float().reshape(1))
        return gradient

    def fused_forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, transform: Transform) -> RowStatistics:
        from grpo_fast.kernels.forward_logprobs import forward_logprobs

        found = forward_logprobs(
            hidden,
            weight,
            targets,
            bias=transform.bias,
            logit_scale=transform.head.logit_scale,
            softcap=transform.head.softcap,
            temperature=transform.temperature,
        )
        return RowStatistics(*found)

    def group_functions(self) -> GroupFunctions:
        from grpo_fast.kernels.group_advantages import group_advantages
        from grpo_fast.kernels.group_rows import token_rows

        return GroupFunctions(group_advantages, token_rows)


def _have_gaps(*matrices: Tensor | None) -> bool:
    return any(matrix is not None and matrix.stride(1) != 1 for matrix in matrices)


def _why_not_running(device: torch.device) -> str | None:
    """Why Triton, installed as it is, cannot run on a device: it compiles at run time, with a C compiler."""
    try:
        from grpo_fast.kernels.probe import why_not_runnable
    except ImportError as error:
        return f"Triton does not import: {error}"
    return why_not_runnable(device)


def _rows(rows: RowChunk):  # type: ignore[no-untyped-def]
    from grpo_fast.kernels.rows import Rows

    head, transform = rows.transform.head, rows.transform
    return Rows(
        rows.logits,
        rows.targets,
        transform.bias,
        head.logit_scale,
        head.softcap,
        transform.temperature,
        None if rows.offsets is None else rows.offsets.contiguous(),
    )


@lru_cache(maxsize=64)
def _objective(objective: KernelObjective, device: torch.device):  # type: ignore[no-untyped-def]
    """The objective in the kernel's terms; its numbers are copied to the device once."""
    from grpo_fast.kernels.objective import objective_parameters
    from grpo_fast.kernels.row_objective import Objective

    return Objective(
        policy=objective.policy,
        kl=objective.kl,
        kl_times_ratio=objective.kl_times_ratio,
        correction=objective.correction,
        parameters=objective_parameters(dict(objective.parameters), device),
    )
