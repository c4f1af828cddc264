"""The `triton` backend: row functions as Triton kernels (kernels/), GEMMs by cuBLAS through torch.

    logits   float32 from bf16 operands (`out_dtype`), in tiles of `tile_rows` rows
    row_*    kernels/row_*.py; one launch a tile
    dx       bf16 or fp16 in memory of its own, many tiles of it, so that the weight's gradient is added up rarely

Rows are padded to 64 elements, so that 16-byte accesses serve every vocabulary. Runs on NVIDIA sm_80 and up, and on the
CPU under Triton's interpreter (TRITON_INTERPRET=1), where `auto` never takes it. float64, which only tests use, has
torch's row functions.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.ops.backend import RowChunk, RowObjective, RowSlopes, Transform
from grpo_fast.ops.fused_backend import (
    POLICY_TERMS,
    GpuBackend,
    correction_of,
    entropy_slope,
    old_gpu,
    token_tensors,
)


class TritonBackend(GpuBackend):
    """See the module. What is not overridden is the torch backend's."""

    name = "triton"
    has_fused_forward = True

    def why_unavailable(self, device: torch.device) -> str | None:
        if find_spec("triton") is None:
            return "Triton is not installed; pip install triton"
        if device.type == "cpu" and _interpreted():
            return None
        if device.type != "cuda":
            return "its kernels run on NVIDIA GPUs (TRITON_INTERPRET=1 runs them on the CPU, slowly)"
        return old_gpu(device)

    def row_scratch_bytes(self, vocab: int) -> int:
        return 0

    # The interpreter's GEMMs are torch's on the CPU, which upcasts operands.

    def grad_hidden(self, dx: Tensor, weight: Tensor, out: Tensor) -> None:
        super().grad_hidden(dx if dx.is_cuda else dx.to(out.dtype), weight, out)

    def grad_weight(self, dx: Tensor, hidden: Tensor, out: Tensor, base: Tensor | None) -> None:
        super().grad_weight(
            dx if dx.is_cuda else dx.to(torch.promote_types(dx.dtype, torch.float32)), hidden, out, base
        )

    def fused_statistics(self, rows: RowChunk) -> tuple[Tensor, Tensor, Tensor]:
        from grpo_fast.kernels.row_statistics import row_statistics_of

        return row_statistics_of(_rows(rows))

    def fused_gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        from grpo_fast.kernels.row_gradient import row_gradient_of

        chunk = _rows(rows)
        dx = chunk.dx(dtype) if out is None else out
        row_gradient_of(chunk, slopes.lse, slopes.entropy, slopes.g, slopes.e, dx, vocab_start=rows.vocab_start)
        return dx

    def fused_forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, transform: Transform
    ) -> tuple[Tensor, Tensor, Tensor]:
        from grpo_fast.kernels.forward_logprobs import forward_logprobs

        return forward_logprobs(
            hidden,
            weight,
            targets,
            bias=transform.bias,
            logit_scale=transform.head.logit_scale,
            softcap=transform.head.softcap,
            temperature=transform.temperature,
        )

    def fused_objective(
        self, rows: RowChunk, objective: RowObjective, *, dtype: torch.dtype, out: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from grpo_fast.kernels.row_objective import row_objective_of

        chunk, device = _rows(rows), rows.logits.device
        dx = chunk.dx(dtype) if out is None else out
        scale = None
        if isinstance(objective.grad_scale, Tensor):
            scale = objective.grad_scale.float().reshape(1)
        elif objective.grad_scale != 1:
            scale = torch.full((1,), objective.grad_scale, device=device)  # a fill: a copy would wait for the device
        logprobs, entropy, live = row_objective_of(
            chunk,
            _objective(objective.config, correction_of(objective), device),
            token_tensors(objective),
            dx,
            entropy_gradient=entropy_slope(objective),
            grad_scale=scale,
        )
        return dx, logprobs, entropy, live


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _rows(rows: RowChunk):  # type: ignore[no-untyped-def]
    from grpo_fast.kernels.rows import Rows

    head, transform = rows.transform.head, rows.transform
    return Rows(rows.logits, rows.targets, transform.bias, head.logit_scale, head.softcap, transform.temperature)


@cache
def _objective(config: LossConfig, correction: str, device: torch.device):  # type: ignore[no-untyped-def]
    """The config in the kernel's terms; its numbers are copied to the device once."""
    from grpo_fast.kernels.objective import objective_parameters
    from grpo_fast.kernels.row_objective import Objective

    parameters = {
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
    return Objective(
        policy=POLICY_TERMS[config.loss_type],
        kl=config.kl_estimator if config.beta else "none",
        kl_times_ratio=config.use_bias_correction_kl,
        correction=correction,
        parameters=objective_parameters(parameters, device),
    )
