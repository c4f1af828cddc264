"""Log-probabilities, entropies and log-sum-exps straight from hidden states: logits exist in registers only.

Legend: T rows (tokens), H hidden size, V vocabulary, J splits of it. For row t with raw products x_tv = h_t . w_v:

    z_tv = softcap(logit_scale (x_tv + bias_v)) / temperature_t
    m_t = max_v z_tv        s_t = sum_v e^(z_tv - m_t)        u_t = sum_v e^(z_tv - m_t) (z_tv - m_t)
    lse_t = m_t + log s_t   logprob_t = z_ty - lse_t          entropy_t = log s_t - u_t / s_t

The entropy needs no difference of large numbers that way. A program takes BLOCK_T rows and one of the J splits, walks
the split's tiles of BLOCK_V columns, and carries (m, s, u, z_y) of its rows in registers through their epilogues; a
second kernel merges the J partial results of a row in their order. Exponents are in base 2: log2(e) is in the scale.

Bytes: operands, and 16 J per row written and read; for comparison, logits in memory cost 8 V per row. GROUP_BLOCKS row
blocks go through the vocabulary together: their hidden states stay in L2, where they share each weight tile, and the
weight comes from memory once per such group. Nothing is recomputed.

A row's bits depend on neither its position, nor the other rows, nor T: tiles and J follow from V, dtype and device.
Two variants of one kernel: tensor descriptors (TMA) where the device has them and the operands are aligned to 16 bytes,
pointers otherwise. No atomics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configuration import ARCHES, Configuration
from .forward_launches import Launch, default_launch
from .launcher import launch as launch_kernel

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2.0))
# Stands for "nothing yet" in the running maximum: finite, so that no NaN comes from -inf - -inf.
NOTHING = tl.constexpr(-1e38)
# Exponents are clamped here: 2^-200 is 0 in float32, and 0 * -200 is 0 where 0 * -inf would be NaN.
FLOOR = tl.constexpr(-200.0)
ROWS_PER_LAUNCH = 2**15
COMBINE_ROWS = 128
_COMBINE = {"BLOCK_T": COMBINE_ROWS, "num_warps": 4}
_RESULTS = ("logprobs", "entropy", "lse")

# One binary for all T, V, H: what an argument happens to be divisible by is nothing to compile for.
_PLAIN = ["num_rows", "vocab", "tiles_per_split", "width", "hidden_stride", "weight_stride"]
_UNALIGNED = ["bias", "targets", "temperature"]


@triton.jit
def _absorb(m, s, u, peak, tile_s, tile_u):
    """(s, u) of running statistics with maximum m joined by those with maximum `peak` >= m, and relative to it."""
    delta = m - peak
    shrink = tl.exp2(delta)
    return shrink * s + tile_s, shrink * (u + s * delta) + tile_u


@triton.jit
def _tile_start(bias, column_start, vocab, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """What a tile's products [BLOCK_T, BLOCK_V] are added to: the bias, here because registers are short at the end."""
    x = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    if bias is not None:
        columns = column_start + tl.arange(0, BLOCK_V)
        x += tl.load(bias + tl.minimum(columns, vocab - 1)).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_UNALIGNED)
def _forward_kernel(
    hidden,  # [T, H], a pointer or a descriptor of [BLOCK_T, BLOCK_K] blocks
    weight,  # [V, H], a pointer or a descriptor of [BLOCK_V, BLOCK_K] blocks
    bias,  # [V] or None
    targets,  # [T] int64
    temperature,  # [T] float32 or None: in `outer`
    partials,  # [J, 4, T] float32
    num_rows,
    vocab,
    tiles_per_split,
    width,  # H and row strides in units of UNIT elements
    hidden_stride,
    weight_stride,
    inner,  # float32: with a soft cap, what (x + bias) is multiplied by to give 2 log2(e) times the argument of tanh
    outer,  # float32, positive: from there to log2(e) z
    DESCRIPTORS: tl.constexpr,
    UNIT: tl.constexpr,  # 8 or 4: 16-byte accesses; 1: an element at a time
    EVEN_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATE: tl.constexpr,  # logit_scale < 0, without soft cap
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
):
    """One split's (m, s, u, z_y) of BLOCK_T rows."""
    num_tiles = tl.cdiv(vocab, BLOCK_V)
    num_splits = tl.cdiv(num_tiles, tiles_per_split)
    # Programs that run at once: GROUP_BLOCKS row blocks, which go fastest, by as many splits as there is room for.
    group = tl.program_id(0) // (GROUP_BLOCKS * num_splits)
    within = tl.program_id(0) % (GROUP_BLOCKS * num_splits)
    blocks = tl.minimum(tl.cdiv(num_rows, BLOCK_T) - group * GROUP_BLOCKS, GROUP_BLOCKS)
    split = within // blocks
    row_start = (group * GROUP_BLOCKS + within % blocks) * BLOCK_T

    rows = row_start + tl.arange(0, BLOCK_T)
    live = rows < num_rows
    target = tl.load(targets + rows, mask=live, other=0)
    known = (target >= 0) & (target < vocab)
    target = target.to(tl.int32)
    scale = tl.full([BLOCK_T], 1.0, tl.float32) * outer
    if temperature is not None:
        scale = scale / tl.load(temperature + rows, mask=live, other=1.0)
    ks = tl.arange(0, BLOCK_K)
    if not DESCRIPTORS:  # rows past the end repeat the last one: no mask in the loop
        hidden += tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * (hidden_stride * UNIT) + ks[None, :]

    m = tl.full([BLOCK_T], NOTHING, tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)
    u = tl.zeros([BLOCK_T], tl.float32)
    z_target = tl.where(known, 0.0, float("nan"))
    first = split * tiles_per_split
    num_steps = tl.cdiv(width * UNIT, BLOCK_K)
    num_full = vocab // BLOCK_V
    last = tl.minimum(first + tiles_per_split, num_tiles)
    full = tl.maximum(tl.minimum(last, num_full), first)
    # Whole tiles, then the ragged one with a mask. Each loop runs over tiles and, within them, over H, so that a tile's
    # first loads are under way during the epilogue of the one before.
    for ragged in tl.static_range(2):
        begin = full if ragged else first
        end = last if ragged else full
        x = _tile_start(bias, begin * BLOCK_V, vocab, BLOCK_T, BLOCK_V)
        for step in range((end - begin) * num_steps):
            column_start = (begin + step // num_steps) * BLOCK_V
            columns = column_start + tl.arange(0, BLOCK_V)
            k = step % num_steps * BLOCK_K
            if DESCRIPTORS:  # zeros beyond the tensors' ends
                h = hidden.load([row_start, k])
                w = weight.load([column_start, k])
            else:
                w_rows = tl.minimum(columns, vocab - 1).to(tl.int64)[:, None] * (weight_stride * UNIT)
                if EVEN_K:
                    h = tl.load(hidden + k)
                    w = tl.load(weight + w_rows + k + ks[None, :])
                else:
                    inside = (k + ks < width * UNIT)[None, :]
                    h = tl.load(hidden + k, mask=inside, other=0.0)
                    w = tl.load(weight + w_rows + k + ks[None, :], mask=inside, other=0.0)
            x = tl.dot(h, w.T, x, input_precision="ieee")

            if step % num_steps == num_steps - 1:
                # No `if` on run-time values in here: the compiler waits for the running product where x is first read,
                # and with the first read in one branch (seen with triton 3.6 and 3.7.1) not on the way around it.
                if SOFTCAP:
                    x = 1.0 - 2.0 / (1.0 + tl.exp2(x * inner))  # tanh, to 1e-7
                elif NEGATE:
                    x = -x
                if ragged:
                    x = tl.where(columns[None, :] < vocab, x, float("-inf"))
                z_target += tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), axis=1) * scale
                peak = tl.maximum(m, tl.max(x, axis=1) * scale)
                d = tl.fma(x, scale[:, None], -peak[:, None])
                d = tl.maximum(d, FLOOR, propagate_nan=tl.PropagateNan.ALL)
                e = tl.exp2(d)
                s, u = _absorb(m, s, u, peak, tl.sum(e, axis=1), tl.sum(e * d, axis=1))
                m = peak
                x = _tile_start(bias, column_start + BLOCK_V, vocab, BLOCK_T, BLOCK_V)

    out = partials + split * 4 * num_rows + rows
    tl.store(out, m, mask=live)
    tl.store(out + num_rows, s, mask=live)
    tl.store(out + 2 * num_rows, u, mask=live)
    tl.store(out + 3 * num_rows, z_target, mask=live)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _combine_kernel(
    partials,  # [J, 4, T] float32
    logprobs,  # [T] float32, like the other two
    entropy,
    lse,
    num_rows,
    num_splits,
    BLOCK_T: tl.constexpr,
):
    """A row's J partial results, merged in their order."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < num_rows
    m = tl.full([BLOCK_T], NOTHING, tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)
    u = tl.zeros([BLOCK_T], tl.float32)
    z_target = tl.zeros([BLOCK_T], tl.float32)
    for split in range(num_splits):
        part = partials + split * 4 * num_rows + rows
        part_m = tl.load(part, mask=live, other=0.0)
        part_s = tl.load(part + num_rows, mask=live, other=1.0)
        part_u = tl.load(part + 2 * num_rows, mask=live, other=0.0)
        z_target += tl.load(part + 3 * num_rows, mask=live, other=0.0)
        peak = tl.maximum(m, part_m)
        part_s, part_u = _absorb(part_m, part_s, part_u, peak, 0.0, 0.0)
        s, u = _absorb(m, s, u, peak, part_s, part_u)
        m = peak
    log_s = tl.log(s)
    tl.store(logprobs + rows, (z_target - m) * LN2 - log_s, mask=live)
    tl.store(entropy + rows, log_s - u / s * LN2, mask=live)
    tl.store(lse + rows, m * LN2 + log_s, mask=live)


_INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


@cache
def _device_facts(device: torch.device) -> tuple[int, int]:
    """(architecture, multiprocessors); the interpreter is architecture 0 with two."""
    if _INTERPRETED:
        return 0, 2
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10, properties.multi_processor_count


def _split(vocab: int, launch: Launch, processors: int) -> tuple[int, int]:
    """(J, tiles of a split): as many splits as there are multiprocessors, so that few rows occupy them all too."""
    num_tiles = triton.cdiv(vocab, launch.block_v)
    tiles_per_split = triton.cdiv(num_tiles, processors)
    return triton.cdiv(num_tiles, tiles_per_split), tiles_per_split


def scratch_bytes(num_rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Temporary memory of a call: the partial results of at most ROWS_PER_LAUNCH rows (at most, over the launches)."""
    architecture, processors = _device_facts(device)
    options = list(product((True, False), (True, False)))
    launches = [default_launch(architecture, dtype.itemsize, aligned=aligned, bias=bias) for aligned, bias in options]
    splits = max(_split(vocab, launch, processors)[0] for launch in launches)
    return 16 * splits * min(num_rows, ROWS_PER_LAUNCH)


def _unit(hidden: Tensor, weight: Tensor) -> int:
    """Elements in 16 bytes if every row of both operands starts at a multiple of 16 bytes and H is one; else 1."""
    unit = 16 // hidden.element_size()
    sizes = (hidden.shape[1], hidden.stride(0), weight.stride(0))
    aligned = all(size % unit == 0 for size in sizes) and all(t.data_ptr() % 16 == 0 for t in (hidden, weight))
    return unit if aligned else 1


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float | Tensor) -> None:
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"hidden: expected bfloat16, float16 or float32; got {hidden.dtype}")
    if _INTERPRETED and hidden.dtype == torch.bfloat16:
        raise ValueError(f"hidden: expected float16 or float32 in the interpreter; got {hidden.dtype}: wrong products")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.ndim != 2 or tensor.stride(1) != 1 or 0 in tensor.shape[1:]:
            layout = f"{list(tensor.shape)} with strides {tensor.stride()}"
            raise ValueError(f"{name}: expected a matrix whose rows are contiguous and not empty; got {layout}")
    num_rows, width = hidden.shape
    expected = {
        "weight": (weight, [weight.shape[0], width], hidden.dtype),
        "targets": (targets, [num_rows], torch.int64),
    }
    if bias is not None:
        expected["bias"] = (bias, [weight.shape[0]], bias.dtype)
    if isinstance(temperature, Tensor):
        expected["temperature"] = (temperature, [num_rows], torch.float32)
    for name, (tensor, shape, dtype) in expected.items():
        facts = (list(tensor.shape), tensor.dtype, tensor.device)
        if facts != (shape, dtype, hidden.device) or not (tensor.ndim == 2 or tensor.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous {shape} {dtype} on {hidden.device}; got {facts}")
    if weight.shape[0] == 0:
        raise ValueError("weight: expected at least one row; got none")


def forward_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, lse) `[T]` float32, in nats, of softmax rows whose logits are never in memory.

    logprobs are NaN where the target is outside `[0, V)`.

    Args:
        hidden: `[T, H]` bfloat16, float16 or float32 (then multiplied without rounding to tf32); any row stride.
        weight: `[V, H]`, the same dtype; any row stride.
        targets: `[T]` int64.
        bias: `[V]`, any floating dtype; minus infinity takes an entry out.
        logit_scale, softcap: z = softcap tanh(logit_scale (x + bias) / softcap), without tanh if softcap is None.
        temperature: positive, a number or `[T]` float32.
        launch: instead of the table's, for measurements. Its descriptors are used if the operands are aligned.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
    """
    _check(hidden, weight, targets, bias, temperature)
    (num_rows, width), vocab = hidden.shape, weight.shape[0]
    results = [hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(3)]
    if num_rows == 0:
        return results[0], results[1], results[2]

    architecture, processors = _device_facts(hidden.device)
    unit = _unit(hidden, weight)
    launch = launch or default_launch(architecture, hidden.element_size(), aligned=unit > 1, bias=bias is not None)
    launch = replace(launch, descriptors=launch.descriptors and unit > 1)
    num_splits, tiles_per_split = _split(vocab, launch, processors)
    row_temperature = temperature if isinstance(temperature, Tensor) else None
    number = 1.0 if isinstance(temperature, Tensor) else temperature
    inner = 0.0 if softcap is None else 2 * LOG2E * logit_scale / softcap
    outer = LOG2E / number * (abs(logit_scale) if softcap is None else softcap)
    constexprs = launch.constexprs(
        softcap=softcap is not None,
        negate=softcap is None and logit_scale < 0,
        unit=unit,
        even_k=width % launch.block_k == 0,
    )
    partials = hidden.new_empty(num_splits, 4, min(num_rows, ROWS_PER_LAUNCH), dtype=torch.float32)
    for start in range(0, num_rows, ROWS_PER_LAUNCH):
        rows = slice(start, min(start + ROWS_PER_LAUNCH, num_rows))
        count = rows.stop - start
        operands: tuple[Any, Any] = hidden[rows], weight
        if launch.descriptors:
            blocks = ([launch.block_t, launch.block_k], [launch.block_v, launch.block_k])
            operands = tuple(map(TensorDescriptor.from_tensor, operands, blocks))
        forward = {
            **dict(zip(("hidden", "weight"), operands, strict=True)),
            "bias": bias,
            "targets": targets[rows],
            "temperature": None if row_temperature is None else row_temperature[rows],
            "partials": partials,
            "num_rows": count,
            "vocab": vocab,
            "tiles_per_split": tiles_per_split,
            "width": width // unit,
            "hidden_stride": hidden.stride(0) // unit,
            "weight_stride": weight.stride(0) // unit,
            "inner": inner,
            "outer": outer,
            **constexprs,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }
        launch_kernel(_forward_kernel, (triton.cdiv(count, launch.block_t) * num_splits,), forward, hidden.device)
        outputs = dict(zip(_RESULTS, (result[rows] for result in results), strict=True))
        combine = {"partials": partials, **outputs, "num_rows": count, "num_splits": num_splits, **_COMBINE}
        launch_kernel(_combine_kernel, (triton.cdiv(count, COMBINE_ROWS),), combine, hidden.device)
    return results[0], results[1], results[2]


def aot_configurations() -> Iterator[Configuration]:
    """What the launcher asks for: every tile, with the least and the most transform; fp16 is as bf16."""
    operands = [("bf16", 2, 8, False), ("bf16", 2, 8, True), ("bf16", 2, 1, True), ("fp32", 4, 4, True)]
    for architecture, (dtype, itemsize, unit, full) in product(ARCHES, operands):
        launch = default_launch(architecture, itemsize, aligned=unit > 1, bias=full)
        yield _configuration(architecture, dtype, launch, unit, full)
    pointers = dict.fromkeys(("partials", *_RESULTS), "*fp32")
    yield Configuration(
        label="forward_logprobs combine",
        kernel=_combine_kernel,
        signature={**pointers, "num_rows": "i32", "num_splits": "i32"},
        constexprs={"BLOCK_T": COMBINE_ROWS},
        num_warps=_COMBINE["num_warps"],
        divisible=tuple(pointers),
    )


def _configuration(architecture: int, dtype: str, launch: Launch, unit: int, full: bool) -> Configuration:
    """One compilation; `full`: with bias, soft cap, temperatures by row and an H that no tile divides."""
    tiles = {"hidden": (launch.block_t, launch.block_k), "weight": (launch.block_v, launch.block_k)}
    loads = {n: f"tensordesc<{dtype}[{r}, {k}]>" if launch.descriptors else f"*{dtype}" for n, (r, k) in tiles.items()}
    absent: dict[str, object] = {} if full else {"bias": None, "temperature": None}
    signature = {**loads, "bias": f"*{dtype}", "targets": "*i64", "temperature": "*fp32", "partials": "*fp32"}
    signature |= dict.fromkeys(_PLAIN, "i32") | {"inner": "fp32", "outer": "fp32"}
    constexprs = launch.constexprs(softcap=full, negate=False, unit=unit, even_k=not full)
    access = "descriptors" if launch.descriptors else "pointers" if unit > 1 else "unaligned pointers"
    return Configuration(
        label=f"forward_logprobs {dtype} {access}{' full' if full else ''}",
        kernel=_forward_kernel,
        signature={name: type_ for name, type_ in signature.items() if name not in absent},
        constexprs={**constexprs, **absent},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        arches=(architecture,),
        divisible=("partials",) if launch.descriptors or unit == 1 else ("hidden", "weight", "partials"),
    )
