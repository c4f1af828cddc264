"""The `cuda` backend: row functions as ahead-of-time compiled CUDA kernels (csrc/*.cu), GEMMs by cuBLAS through torch.

    logits   float32 from bf16 operands (`out_dtype`), in tiles of `tile_rows` rows
    row_*    csrc/row_cuda.h, one launch a tile; on sm_90 and later the row stays in the shared memory of a cluster
    dx       in memory of its own where it is given, else over the logits, in the upper half of its row

Rows are padded to 64 elements, so that 16-byte accesses and bulk copies serve every vocabulary; other strides work,
more slowly. Nothing is compiled at run time and only torch's allocator is asked for memory, so that a step can be
captured in a CUDA graph. float64, which only tests use, has torch's row functions.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.objectives import Tokens, couples_tokens
from grpo_fast.ops.backend import Transform
from grpo_fast.ops.native_backend import NativeRows, address, native_dtype, objective_config
from grpo_fast.ops.torch_backend import TorchBackend

_cuda: Any = None
_missing = ""
try:
    _cuda = import_module("grpo_fast._cuda")
except ImportError as error:
    _missing = str(error)

PITCH = 64
"""Elements that a row of logits or dx is padded to: 128 bytes of bf16."""
TILE_ROWS = 512


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
            return (
                f"grpo_fast._cuda is not built ({_missing}); install grpo-fast again where there is NVIDIA's nvcc "
                "(GRPO_FAST_CUDA=1 pip install . shows why it fails)"
            )
        if not torch.cuda.is_available():
            return "torch sees no CUDA device: it is built without CUDA, or there is no driver or GPU"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"needs compute capability 8.0 or higher; this device has {capability[0]}.{capability[1]}"
        return None

    def scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        if dtype == torch.float64:
            return super().scratch_bytes(vocab, dtype, device)
        return 4 * vocab + self.gemm_scratch_bytes(dtype, device)  # a float32 bias

    def preferred_tile_rows(self, dtype: torch.dtype, device: torch.device) -> int:
        return TILE_ROWS

    def row_pitch(self, vocab: int) -> int:
        return -(-vocab // PITCH) * PITCH

    def statistics(self, logits: Tensor, targets: Tensor, transform: Transform) -> tuple[Tensor, Tensor, Tensor]:
        if logits.dtype != torch.float32:
            return super().statistics(logits, targets, transform)
        rows = NativeRows(_cuda, logits, targets, transform)
        logprobs, entropy, lse = (logits.new_empty(logits.shape[0]) for _ in range(3))
        _cuda.row_statistics(
            rows.native,
            logprobs=logprobs.data_ptr(),
            entropy=entropy.data_ptr(),
            lse=lse.data_ptr(),
            **_queue(logits),
        )
        return logprobs, entropy, lse

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
        if logits.dtype != torch.float32:
            return super().gradient(
                logits, targets, lse, entropy, g, e, transform, dtype=dtype, vocab_start=vocab_start, out=out
            )
        rows = NativeRows(_cuda, logits, targets, transform)
        dx = _over(logits, dtype) if out is None else out
        given = {"lse": lse, "entropy": entropy, "g": g, "e": e}
        kept = {name: None if t is None else t.float().contiguous() for name, t in given.items()}
        _cuda.row_gradient(
            rows.native,
            **{name: address(t) for name, t in kept.items()},
            vocab_start=vocab_start,
            **_dx(dx),
            **_queue(logits),
        )
        return dx

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
        if logits.dtype != torch.float32 or coupled:
            return super().objective_rows(
                logits, targets, transform, tokens, weights, config, dtype=dtype, grad_scale=grad_scale, out=out
            )
        rows = NativeRows(_cuda, logits, targets, transform)
        dx = _over(logits, dtype) if out is None else out
        logprobs, entropy = (logits.new_empty(logits.shape[0]) for _ in range(2))
        live = logits.new_empty(logits.shape[0], dtype=torch.bool)
        given = {"advantages": tokens.advantages, "weights": weights} | tokens.optional(lambda values: values)
        if config.entropy_coef != 0:
            given["entropy_gradient"] = -config.entropy_coef / tokens.num_active.float().clamp(min=1).reshape(1)
        if isinstance(grad_scale, Tensor):
            given["grad_scale"] = grad_scale.reshape(1)
        kept = {name: None if t is None else t.float().contiguous() for name, t in given.items()}
        _cuda.row_objective(
            rows.native,
            objective_config(_cuda, config, tokens.importance is not None, tokens.sampling_logprobs is not None),
            **{"entropy_gradient": 0, "grad_scale": 0} | {name: address(t) for name, t in kept.items()},
            grad_scale_value=1.0 if isinstance(grad_scale, Tensor) else float(grad_scale),
            **_dx(dx),
            logprobs=logprobs.data_ptr(),
            entropy=entropy.data_ptr(),
            live=live.data_ptr(),
            **_queue(logits),
        )
        return dx, logprobs, entropy, live


def _over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where dx `[R, V]` goes over logits `[R, V]`: the same places, or narrow rows in the upper halves of theirs."""
    if dtype == torch.float32:
        return logits
    first = _cuda.narrow_offset(logits.shape[1]) // dtype.itemsize
    return logits.view(dtype)[:, first : first + logits.shape[1]]


def _dx(dx: Tensor) -> dict[str, Any]:
    return {"dx": dx.data_ptr(), "dx_stride": dx.stride(0), "dtype": native_dtype(_cuda, dx.dtype)}


def _queue(tensor: Tensor) -> dict[str, int]:
    """The device and current stream of a tensor."""
    index = tensor.device.index
    return {"device": index, "stream": torch.cuda.current_stream(index).cuda_stream}
