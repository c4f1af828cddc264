"""Log-probability of the target, entropy and log-sum-exp of every row: sweep 1 of row_sweeps.py.

Bytes per logit: 4 read (2 from bf16), nothing written. Arithmetic: 1.25 exponentials, about ten instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_fast.kernels.configuration import Configuration
from grpo_fast.kernels.row_sweeps import LN_2, row_bias, row_logprob, row_place, row_scales
from grpo_fast.kernels.rows import UNALIGNED, Rows, examples

BYTES_PER_LOGIT = {"loads": 4, "stores": 0}


RESULTS = {"logprobs": torch.float32, "entropy": torch.float32, "lse": torch.float32}


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=UNALIGNED)
def _row_statistics_kernel(
    logits,  # [R, V], or [N] with offsets
    row_stride,  # None with offsets, as num_columns is
    offsets,  # [R + 1] int64 or None
    targets,  # [R] int64
    bias,  # [V], with offsets [N], or None
    row_temperature,  # [R] float32 or None
    logprobs,  # [R] float32, out
    entropy,  # [R] float32, out
    lse,  # [R] float32, out
    num_rows,
    num_columns,
    factor,
    cap_scale,
    chain,
    TRANSFORM: tl.constexpr,
    LANES: tl.constexpr,
):
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        start, columns = row_place(row, row_stride, offsets, num_columns)
        row_factor, _ = row_scales(row, row_temperature, factor, chain)
        logprob, row_entropy, lse2 = row_logprob(
            logits + start,
            row_bias(bias, start, offsets),
            tl.load(targets + row),
            columns,
            row_factor,
            cap_scale,
            TRANSFORM,
            LANES,
        )
        tl.store(logprobs + row, logprob)
        tl.store(entropy + row, row_entropy)
        tl.store(lse + row, lse2 * LN_2)


def row_statistics_of(rows: Rows, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, lse), each `[R]` float32, in nats; logprobs are NaN where the target is outside `[0, V)`.

    Args:
        out: where to write them; new tensors if None.
    """
    results = rows.results(out, RESULTS)
    rows.run(_row_statistics_kernel, results)
    return results["logprobs"], results["entropy"], results["lse"]


def aot_configurations() -> Iterator[Configuration]:
    """Every launch of the table."""
    for example in examples():
        results = {name: example.per_row(dtype) for name, dtype in RESULTS.items()}
        yield Configuration.of_launch(
            f"row_statistics, {example.label}",
            _row_statistics_kernel,
            example.arguments() | results,
            arches=example.arches,
            sweep_bytes=example.sweep_bytes,
        )
