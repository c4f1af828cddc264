"""Log-probability of the target, entropy and log-sum-exp of every row: sweep 1 of row_sweeps.py.

Bytes per logit: 4 read (2 from bf16), nothing written. Arithmetic: 1.25 exponentials, about ten instructions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_fast.kernels.configuration import Configuration
from grpo_fast.kernels.row_sweeps import LN_2, row_statistics, target_y
from grpo_fast.kernels.rows import Rows, examples

BYTES_PER_LOGIT = {"loads": 4, "stores": 0}


@triton.jit(do_not_specialize=["num_rows"])
def _row_statistics_kernel(
    logits,  # [R, V]
    row_stride,
    targets,  # [R] int64
    bias,  # [V] or None
    row_temperature,  # [R] float32 or None
    logprobs,  # [R] float32, out
    entropy,  # [R] float32, out
    lse,  # [R] float32, out
    num_rows,
    num_columns,
    scale,
    cap_scale,
    slope,
    TRANSFORM: tl.constexpr,
    LANES: tl.constexpr,
):
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        x = logits + tl.cast(row, tl.int64) * row_stride
        row_scale = scale
        if row_temperature is not None:
            row_scale = scale / tl.load(row_temperature + row)
        highest, log_total, entropy2 = row_statistics(x, bias, num_columns, row_scale, cap_scale, TRANSFORM, LANES)
        target = tl.load(targets + row)
        inside = (target >= 0) & (target < num_columns)
        own = target_y(x, bias, tl.where(inside, target, 0), cap_scale, TRANSFORM)
        tl.store(logprobs + row, ((own - highest) * row_scale - log_total) * LN_2)
        tl.store(entropy + row, entropy2 * LN_2)
        tl.store(lse + row, (highest * row_scale + log_total) * LN_2)


def row_statistics_of(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, lse), each `[R]` float32, in nats."""
    logprobs, entropy, lse = (rows.logits.new_empty(rows.num_rows, dtype=torch.float32) for _ in range(3))
    if rows.num_rows:
        _row_statistics_kernel[rows.grid()](logprobs=logprobs, entropy=entropy, lse=lse, **rows.arguments())
    return logprobs, entropy, lse


def aot_configurations() -> Iterator[Configuration]:
    """Every launch of the table."""
    for example in examples():
        results = {name: example.per_row() for name in ("logprobs", "entropy", "lse")}
        yield Configuration.of_launch(
            f"row_statistics, {example.label}",
            _row_statistics_kernel,
            example.arguments() | results,
            arches=example.arches,
            sweep_bytes=6 if example.full else 4,
        )
