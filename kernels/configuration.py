"""What a launch of a kernel fixes at compile time, named so that it can be compiled where no GPU is.

Every kernel module offers `aot_configurations() -> Iterator[Configuration]`: all that its launcher can ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ARCHES = (80, 90, 100)

_OPTIONS = ("num_warps", "num_stages")
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "u1",
}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One kernel with everything that its compilation depends on.

    `signature` gives the run-time arguments their Triton types ("*fp32", "i32", ...) and `constexprs` the others their
    values; a pointer that is absent is the constexpr None. `divisible` names the arguments that the launcher sees to be
    multiples of 16 (pointers: aligned to 16 bytes), which is what Triton finds out itself at a launch. `num_warps` and
    `num_stages` default to what Triton launches with; `launcher.OPTIONS` are every kernel's.

    `sweep_bytes`: bytes that the main loops load for one logit (4: an fp32 logit and nothing else), for kernels that go
    through rows of logits; None for the others.

    Raises:
        ValueError: the arguments named are not those of the kernel, or a number is out of range.
    """

    label: str
    kernel: Any  # triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    arches: tuple[int, ...] = ARCHES
    divisible: tuple[str, ...] = ()
    sweep_bytes: int | None = None

    def __post_init__(self) -> None:
        expected, named = list(self.kernel.arg_names), [*self.signature, *self.constexprs]
        if sorted(expected) != sorted(named):
            raise ValueError(f"{self.label}: signature and constexprs must name {expected} once each, got {named}")
        if unknown := set(self.divisible) - set(self.signature):
            raise ValueError(f"{self.label}: divisible must name arguments of the signature, got {sorted(unknown)}")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"{self.label}: num_warps must be a power of two up to 32, got {self.num_warps}")
        if unknown_arches := set(self.arches) - set(ARCHES):
            raise ValueError(f"{self.label}: arches must be of {ARCHES}, got {sorted(unknown_arches)}")

    @classmethod
    def of_launch(cls, label: str, kernel: Any, arguments: Mapping[str, object], **fields: Any) -> Configuration:
        """What `launcher.launch(kernel, grid, arguments, device)` compiles, by Triton's rules.

        None and the integer 1 become constants, other integers and addresses are divisible by 16 where they are; not so
        for those of `do_not_specialize`, and not the latter for those of `do_not_specialize_on_alignment`. Tensors may
        be on the meta device, whose addresses are 0.

        Args:
            fields: `arches` and `sweep_bytes` of the configuration.

        Raises:
            ValueError: an argument is missing, unknown, or of a type that kernels do not take.
        """
        options = {name: value for name, value in arguments.items() if name in _OPTIONS}
        named = set(arguments) - set(options)
        if named != set(kernel.arg_names):
            raise ValueError(f"{label}: arguments must be {kernel.arg_names}, got {sorted(named)}")
        signature: dict[str, str] = {}
        constexprs: dict[str, object] = {}
        divisible: list[str] = []
        for parameter in kernel.params:
            name, value = parameter.name, arguments[parameter.name]
            special = not parameter.do_not_specialize
            one = special and type(value) is int and value == 1 and not parameter.annotation_type
            if parameter.is_constexpr or value is None or one:
                constexprs[name] = value
                continue
            signature[name] = parameter.annotation_type or _type(f"{label}: {name}", value)
            number = value.data_ptr() if isinstance(value, Tensor) else value
            aligns = special and not parameter.do_not_specialize_on_alignment
            if aligns and type(number) is int and number % 16 == 0:
                divisible.append(name)
        fields |= {"constexprs": constexprs, "divisible": tuple(divisible), **options}
        return cls(label=label, kernel=kernel, signature=signature, **fields)


def _type(name: str, value: object) -> str:
    """Triton's name for the type of a run-time argument."""
    if isinstance(value, Tensor) and value.dtype in _TYPES:
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    received = value.dtype if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{name} must be a tensor of {[*map(str, _TYPES)]}, a number or None, got {received}")
