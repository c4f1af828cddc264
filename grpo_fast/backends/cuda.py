"""The `cuda` backend: row functions as CUDA kernels, compiled ahead of time (csrc/*.cu); products by cuBLAS.

    logits   float32 from bf16 operands (`out_dtype`), in tiles of `tile_rows` rows
    row_*    csrc/row_cuda.h, one launch a tile; on sm_90 and later the row stays in the shared memory of a cluster
    dx       in memory of its own where it is given, else over the logits, in the upper half of its row

Rows are padded to 64 elements, so that 16-byte accesses and bulk copies serve every vocabulary; other strides work,
more slowly. Nothing is compiled at run time and only torch's allocator is asked for memory, so that a step can be
captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast.backends.base import (
    NativeRows,
    ObjectiveResults,
    RowChunk,
    RowObjective,
    RowSlopes,
    RowStatistics,
    addresses,
    native_dtype,
    native_objective,
)
from grpo_fast.backends.torch import TorchBackend
from grpo_fast.devices import old_gpu, padded
from grpo_fast.install import load_extension, not_built

_cuda, _missing = load_extension("grpo_fast._cuda")


def native() -> Any:
    """The extension module, or None where it is not built."""
    return _cuda


class CudaBackend(TorchBackend):
    """See the module. What is not overridden is the torch backend's."""

    name = "cuda"
    stages_dx = True

    def why_unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "its kernels run on NVIDIA GPUs; use cpu or torch"
        if _cuda is None:
            return not_built("grpo_fast._cuda", _missing, "NVIDIA's nvcc", "GRPO_FAST_CUDA")
        return old_gpu(device)

    def row_scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        return 4 * vocab  # a float32 bias

    def row_pitch(self, vocab: int) -> int:
        return padded(vocab)

    def dx_place(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """The same places, or narrow rows in the upper halves of theirs."""
        if dtype == torch.float32:
            return logits
        first = _cuda.narrow_offset(logits.shape[1]) // dtype.itemsize
        return logits.view(dtype)[:, first : first + logits.shape[1]]

    def statistics(self, rows: RowChunk, out: RowStatistics) -> None:
        if rows.offsets is not None:
            super().statistics(rows, out)
            return
        native_rows = NativeRows(_cuda, rows)
        _cuda.row_statistics(
            native_rows.native,
            **addresses(**out._asdict()),
            **_queue(rows.logits),
        )

    def gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if rows.offsets is not None:
            return super().gradient(rows, slopes, dtype=dtype, out=out)
        native_rows, kept = NativeRows(_cuda, rows), slopes.tensors()
        dx = self.dx_place(rows.logits, dtype) if out is None else out
        _cuda.row_gradient(
            native_rows.native,
            **addresses(**kept),
            vocab_start=rows.vocab_start,
            **_dx(dx),
            **_queue(rows.logits),
        )
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
        if (kernel := objective.kernel) is None or rows.offsets is not None:
            return super().objective_rows(rows, objective, results, dtype=dtype, out=out)
        native_rows = NativeRows(_cuda, rows)
        dx = self.dx_place(rows.logits, dtype) if out is None else out
        kept = objective.tensors()
        kept |= {"entropy_gradient": objective.entropy_slope(), "grad_scale": objective.scale_tensor()}
        _cuda.row_objective(
            native_rows.native,
            native_objective(_cuda, kernel),
            **addresses(**kept),
            **_dx(dx),
            **addresses(**results._asdict()),
            **_queue(rows.logits),
        )
        return dx


def _dx(dx: Tensor) -> dict[str, Any]:
    return {"dx": dx.data_ptr(), "dx_stride": dx.stride(0), "dtype": native_dtype(_cuda, dx.dtype)}


def _queue(tensor: Tensor) -> dict[str, int]:
    """The device and current stream of a tensor."""
    index = tensor.device.index
    return {"device": index, "stream": torch.cuda.current_stream(index).cuda_stream}
