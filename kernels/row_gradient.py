"""dx from the gradients in logprob and entropy: sweep 2 of row_sweeps.py.

    dx_v = (g (1[v = y] - p_v) - e p_v (log p_v + entropy)) d z / d x

Bytes per logit: 4 read, 2 written (bf16 or fp16), 4 (float32). Arithmetic: 1 exponential, about eight instructions.
Rows with g = e = 0 are only written.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from grpo_fast.kernels.configuration import Configuration
from grpo_fast.kernels.row_sweeps import LOG2_E, row_bias, row_gradient, row_place, row_scales
from grpo_fast.kernels.rows import UNALIGNED, Rows, examples

BYTES_PER_LOGIT = {"loads": 4, "stores": 2}


@triton.jit(do_not_specialize=["num_rows", "vocab_start"], do_not_specialize_on_alignment=[*UNALIGNED, "g", "e"])
def _row_gradient_kernel(
    logits,  # [R, V], or [N] with offsets
    row_stride,  # None with offsets, as num_columns is
    offsets,  # [R + 1] int64 or None
    dx,  # [R, V] (with offsets [N]) out, perhaps over the logits
    dx_stride,
    targets,  # [R] int64
    bias,  # [V], with offsets [N], or None
    row_temperature,  # [R] float32 or None
    lse,  # [R] float32
    entropy,  # [R] float32
    g,  # [R] float32
    e,  # [R] float32 or None
    num_rows,
    num_columns,
    vocab_start,
    factor,
    cap_scale,
    chain,
    TRANSFORM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    LANES: tl.constexpr,
):
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        start, columns = row_place(row, row_stride, offsets, num_columns)
        dx_start, _ = row_place(row, dx_stride, offsets, num_columns)
        row_factor, row_chain = row_scales(row, row_temperature, factor, chain)
        g_row = tl.load(g + row)
        e_row = 0.0
        if e is not None:
            e_row = tl.load(e + row)
        row_gradient(
            logits + start,
            dx + dx_start,
            row_bias(bias, start, offsets),
            tl.load(targets + row) - vocab_start,
            columns,
            row_factor,
            cap_scale,
            row_chain,
            tl.load(lse + row) * LOG2_E,
            tl.load(entropy + row),
            g_row,
            e_row,
            TRANSFORM,
            e is not None,
            IN_PLACE,
            LANES,
        )


def row_gradient_of(
    rows: Rows, lse: Tensor, entropy: Tensor, g: Tensor, e: Tensor | None, dx: Tensor, *, vocab_start: int = 0
) -> None:
    """Write dx `[R, V]`: memory of its own, or `dx_over(logits, dtype)`.

    Args:
        lse, entropy, g, e: `[R]`; e None is zero.
        vocab_start: the vocabulary index of column 0; targets outside these columns are other blocks'.
    """
    arguments = {
        "dx": dx,
        "dx_stride": rows.stride_of(dx),
        "lse": lse.float().contiguous(),
        "entropy": entropy.float().contiguous(),
        "g": g.float().contiguous(),
        "e": None if e is None else e.float().contiguous(),
        "vocab_start": vocab_start,
        "IN_PLACE": dx.untyped_storage()._cdata == rows.logits.untyped_storage()._cdata,
    }
    rows.run(_row_gradient_kernel, arguments)


def aot_configurations() -> Iterator[Configuration]:
    """Every launch of the table, apart and in place, the latter with an entropy gradient."""
    for example in examples():
        for entropy in (False, True):
            in_place = entropy or example.rows.offsets is not None
            dx = example.dx()
            arguments = {name: example.per_row() for name in ("lse", "entropy", "g")} | {
                "dx": dx,
                "dx_stride": example.rows.stride_of(dx),
                "e": example.per_row() if entropy else None,
                "vocab_start": 0,
                "IN_PLACE": in_place,
            }
            yield Configuration.of_launch(
                f"row_gradient, {example.label}{', in place, entropy' if entropy else ''}",
                _row_gradient_kernel,
                example.arguments() | arguments,
                arches=example.arches,
                sweep_bytes=example.sweep_bytes,
            )
