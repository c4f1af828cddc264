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
from grpo_fast.objectives import Tokens, couples_tokens
from grpo_fast.ops.backend import POLICY_TERMS, Transform
from grpo_fast.ops.torch_backend import TorchBackend

PITCH = 64
"""Elements that a row of logits or dx is padded to: 128 bytes of bf16."""
TILE_ROWS = 512


class TritonBackend(TorchBackend):
    """See the module. What is not overridden is the torch backend's."""

    name = "triton"
    stages_dx = True
    has_fused_forward = True

    def why_unavailable(self, device: torch.device) -> str | None:
        if find_spec("triton") is None:
            return "Triton is not installed; pip install triton"
        if device.type == "cpu" and _interpreted():
            return None
        if device.type != "cuda":
            return "its kernels run on NVIDIA GPUs (TRITON_INTERPRET=1 runs them on the CPU, slowly)"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"needs compute capability 8.0 or higher; this device has {capability[0]}.{capability[1]}"
        return None

    def scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        if dtype == torch.float64:
            return super().scratch_bytes(vocab, dtype, device)
        return self.gemm_scratch_bytes(dtype, device)

    def preferred_tile_rows(self, dtype: torch.dtype, device: torch.device) -> int:
        return TILE_ROWS if device.type == "cuda" else super().preferred_tile_rows(dtype, device)

    def row_pitch(self, vocab: int) -> int:
        return -(-vocab // PITCH) * PITCH

    # The interpreter's GEMMs are torch's on the CPU, which upcasts operands.

    def grad_hidden(self, dx: Tensor, weight: Tensor, out: Tensor) -> None:
        super().grad_hidden(dx if dx.is_cuda else dx.to(out.dtype), weight, out)

    def grad_weight(self, dx: Tensor, hidden: Tensor, out: Tensor, base: Tensor | None) -> None:
        super().grad_weight(
            dx if dx.is_cuda else dx.to(torch.promote_types(dx.dtype, torch.float32)), hidden, out, base
        )

    def statistics(self, logits: Tensor, targets: Tensor, transform: Transform) -> tuple[Tensor, Tensor, Tensor]:
        if logits.dtype == torch.float64:
            return super().statistics(logits, targets, transform)
        from grpo_fast.kernels.row_statistics import row_statistics_of

        return row_statistics_of(_rows(logits, targets, transform))

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        entropy: Tensor,
        g: Tensor,
        e: Tensor | None,
        transform: Transform,
        *,
        dtype: torch.dtype,
        vocab_start: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        if logits.dtype == torch.float64:
            return super().gradient(
                logits, targets, lse, entropy, g, e, transform, dtype=dtype, vocab_start=vocab_start, out=out
            )
        from grpo_fast.kernels.row_gradient import row_gradient_of

        rows = _rows(logits, targets, transform)
        dx = rows.dx(dtype) if out is None else out
        row_gradient_of(rows, lse, entropy, g, e, dx, vocab_start=vocab_start)
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

    def objective_rows(
        self,
        logits: Tensor,
        targets: Tensor,
        transform: Transform,
        tokens: Tokens,
        weights: Tensor,
        config: LossConfig,
        *,
        dtype: torch.dtype,
        grad_scale: float | Tensor,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        coupled = couples_tokens(config, has_old=tokens.old_logprobs is not None)
        if logits.dtype == torch.float64 or coupled:
            return super().objective_rows(
                logits, targets, transform, tokens, weights, config, dtype=dtype, grad_scale=grad_scale, out=out
            )
        from grpo_fast.kernels.row_objective import row_objective_of

        rows = _rows(logits, targets, transform)
        dx = rows.dx(dtype) if out is None else out
        given = {"weights": weights, "advantages": tokens.advantages} | tokens.optional(lambda values: values)
        entropy_gradient = None
        if config.entropy_coef != 0:
            entropy_gradient = -config.entropy_coef / tokens.num_active.float().clamp(min=1).reshape(1)
        scale = None
        if isinstance(grad_scale, Tensor):
            scale = grad_scale.float().reshape(1)
        elif grad_scale != 1:
            scale = torch.full((1,), grad_scale, device=logits.device)  # a fill: a copy would wait for the device
        logprobs, entropy, live = row_objective_of(
            rows,
            _objective(config, tokens.importance is not None, tokens.sampling_logprobs is not None, logits.device),
            given,
            dx,
            entropy_gradient=entropy_gradient,
            grad_scale=scale,
        )
        return dx, logprobs, entropy, live


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _rows(logits: Tensor, targets: Tensor, transform: Transform):  # type: ignore[no-untyped-def]
    from grpo_fast.kernels.rows import Rows

    return Rows(
        logits, targets, transform.bias, transform.head.logit_scale, transform.head.softcap, transform.temperature
    )


@cache
def _objective(config: LossConfig, importance_given: bool, has_sampling: bool, device: torch.device):  # type: ignore[no-untyped-def]
    """The config in the kernel's terms; its numbers are copied to the device once."""
    from grpo_fast.kernels.objective import objective_parameters
    from grpo_fast.kernels.row_objective import Objective

    correction = "none"
    if importance_given:
        correction = "weight"
    elif config.importance_sampling_mode is not None and has_sampling:
        correction = config.importance_sampling_mode
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
