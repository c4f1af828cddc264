"""What the `cpu` and the `cuda` backend share: tensors and configs in the terms of the C++ modules `_C` and `_cuda`.

The modules do not link torch: tensors go over as addresses, with their sizes.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from grpo_fast.backends.base import RowChunk, RowSlopes
from grpo_fast.backends.fused import ObjectiveNumbers, objective_numbers
from grpo_fast.config import LossConfig
from grpo_fast.install import install_command


def load_module(name: str) -> tuple[Any, str]:
    """(the extension module, "") or, where it is not built, (None, why not)."""
    try:
        return import_module(name), ""
    except ImportError as error:
        return None, str(error)


def not_built(name: str, missing: str, needs: str, variable: str) -> str:
    """What to say of a module that did not load."""
    return (
        f"{name} is not built ({missing}); install grpo-fast again where there is {needs} "
        f"({variable}=1 {install_command()} shows why it fails)"
    )


def address(tensor: Tensor | None) -> int:
    """Where the tensor's numbers are; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def native_dtype(module: Any, dtype: torch.dtype) -> Any:
    """The C++ name of a dtype."""
    return getattr(module.DType, str(dtype).removeprefix("torch."))


class NativeRows:
    """A chunk of logits `[R, V]` float32 as the module's `Rows`, and what its addresses point to."""

    def __init__(self, module: Any, rows: RowChunk) -> None:
        logits, transform = rows.logits, rows.transform
        temperature = transform.temperature
        per_row = temperature.float().contiguous() if isinstance(temperature, Tensor) else None
        bias = None if transform.bias is None else transform.bias.float().contiguous()
        targets = rows.targets.contiguous()
        self.kept = (logits, targets, bias, per_row)
        self.native = module.Rows(
            logits=logits.data_ptr(),
            num_rows=logits.shape[0],
            num_columns=logits.shape[1],
            row_stride=logits.stride(0),
            targets=targets.data_ptr(),
            bias=address(bias),
            logit_scale=transform.head.logit_scale,
            softcap=transform.head.softcap or 0.0,
            temperature=1.0 if isinstance(temperature, Tensor) else temperature,
            row_temperature=address(per_row),
        )


def slope_tensors(slopes: RowSlopes) -> dict[str, Tensor | None]:
    """What the gradient's function reads of rows, by name: `[R]` float32, contiguous, or None."""
    given = {"lse": slopes.lse, "entropy": slopes.entropy, "g": slopes.g, "e": slopes.e}
    return {name: None if t is None else t.float().contiguous() for name, t in given.items()}


def objective_config(module: Any, config: LossConfig, correction: str) -> Any:
    """The config in C++ terms."""
    return _objective_config(module, objective_numbers(config), correction)


@lru_cache(maxsize=64)
def _objective_config(module: Any, numbers: ObjectiveNumbers, correction: str) -> Any:
    given = dict(numbers.parameters)
    return module.Objective(
        policy=numbers.policy,
        kl=numbers.kl,
        kl_times_ratio=numbers.kl_times_ratio,
        correction=correction,
        parameters=[given[name] for name in module.PARAMETERS],
    )
