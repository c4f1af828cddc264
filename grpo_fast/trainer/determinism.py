"""`full_determinism`: equal runs on equal hardware and software agree to the last bit, or the run ends with an error.

What it rests on, as torch 2.11 to 2.14 have it:

- `torch.use_deterministic_algorithms(True)`, strict. With `warn_only=True` the backwards of attention stay what they
  are: atomic. Strict, flash attention (SDPA's and `varlen_attn`'s) takes its deterministic backward, memory-efficient
  attention walks the keys without splitting them, and SDPA passes cuDNN's attention over (ATen's
  `attention_backward.cu` and `sdp_utils.cpp`); the flash-attn package is told by its argument `deterministic`. What has
  no deterministic implementation raises, and the error is passed on as one of the recipe.
- `CUBLAS_WORKSPACE_CONFIG`, which cuBLAS and torch read once, at the process's first product on a GPU. Hence set before
  the model is loaded, and refused where CUDA runs already without it.
- No cuDNN benchmark, which chooses kernels by their speed, and no TF32, so that nothing outside the recipe decides.

grpo-fast's own kernels have no atomics on floats and fixed chunk shapes whatever the mode.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.errors import ConfigError

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")
"""The values with which NVIDIA promises repeatable products from several streams."""
# Of the two errors that strict mode raises: an operation without a deterministic implementation, and cuBLAS's variable.
_REFUSALS = (
    "does not have a deterministic implementation",
    "this operation is not deterministic because it uses CuBLAS",
)


@contextlib.contextmanager
def determinism(config: TrainConfig) -> Iterator[None]:
    """Run the body with deterministic kernels, if the recipe wants; enter it before anything is computed on a GPU.

    Raises:
        ConfigError: cuBLAS cannot be made repeatable any more, or the body used an operation that cannot be.
    """
    if not config.full_determinism:
        yield
        return
    if config.device != "cpu":
        _set_workspace()
    matmul = torch.backends.cuda.matmul
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        matmul.fp32_precision,
    )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    matmul.fp32_precision = "ieee"
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in _REFUSALS):
            raise
        raise ConfigError(
            f"full_determinism: {str(error).splitlines()[0]} Set full_determinism=false, or leave out what uses it."
        ) from error
    finally:
        enabled, warn_only, torch.backends.cudnn.benchmark, matmul.fp32_precision = before
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def check_sampling(config: TrainConfig, device: torch.device) -> None:
    """Refuse what sampling by `model.generate` cannot repeat.

    Raises:
        ConfigError: top-p under `full_determinism` on a GPU.
    """
    if config.full_determinism and device.type == "cuda" and config.rollout.top_p < 1:
        raise ConfigError(
            f"rollout.top_p: expected 1 with full_determinism, as the sums it cuts at are not repeatable on a GPU; got "
            f"{config.rollout.top_p}"
        )


def _set_workspace() -> None:
    value = os.environ.get(VARIABLE)
    if value in REPEATABLE:
        return
    expected = f"expected {VARIABLE} to be {' or '.join(REPEATABLE)}"
    if value is not None:
        raise ConfigError(f"full_determinism: {expected}; got {value!r}")
    if torch.cuda.is_initialized():
        raise ConfigError(
            f"full_determinism: {expected} before CUDA is first used, which it has been; set it in the environment "
            "that the program starts in"
        )
    os.environ[VARIABLE] = REPEATABLE[0]
