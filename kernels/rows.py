"""A chunk of raw products as the row kernels take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor

from grpo_fast.kernels import launcher
from grpo_fast.kernels.configuration import ARCHES
from grpo_fast.kernels.launch_table import (
    ROW_LAUNCHES,
    SUPPORT_ROWS,
    RowLaunch,
    arches_of,
    architecture,
    num_programs,
    row_launch,
)

# What has one number a row is a slice of a longer tensor, wherever its chunk begins, and is read and written one number
# at a time: its alignment is nothing to compile for.
UNALIGNED = ("targets", "offsets", "row_temperature", "logprobs", "entropy", "lse")


@dataclass(frozen=True)
class Rows:
    """R rows of V raw products, or each of its own length, what each is for, and the way from raw products to logits.

    Attributes:
        logits: `[R, V]` float32, bf16 or fp16, columns contiguous; 16-byte accesses where the row stride allows them.
            With offsets `[N]`, row after row.
        targets: `[R]` int64, columns. Those outside the row have no logprob.
        bias: `[V]`, with offsets `[N]`, or None.
        temperature: a float, or `[R]` float32.
        offsets: `[R+1]` int64: row t is `logits[offsets[t]:offsets[t + 1]]`. Or None.
    """

    logits: Tensor
    targets: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        dims, shape = (2, "[R, V] with contiguous columns") if self.offsets is None else (1, "[N], contiguous")
        if self.logits.dim() != dims or self.logits.stride(-1) != 1:
            raise ValueError(
                f"logits: expected {shape}; got shape {list(self.logits.shape)}, strides {list(self.logits.stride())}"
            )
        if self.offsets is not None and (self.offsets.dtype != torch.int64 or not self.offsets.is_contiguous()):
            raise ValueError(f"offsets: expected [R+1] int64, contiguous; got {self.offsets.dtype}")

    @property
    def num_rows(self) -> int:
        return self.targets.shape[0]

    @property
    def num_columns(self) -> int | None:
        """V; None where each row has its own."""
        return self.logits.shape[1] if self.offsets is None else None

    @property
    def launch(self) -> RowLaunch:
        """By the table."""
        if self.num_columns is None:
            return SUPPORT_ROWS
        return row_launch(self.num_columns, architecture(self.logits.device))

    def run(self, kernel: Any, arguments: Mapping[str, Any]) -> None:
        """Launch a row kernel with what it is told besides `self.arguments`; where there are no rows, nothing."""
        if self.num_rows == 0:
            return
        device, launch = self.logits.device, self.launch
        grid = (num_programs(launch, self.num_rows, device),)
        launcher.launch(kernel, grid, {**self.arguments(launch), **arguments}, device)

    def results(self, given: Sequence[Tensor] | None, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """One `[R]` tensor for each name, of its dtype: those given, in that order, or new ones.

        Raises:
            ValueError: what is given is not contiguous `[R]` tensors of the dtypes.
        """
        if given is None:
            return {name: self.logits.new_empty(self.num_rows, dtype=dtype) for name, dtype in dtypes.items()}
        found = [(tuple(tensor.shape), tensor.dtype) for tensor in given]
        expected = [((self.num_rows,), dtype) for dtype in dtypes.values()]
        if found != expected or not all(tensor.is_contiguous() for tensor in given):
            raise ValueError(f"results: expected contiguous {', '.join(dtypes)} {expected}; got {found}")
        return dict(zip(dtypes, given, strict=True))

    def row_temperature(self) -> Tensor | None:
        """`[R]` float32, or None for a number."""
        return self.temperature.float().contiguous() if isinstance(self.temperature, Tensor) else None

    def arguments(self, launch: RowLaunch) -> dict[str, Any]:
        """What every row kernel is told; factor, cap_scale and chain of row_sweeps.py, for temperature 1 if by row."""
        temperature = 1.0 if isinstance(self.temperature, Tensor) else self.temperature
        top = abs(self.logit_scale) if self.softcap is None else self.softcap
        plain = "negate" if self.logit_scale < 0 else "none"
        return {
            "logits": self.logits,
            "row_stride": self.stride_of(self.logits),
            "offsets": self.offsets,
            "targets": self.targets.contiguous(),
            "bias": None if self.bias is None else self.bias.contiguous(),
            "row_temperature": self.row_temperature(),
            "num_rows": self.num_rows,
            "num_columns": self.num_columns,
            "factor": top / temperature / log(2),
            "cap_scale": 0.0 if self.softcap is None else 2 * self.logit_scale / self.softcap / log(2),
            "chain": self.logit_scale / temperature,
            "TRANSFORM": plain if self.softcap is None else "softcap",
            "LANES": launch.lanes,
            "num_warps": launch.num_warps,
        }

    def stride_of(self, tensor: Tensor) -> int | None:
        """Elements from one row of `[R, V]` to the next, as kernels read it; None where rows have offsets."""
        return tensor.stride(0) if self.offsets is None else None


def dx_over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where dx `[R, V]` of a dtype no wider than the logits' goes over the logits: the upper half, if narrower."""
    if dtype.itemsize > logits.dtype.itemsize:
        raise ValueError(f"dtype: expected at most {logits.dtype.itemsize} bytes over the logits; got {dtype}")
    if dtype.itemsize == logits.dtype.itemsize:
        return logits.view(dtype)
    start = logits.shape[1] // 8 * 8
    return logits.view(dtype)[:, start : start + logits.shape[1]]


# -- without a GPU ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """Rows on the meta device as some launch of the table gets them; `full` has every option of the head."""

    label: str
    rows: Rows
    full: bool
    launch: RowLaunch
    arches: tuple[int, ...]

    @property
    def sweep_bytes(self) -> int | None:
        """Bytes that a sweep loads for a logit; None where rows begin anywhere and threads load numbers one by one."""
        if self.rows.offsets is not None:
            return None
        return 6 if self.full else 4

    def per_row(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[R]`."""
        return torch.empty(self.rows.num_rows, dtype=dtype, device="meta")

    def dx(self) -> Tensor:
        """`[R, V]` bf16; with offsets the logits."""
        if self.rows.offsets is not None:
            return self.rows.logits
        return torch.empty(self.rows.num_rows, self.rows.logits.stride(0), dtype=torch.bfloat16, device="meta")

    def arguments(self) -> dict[str, Any]:
        return self.rows.arguments(self.launch)


def examples() -> Iterator[Example]:
    """Each launch of the table with the longest rows that it serves (151936 where there is no end), plain and full."""
    launches = {launch: most or 151936 for table in ROW_LAUNCHES.values() for most, launch in table}
    for launch, vocab in launches.items():
        for full in (False, True):
            yield _example(torch.empty(64, vocab, device="meta"), full, launch, arches_of(launch))
    for full in (False, True):
        yield support_example(full)


def support_example(full: bool) -> Example:
    """Rows of their own lengths."""
    return _example(torch.empty(4096, device="meta"), full, SUPPORT_ROWS, ARCHES)


def _example(logits: Tensor, full: bool, launch: RowLaunch, arches: tuple[int, ...]) -> Example:
    targets = torch.empty(64, dtype=torch.int64, device="meta")
    bias = torch.empty(logits.shape[-1], dtype=torch.bfloat16, device="meta") if full else None
    softcap, temperature = (30.0, torch.empty(64, device="meta")) if full else (None, 1.0)
    supports = logits.dim() == 1
    offsets = torch.empty(65, dtype=torch.int64, device="meta") if supports else None
    label = "supports" if supports else f"lanes {launch.lanes}"
    label += ", bias, soft cap, row temperatures" if full else ""
    rows = Rows(logits, targets, bias, softcap=softcap, temperature=temperature, offsets=offsets)
    return Example(label, rows, full, launch, arches)
