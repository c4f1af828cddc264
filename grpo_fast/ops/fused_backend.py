"""What backends with fused row functions share: torch serves what theirs do not, an objective in their terms.

Fused row functions take float32 products and objectives whose tokens do not see each other. float64, which only tests
use, has torch's row functions; an objective that couples tokens has statistics and gradient apart, with torch between.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from grpo_fast.objectives import couples_tokens
from grpo_fast.ops.backend import RowChunk, RowObjective, RowSlopes
from grpo_fast.ops.torch_backend import TorchBackend

POLICY_TERMS = {
    "grpo": "clipped",
    "bnpo": "clipped",
    "dr_grpo": "clipped",
    "dapo": "clipped",
    "luspo": "clipped",
    "cispo": "cispo",
    "sapo": "sapo",
    "dppo": "dppo",
    "ppo_dual": "ppo_dual",
    "reinforce": "reinforce",
    "rloo": "reinforce",
}
"""How objectives that fused row functions serve are called there: loss types that differ in their weights are one."""

PITCH = 64
"""Elements that a row of logits or dx is padded to on a GPU: 128 bytes of bf16, and 16-byte accesses for every V."""
GPU_TILE_ROWS = 512


class FusedBackend(TorchBackend):
    """See the module. What is not overridden is the torch backend's."""

    def scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        if dtype == torch.float64:
            return super().scratch_bytes(vocab, dtype, device)
        return self.row_scratch_bytes(vocab) + self.gemm_scratch_bytes(dtype, device)

    def row_scratch_bytes(self, vocab: int) -> int:
        """Temporary memory of the fused row functions: a float32 bias."""
        return 4 * vocab

    def statistics(self, rows: RowChunk) -> tuple[Tensor, Tensor, Tensor]:
        return self.fused_statistics(rows) if _is_float32(rows) else super().statistics(rows)

    def gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if not _is_float32(rows):
            return super().gradient(rows, slopes, dtype=dtype, out=out)
        return self.fused_gradient(rows, slopes, dtype=dtype, out=out)

    def objective_rows(
        self, rows: RowChunk, objective: RowObjective, *, dtype: torch.dtype, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        coupled = couples_tokens(objective.config, has_old=objective.tokens.old_logprobs is not None)
        run = self.fused_objective if _is_float32(rows) and not coupled else super().objective_rows
        return run(rows, objective, dtype=dtype, out=out)

    @abstractmethod
    def fused_statistics(self, rows: RowChunk) -> tuple[Tensor, Tensor, Tensor]:
        """`statistics` of float32 products."""

    @abstractmethod
    def fused_gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """`gradient` of float32 products."""

    @abstractmethod
    def fused_objective(
        self, rows: RowChunk, objective: RowObjective, *, dtype: torch.dtype, out: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`objective_rows` of float32 products and a token-local objective."""


class GpuBackend(FusedBackend):
    """Rows padded to `PITCH`, dx beside tiles of logits, NVIDIA sm_80 and up."""

    stages_dx = True

    def preferred_tile_rows(self, dtype: torch.dtype, device: torch.device) -> int:
        return GPU_TILE_ROWS if device.type == "cuda" else super().preferred_tile_rows(dtype, device)

    def row_pitch(self, vocab: int) -> int:
        return -(-vocab // PITCH) * PITCH


def old_gpu(device: torch.device) -> str | None:
    """Why kernels for sm_80 and up do not run on a CUDA device, or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    return f"needs compute capability 8.0 or higher; this device has {capability[0]}.{capability[1]}"


def correction_of(objective: RowObjective) -> str:
    """The train/inference correction that row functions apply: "none", "weight" (known beforehand) or token_*."""
    config, tokens = objective.config, objective.tokens
    if tokens.importance is not None:
        return "weight"
    if config.importance_sampling_mode is None or tokens.sampling_logprobs is None:
        return "none"
    return config.importance_sampling_mode


def token_tensors(objective: RowObjective) -> dict[str, Tensor | None]:
    """What row functions read of tokens, by name: `[R]` float32, contiguous, or None."""
    tokens = objective.tokens
    given = {"advantages": tokens.advantages, "weights": objective.weights} | tokens.optional(lambda values: values)
    return {name: None if t is None else t.float().contiguous() for name, t in given.items()}


def entropy_slope(objective: RowObjective) -> Tensor | None:
    """d loss / d entropy of every row, `[1]` float32 on the device (its count need not be known here); None if zero."""
    if objective.config.entropy_coef == 0:
        return None
    return -objective.config.entropy_coef / objective.tokens.num_active.float().clamp(min=1).reshape(1)


def _is_float32(rows: RowChunk) -> bool:
    return rows.logits.dtype == torch.float32
