"""The two sweeps over a row of logits that every row kernel is made of.

Legend: R rows of a chunk, V columns, x raw products `[R, V]` (float32, bf16 or fp16).

    z_v = transform(x_v + bias_v) / temperature = c u_v with c > 0

    u = x + bias, or -(x + bias) for a negative scale   c = |logit_scale| / temperature
    u = tanh(k (x + bias)) with a soft cap              c = softcap / temperature, k = logit_scale / softcap,
                                                        cap_scale = 2 k log2 e

Exponentials are powers of two: with factor = c log2 e and m the largest u, d_v = factor (u_v - m) <= 0,

    s = sum 2^d      t = sum 2^d d      lse = (factor m + log2 s) ln 2      logprob_v = (d_v - log2 s) ln 2
                                                                            entropy = (log2 s - t / s) ln 2

Only differences of logits enter: logprob and entropy are exact to rounding however large the logits are.

Sweep 1 (`row_statistics`) reads a row forwards in blocks `[N, 4]`: four logits, 16 bytes, a thread. Each of the N lanes
keeps its own (m, s, t) and rescales once in four logits, so that a logit costs 1.25 exponentials and the threads meet
once, at the end. The next two blocks are copied to shared memory meanwhile: the sweep waits for memory, not memory for
the sweep. Sweep 2 (`row_gradient`) reads it backwards: what was read last is what the L2 cache still holds.

The target's own gradient is written by a scalar store after the sweep, which spares a comparison a logit.

Program to data: one row a program, which walks over rows with the grid's stride. Every arithmetic operation of sweep 1
is the same in all kernels, whatever else they do (multiplications and additions are fused only where it says so): old,
current and reference passes agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""Stands for minus infinity where inf - inf or 0 * inf must not arise."""


@triton.jit
def _tanh(v):
    """tanh(v ln 2 / 2), off by 1e-7 at most: the approximate instruction keeps eleven bits."""
    power = tl.exp2(-tl.maximum(v, -60.0, propagate_nan=tl.PropagateNan.ALL))  # at -60 it is -1; the power stays finite
    return (1 - power) / (1 + power)


@triton.jit
def _transform(x, cap_scale, TRANSFORM: tl.constexpr):
    """u of x + bias: "none", "negate" (a negative logit_scale: the largest u must be the largest z) or "softcap"."""
    if TRANSFORM == "softcap":
        return _tanh(x * cap_scale)
    elif TRANSFORM == "negate":
        return -x
    else:
        return x


@triton.jit
def block_u(x, bias, offsets, mask, cap_scale, TRANSFORM: tl.constexpr, MASKED: tl.constexpr):
    """u `[N, 4]` float32 of raw products at `offsets` (x points at the row); -inf outside the mask."""
    if MASKED:
        u = tl.load(x + offsets, mask=mask, other=-float("inf")).to(tl.float32)
        if bias is not None:
            u += tl.load(bias + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        u = tl.load(x + offsets).to(tl.float32)
        if bias is not None:
            u += tl.load(bias + offsets).to(tl.float32)
    u = _transform(u, cap_scale, TRANSFORM)
    if MASKED and TRANSFORM != "none":
        u = tl.where(mask, u, -float("inf"))
    return u


@triton.jit
def _accumulate(u, factor, m, s, t):
    """Take a block `[N, 4]` into the lanes' (m, s, t)."""
    m_new = tl.maximum(m, tl.max(u, axis=1))
    shift = tl.maximum((m - m_new) * factor, LOWEST)
    keep = tl.exp2(shift)
    d = (u - m_new[:, None]) * factor  # not u factor - m factor, whose rounding grows with the logits
    e = tl.exp2(d)
    t = keep * (t + s * shift) + tl.sum(e * tl.maximum(d, LOWEST), axis=1)
    s = keep * s + tl.sum(e, axis=1)
    return m_new, s, t


@triton.jit
def block_offsets(LANES: tl.constexpr):
    """Columns of a block, `[LANES, 4]`."""
    return tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def row_statistics(x, bias, num_columns, factor, cap_scale, TRANSFORM: tl.constexpr, LANES: tl.constexpr):
    """(m, log2 s, log2 s - t / s) of a row, the last its entropy in bits."""
    offsets = block_offsets(LANES)
    m = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    whole = num_columns // (4 * LANES) * (4 * LANES)
    for start in tl.range(0, whole, 4 * LANES, num_stages=3):  # the next two blocks are on their way, in shared memory
        u = block_u(x + start, None if bias is None else bias + start, offsets, None, cap_scale, TRANSFORM, False)
        m, s, t = _accumulate(u, factor, m, s, t)
    if whole < num_columns:
        mask = offsets < num_columns - whole
        u = block_u(x + whole, None if bias is None else bias + whole, offsets, mask, cap_scale, TRANSFORM, True)
        m, s, t = _accumulate(u, factor, m, s, t)
    highest = tl.max(m, axis=0)
    shift = tl.maximum((m - highest) * factor, LOWEST)
    keep = tl.exp2(shift)
    total = tl.sum(keep * s, axis=0)
    weighted = tl.sum(keep * (t + s * shift), axis=0)
    log_total = tl.log2(total)
    return highest, log_total, log_total - weighted / total


@triton.jit
def row_place(row, row_stride, offsets, num_columns):
    """(first element, columns) of a row: of a matrix's, or with offsets of one that has a length of its own."""
    if offsets is None:
        return tl.cast(row, tl.int64) * row_stride, num_columns
    else:
        start = tl.load(offsets + row)
        return start, (tl.load(offsets + row + 1) - start).to(tl.int32)


@triton.jit
def row_bias(bias, start, offsets):
    """A row's bias: every row's, or with offsets its own."""
    if (bias is None) or (offsets is None):
        return bias
    else:
        return bias + start


@triton.jit
def row_scales(row, row_temperature, factor, chain):
    """(factor, chain) of a row."""
    if row_temperature is None:
        return factor, chain
    else:
        temperature = tl.load(row_temperature + row)
        return factor / temperature, chain / temperature


@triton.jit
def target_u(x, bias, column, num_columns, cap_scale, TRANSFORM: tl.constexpr):
    """u of one column; NaN of one that the row does not have."""
    inside = (column >= 0) & (column < num_columns)
    u = tl.load(x + column, mask=inside, other=float("nan")).to(tl.float32)
    if bias is not None:
        u += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return _transform(u, cap_scale, TRANSFORM)


@triton.jit
def row_logprob(x, bias, target, num_columns, factor, cap_scale, TRANSFORM: tl.constexpr, LANES: tl.constexpr):
    """(logprob of the target, entropy, lse times log2 e) of a row, sweep 1: the same bits in every kernel."""
    highest, log_total, entropy2 = row_statistics(x, bias, num_columns, factor, cap_scale, TRANSFORM, LANES)
    own = target_u(x, bias, target, num_columns, cap_scale, TRANSFORM)
    return ((own - highest) * factor - log_total) * LN_2, entropy2 * LN_2, highest * factor + log_total


@triton.jit
def _bend(u, TRANSFORM: tl.constexpr):
    """The soft cap's derivative 1 - u^2; 1 without."""
    if TRANSFORM == "softcap":
        return tl.fma(-u, u, 1.0)
    else:
        return 1.0


@triton.jit
def _dx(u, lse2, factor, level, tilt, TRANSFORM: tl.constexpr, HAS_E: tl.constexpr):
    """p (level + tilt log2 p) bend: dx of all columns but the target's, which has hit bend more."""
    log2_p = tl.fma(u, factor, -lse2)
    dx = tl.exp2(log2_p)
    if HAS_E:
        dx *= tl.fma(tl.maximum(log2_p, LOWEST), tilt, level)
    else:
        dx *= level
    if TRANSFORM == "softcap":
        dx *= _bend(u, TRANSFORM)
    return dx


@triton.jit
def row_gradient(
    x,
    dx,
    bias,
    target,
    num_columns,
    factor,
    cap_scale,
    chain,
    lse2,
    entropy,
    g,
    e,
    TRANSFORM: tl.constexpr,
    HAS_E: tl.constexpr,
    IN_PLACE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write a row of dx; x and dx point at the row.

    Backwards. In place, a narrow dx lies in the upper half of the row: block j of B columns goes to bytes 2 (V' + j B),
    V' being V rounded down to 8, and what is still unread ends at byte 4 j B, which is not above that as j B <= V'. The
    barrier lets every thread read its part of a block before any thread writes.

    Args:
        target: the target's column, or any other number where it is not among these columns.
        chain: dz / dx without the soft cap's share, that is logit_scale / temperature.
        lse2: the row's lse times log2 e. entropy: in nats.
    """
    if (g == 0) & (e == 0):  # nothing to read: most rows, where most groups agree
        if IN_PLACE:
            tl.debug_barrier()  # a slower thread may not have read the target's logit, which g comes from
        _fill_zero(dx, num_columns, LANES)
    else:
        own = target_u(x, bias, target, num_columns, cap_scale, TRANSFORM)
        level = -g * chain
        if HAS_E:
            level -= e * entropy * chain
        tilt = -e * chain * LN_2
        offsets = block_offsets(LANES)
        whole = num_columns // (4 * LANES) * (4 * LANES)
        if whole < num_columns:
            mask = offsets < num_columns - whole
            u = block_u(x + whole, None if bias is None else bias + whole, offsets, mask, cap_scale, TRANSFORM, True)
            value = _dx(u, lse2, factor, level, tilt, TRANSFORM, HAS_E)
            if IN_PLACE:
                tl.debug_barrier()
            tl.store(dx + whole + offsets, value.to(dx.dtype.element_ty), mask=mask)
        for back in range(4 * LANES, whole + 4 * LANES, 4 * LANES):
            start = whole - back
            u = block_u(x + start, None if bias is None else bias + start, offsets, None, cap_scale, TRANSFORM, False)
            value = _dx(u, lse2, factor, level, tilt, TRANSFORM, HAS_E)
            if IN_PLACE:
                tl.debug_barrier()
            tl.store(dx + start + offsets, value.to(dx.dtype.element_ty))
        tl.debug_barrier()  # the target's column has been written by another thread
        hit = g * chain
        value = _dx(own, lse2, factor, level, tilt, TRANSFORM, HAS_E) + hit * _bend(own, TRANSFORM)
        tl.store(dx + target, value.to(dx.dtype.element_ty), mask=(target >= 0) & (target < num_columns))


@triton.jit
def _fill_zero(dx, num_columns, LANES: tl.constexpr):
    """A row of zeros, 4 LANES columns at a time."""
    offsets = tl.arange(0, 4 * LANES)
    zeros = tl.zeros([4 * LANES], dx.dtype.element_ty)
    for start in range(0, num_columns, 4 * LANES):
        tl.store(dx + start + offsets, zeros, mask=offsets < num_columns - start)
