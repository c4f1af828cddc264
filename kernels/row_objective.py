"""A row's whole way in one kernel: sweep 1, the token objective on scalars, sweep 2.

    x -> logprob, entropy -> g = weight d term / d logprob, e -> dx

for objectives whose tokens do not see each other (objective.py). Bytes per logit: 4 read from memory, 4 read
again, from the L2 cache as far as it holds the rows in flight, 2 written. Arithmetic: 2.25 exponentials, about twenty
instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_fast.kernels.configuration import Configuration
from grpo_fast.kernels.objective import CORRECTIONS, KL_ESTIMATORS, POLICIES, token_term
from grpo_fast.kernels.row_sweeps import row_bias, row_gradient, row_logprob, row_place, row_scales
from grpo_fast.kernels.rows import UNALIGNED, Example, Rows, examples

BYTES_PER_LOGIT = {"loads": 8, "stores": 2}


@dataclass(frozen=True)
class Objective:
    """A token-local objective: names for the compiler, numbers for the kernel.

    Attributes:
        policy, kl, correction: of `objective.POLICIES`, `KL_ESTIMATORS` and `CORRECTIONS`.
        kl_times_ratio: whether the KL estimate is multiplied by the ratio.
        parameters: `[P]` float32, from `objective.objective_parameters`.
    """

    policy: str
    kl: str
    kl_times_ratio: bool
    correction: str
    parameters: Tensor

    def __post_init__(self) -> None:
        for name, known in (("policy", POLICIES), ("kl", KL_ESTIMATORS), ("correction", CORRECTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {getattr(self, name)!r}")


_TOKENS = ("weights", "advantages", "old_logprobs", "ref_logprobs", "sampling_logprobs", "importance")
_NUMBERS = ("parameters", "entropy_gradient", "grad_scale")
RESULTS = {"logprobs": torch.float32, "entropy": torch.float32, "live": torch.bool}


@triton.jit
def objective_row(
    row,
    x,
    dx,
    bias,
    target,
    num_columns,
    factor,
    cap_scale,
    chain,
    weights,
    advantages,
    old_logprobs,
    ref_logprobs,
    sampling_logprobs,
    importance,
    parameters,
    entropy_gradient,
    grad_scale,
    logprobs,
    entropy,
    live,
    POLICY: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    CORRECTION: tl.constexpr,
    TRANSFORM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Both sweeps of a row, and its objective between; x, dx and bias point at the row. Writes its results and dx.

    Returns (g, e), times `grad_scale`.
    """
    logprob, row_entropy, lse2 = row_logprob(x, bias, target, num_columns, factor, cap_scale, TRANSFORM, LANES)
    _, term_slope = token_term(
        row,
        logprob,
        advantages,
        old_logprobs,
        ref_logprobs,
        sampling_logprobs,
        importance,
        parameters,
        POLICY,
        KL,
        KL_TIMES_RATIO,
        CORRECTION,
    )
    g = tl.load(weights + row) * term_slope
    e = 0.0
    if entropy_gradient is not None:
        e = tl.load(entropy_gradient)
    tl.store(logprobs + row, logprob)
    tl.store(entropy + row, row_entropy)
    tl.store(live + row, (g != 0) | (e != 0))
    if grad_scale is not None:
        g *= tl.load(grad_scale)
        e *= tl.load(grad_scale)
    row_gradient(
        x,
        dx,
        bias,
        target,
        num_columns,
        factor,
        cap_scale,
        chain,
        lse2,
        row_entropy,
        g,
        e,
        TRANSFORM,
        entropy_gradient is not None,
        IN_PLACE,
        LANES,
    )
    return g, e


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=[*UNALIGNED, *_TOKENS, *_NUMBERS, "live"],
)
def _row_objective_kernel(
    logits,  # [R, V], or [N] with offsets
    row_stride,  # None with offsets, as num_columns is
    offsets,  # [R + 1] int64 or None
    dx,  # [R, V] (with offsets [N]) out, perhaps over the logits
    dx_stride,
    targets,  # [R] int64
    bias,  # [V], with offsets [N], or None
    row_temperature,  # [R] float32 or None
    weights,  # [R] float32
    advantages,  # [R] float32
    old_logprobs,  # [R] float32 or None
    ref_logprobs,  # [R] float32 or None
    sampling_logprobs,  # [R] float32 or None
    importance,  # [R] float32 or None
    parameters,  # [P] float32, of objective.PARAMETERS
    entropy_gradient,  # [1] float32 or None
    grad_scale,  # [1] float32 or None: multiplies dx
    logprobs,  # [R] float32, out
    entropy,  # [R] float32, out
    live,  # [R] bool, out: whether dx is not zero
    num_rows,
    num_columns,
    factor,
    cap_scale,
    chain,
    POLICY: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    CORRECTION: tl.constexpr,
    TRANSFORM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    LANES: tl.constexpr,
):
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        start, columns = row_place(row, row_stride, offsets, num_columns)
        dx_start, _ = row_place(row, dx_stride, offsets, num_columns)
        row_factor, row_chain = row_scales(row, row_temperature, factor, chain)
        objective_row(
            row,
            logits + start,
            dx + dx_start,
            row_bias(bias, start, offsets),
            tl.load(targets + row),
            columns,
            row_factor,
            cap_scale,
            row_chain,
            weights,
            advantages,
            old_logprobs,
            ref_logprobs,
            sampling_logprobs,
            importance,
            parameters,
            entropy_gradient,
            grad_scale,
            logprobs,
            entropy,
            live,
            POLICY,
            KL,
            KL_TIMES_RATIO,
            CORRECTION,
            TRANSFORM,
            IN_PLACE,
            LANES,
        )


def row_objective_of(
    rows: Rows,
    objective: Objective,
    tokens: Mapping[str, Tensor | None],
    dx: Tensor,
    *,
    entropy_gradient: Tensor | None,
    grad_scale: Tensor | None,
    results: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write dx `[R, V]` (memory of its own, or `dx_over(logits, dtype)`); return (logprobs, entropy, live) `[R]`.

    logprobs and dx are NaN where the target is outside `[0, V)`.

    Args:
        tokens: `weights`, `advantages`, and `old_logprobs`, `ref_logprobs`, `sampling_logprobs`, `importance` or None,
            each `[R]` float32, contiguous.
        entropy_gradient: `[1]` float32, d loss / d entropy of every row, or None for zero.
        grad_scale: `[1]` float32, multiplies dx, or None for one.
        results: where to write the three, float32, float32 and bool; new tensors if None.
    """
    written = rows.results(results, RESULTS)
    arguments = {
        "dx": dx,
        "dx_stride": rows.stride_of(dx),
        "parameters": objective.parameters,
        "entropy_gradient": entropy_gradient,
        "grad_scale": grad_scale,
        "POLICY": POLICIES[objective.policy],
        "KL": objective.kl,
        "KL_TIMES_RATIO": objective.kl_times_ratio,
        "CORRECTION": objective.correction,
        "IN_PLACE": dx.untyped_storage()._cdata == rows.logits.untyped_storage()._cdata,
    }
    rows.run(_row_objective_kernel, arguments | written | tokens)
    return written["logprobs"], written["entropy"], written["live"]


_OPTIONAL = (*_TOKENS[2:], "entropy_gradient", "grad_scale")
# policy, KL, times ratio, correction, which optional tensors are given
_VARIANTS: tuple[tuple[str, str, bool, str, tuple[str, ...]], ...] = (
    ("clipped", "none", True, "none", ("old_logprobs",)),
    ("cispo", "k1", True, "token_truncate", ("old_logprobs", "ref_logprobs", "sampling_logprobs")),
    ("sapo", "k2", False, "weight", ("ref_logprobs", "importance", "grad_scale")),
    ("dppo", "k3", True, "token_mask", ("old_logprobs", "ref_logprobs", "sampling_logprobs", "entropy_gradient")),
    ("ppo_dual", "k3", False, "none", ("old_logprobs", "ref_logprobs", "entropy_gradient", "grad_scale")),
    ("reinforce", "none", False, "none", ()),
)


def _example_launch(example: Example, variant: int, *, in_place: bool) -> Configuration:
    policy, kl, kl_times_ratio, correction, given = _VARIANTS[variant]
    dx = example.dx()
    results = {name: example.per_row(dtype) for name, dtype in RESULTS.items()}
    arguments = {name: example.per_row() if name in given else None for name in _OPTIONAL} | {
        "dx": dx,
        "dx_stride": example.rows.stride_of(dx),
        "weights": example.per_row(),
        "advantages": example.per_row(),
        "parameters": example.per_row(),
        "POLICY": POLICIES[policy],
        "KL": kl,
        "KL_TIMES_RATIO": kl_times_ratio,
        "CORRECTION": correction,
        "IN_PLACE": in_place,
    }
    return Configuration.of_launch(
        f"row_objective, {policy}, {example.label}{', in place' if in_place else ''}",
        _row_objective_kernel,
        example.arguments() | results | arguments,
        arches=example.arches,
        sweep_bytes=example.sweep_bytes,
    )


def aot_configurations() -> Iterator[Configuration]:
    """Every launch of the table with the plain objective and with the one that keeps most; each objective once."""
    for example in examples():
        in_place = example.full or example.rows.offsets is not None
        yield _example_launch(example, 3 if example.full else 0, in_place=in_place)
        if not example.full and example.launch.lanes == 512:
            for variant in range(1, len(_VARIANTS)):
                yield _example_launch(example, variant, in_place=False)
