"""What backends with fused row functions share: torch serves what theirs do not, an objective in their terms.

Fused row functions take float32 products and objectives whose tokens do not see each other. float64, which only tests
use, has torch's row functions; an objective that couples tokens has statistics and gradient apart, with torch between.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.backends.base import (
    ObjectiveResults,
    RowChunk,
    RowObjective,
    RowSlopes,
    RowStatistics,
    new_results,
    new_statistics,
)
from grpo_fast.backends.torch import TorchBackend
from grpo_fast.config import LossConfig
from grpo_fast.objectives import couples_tokens


class ObjectiveNumbers(NamedTuple):
    """A token-local objective as kernels take it: what is compiled, and numbers by name (None: no bound).

    What a trainer changes from call to call (the bonus's weight and count) is not among it, so that few of these live.
    """

    policy: str
    kl: str
    kl_times_ratio: bool
    parameters: tuple[tuple[str, float | None], ...]


@lru_cache(maxsize=64)
def objective_numbers(config: LossConfig) -> ObjectiveNumbers:
    """The config in the kernels' terms."""
    kernel = config.record.kernel
    assert kernel is not None
    parameters: dict[str, float | None] = {
        "epsilon_low": config.epsilon,
        "clip_low": 1.0 - config.epsilon,
        "clip_high": 1.0 + config.upper_epsilon,
        "clip_bound": config.upper_epsilon,
        "delta": config.delta,
        "beta": config.beta,
        "importance_min": config.importance_sampling_clip_min,
        "importance_max": config.importance_sampling_clip_max,
        "sapo_temperature_pos": config.sapo_temperature_pos,
        "sapo_temperature_neg": config.sapo_temperature_neg,
        "dppo_threshold": config.dppo_threshold,
        "dppo_log_ratio_coef": config.dppo_log_ratio_coef,
        "dual_clip": config.dual_clip,
    }
    return ObjectiveNumbers(
        policy=kernel,
        kl=config.kl_estimator if config.beta else "none",
        kl_times_ratio=config.use_bias_correction_kl,
        parameters=tuple(parameters.items()),
    )


PITCH = 64
"""Elements that a row of logits or dx is padded to on a GPU: 128 bytes of bf16, and 16-byte accesses for every V."""


class FusedBackend(TorchBackend):
    """See the module. What is not overridden is the torch backend's."""

    def scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        if dtype == torch.float64:
            return super().scratch_bytes(vocab, dtype, device)
        return self.row_scratch_bytes(vocab) + self.gemm_scratch_bytes(dtype, device)

    def row_scratch_bytes(self, vocab: int) -> int:
        """Temporary memory of the fused row functions: a float32 bias."""
        return 4 * vocab

    def statistics(self, rows: RowChunk, out: RowStatistics | None = None) -> RowStatistics:
        if not _is_float32(rows):
            return super().statistics(rows, out)
        out = new_statistics(rows) if out is None else out
        self.fused_statistics(rows, out)
        return out

    def gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if not _is_float32(rows):
            return super().gradient(rows, slopes, dtype=dtype, out=out)
        return self.fused_gradient(rows, slopes, dtype=dtype, out=out)

    def objective_rows(
        self,
        rows: RowChunk,
        objective: RowObjective,
        *,
        dtype: torch.dtype,
        out: Tensor | None = None,
        results: ObjectiveResults | None = None,
    ) -> tuple[Tensor, ObjectiveResults]:
        config = objective.config
        coupled = couples_tokens(config, has_old=objective.tokens.old_logprobs is not None)
        if coupled or config.record.kernel is None or not _is_float32(rows):
            return super().objective_rows(rows, objective, dtype=dtype, out=out, results=results)
        results = new_results(rows) if results is None else results
        return self.fused_objective(rows, objective, results, dtype=dtype, out=out), results

    @abstractmethod
    def fused_statistics(self, rows: RowChunk, out: RowStatistics) -> None:
        """`statistics` of float32 products."""

    @abstractmethod
    def fused_gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """`gradient` of float32 products."""

    @abstractmethod
    def fused_objective(
        self,
        rows: RowChunk,
        objective: RowObjective,
        results: ObjectiveResults,
        *,
        dtype: torch.dtype,
        out: Tensor | None,
    ) -> Tensor:
        """`objective_rows` of float32 products and a token-local objective; dx."""


class GpuBackend(FusedBackend):
    """Rows padded to `PITCH`, dx beside tiles of logits, NVIDIA sm_80 and up."""

    stages_dx = True

    def row_pitch(self, vocab: int) -> int:
        return -(-vocab // PITCH) * PITCH


def old_gpu(device: torch.device) -> str | None:
    """Why kernels for sm_80 and up do not run on a CUDA device, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: it is built without CUDA, or there is no driver or GPU"
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
    return -objective.config.entropy_coef / objective.tokens.bonus_count.float().reshape(1)


def _is_float32(rows: RowChunk) -> bool:
    return rows.logits.dtype == torch.float32
