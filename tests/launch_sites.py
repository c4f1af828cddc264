"""The launch sites of Triton kernels, each called on a card that does not exist, and what it should launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_fast.kernels import (
    forward_logprobs,
    group_advantages,
    group_rows,
    row_gradient,
    row_objective,
    row_statistics,
    sparse_rows,
    sparse_weight,
)
from grpo_fast.kernels.objective import PARAMETERS, POLICIES
from grpo_fast.kernels.rows import Rows, dx_over
from grpo_fast.kernels.scale import scale_unless_one
from tests.cards import card

MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Expected:
    """A launch. Tensors as "dtype[shape]"; what `aligned` and `constants` do not name is not specialised on."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, object]
    aligned: set[str] = field(default_factory=set)
    constants: set[str] = field(default_factory=set)


R, V = 300, 1000
PITCH = 1024
TOKENS = ("weights", "advantages", "old_logprobs", "ref_logprobs", "sampling_logprobs", "importance")
FLOATS = f"float32[{R}]"
ROWS = {
    "logits": f"float32[{R}, {V}]",
    "row_stride": PITCH,
    "offsets": None,
    "targets": f"int64[{R}]",
    "num_rows": R,
    "num_columns": V,
    "factor": 1 / 0.7 / 0.6931471805599453,
    "cap_scale": 0.0,
    "chain": 1 / 0.7,
    "TRANSFORM": "none",
    "LANES": 512,
}
NO_OPTIONS = {"bias": None, "row_temperature": None}
RESULTS = {"logprobs": FLOATS, "entropy": FLOATS}
ROW_GRID = (R,)


def rows(offset: int = 0, **options: Any) -> Rows:
    return Rows(card(R, PITCH)[:, :V], card(R, dtype=torch.int64, offset=offset), **({"temperature": 0.7} | options))


def objective(policy: str = "clipped", kl: str = "none", correction: str = "none") -> row_objective.Objective:
    return row_objective.Objective(policy, kl, True, correction, card(len(PARAMETERS)))


def launch_statistics() -> None:
    row_statistics.row_statistics_of(rows())


def launch_gradient() -> None:
    chunk, slopes = rows(), [card(R) for _ in range(3)]
    row_gradient.row_gradient_of(chunk, *slopes, None, dx_over(chunk.logits, torch.bfloat16), vocab_start=V)


def launch_gradient_full() -> None:
    chunk = rows(bias=card(V, dtype=torch.bfloat16), temperature=card(R), softcap=30.0)
    row_gradient.row_gradient_of(chunk, *(card(R) for _ in range(4)), card(R, V, dtype=torch.float16))


def launch_objective() -> None:
    tokens = {name: card(R) if name in TOKENS[:2] else None for name in TOKENS}
    chunk = rows()
    row_objective.row_objective_of(
        chunk, objective(), tokens, dx_over(chunk.logits, torch.bfloat16), entropy_gradient=None, grad_scale=None
    )


def launch_objective_full() -> None:
    chunk = rows(bias=card(V), temperature=card(R), logit_scale=-1.0)
    tokens = {name: card(R) for name in TOKENS}
    dx, one = card(R, PITCH, dtype=torch.bfloat16)[:, :V], card(1)
    full = objective("ppo_dual", "k3", "token_mask")
    row_objective.row_objective_of(chunk, full, tokens, dx, entropy_gradient=one, grad_scale=one)


T, H, J = 200, 64, 63
FORWARD = {
    "bias": None,
    "targets": f"int64[{T}]",
    "temperature": None,
    "partials": f"float32[{J}, 4, {T}]",
    "num_rows": T,
    "vocab": 16000,
    "tiles_per_split": 1,
    "width": H // 8,
    "hidden_stride": H // 8,
    "weight_stride": H // 8,
    "inner": 0.0,
    "outer": 1.4426950408889634,
    "DESCRIPTORS": True,
    "UNIT": 8,
    "EVEN_K": True,
    "SOFTCAP": False,
    "NEGATE": False,
    "BLOCK_T": 128,
    "BLOCK_V": 256,
    "BLOCK_K": 64,
    "GROUP_BLOCKS": 16,
}
COMBINE = Expected(
    "_combine_kernel",
    (2,),
    {"partials": f"float32[{J}, 4, {T}]", "num_rows": T, "num_splits": J, "BLOCK_T": 128}
    | dict.fromkeys(("logprobs", "entropy", "lse"), f"float32[{T}]"),
    aligned={"partials", "logprobs", "entropy", "lse"},
)


def launch_forward() -> None:
    hidden, weight = (card(size, H, dtype=torch.bfloat16) for size in (T, 16000))
    forward_logprobs.forward_logprobs(hidden, weight, card(T, dtype=torch.int64))


def launch_forward_pointers() -> None:
    """Operands that are not aligned, with every option."""
    hidden, weight = (card(size, H, dtype=torch.bfloat16, offset=1) for size in (T, 16000))
    options = {"bias": card(16000, dtype=torch.bfloat16), "temperature": card(T, offset=1), "softcap": 30.0}
    forward_logprobs.forward_logprobs(hidden, weight, card(T, dtype=torch.int64, offset=1), **options)


N, K = 24, 3
GROUP = {
    "rewards": f"float32[{N}, {K}]",
    "factors": f"float32[{K}]",
    "order": None,
    "labels": None,
    "out": f"float32[{N}]",
    "num_completions": N,
    "num_rewards": K,
    "group_size": 8,
    "SCALE": "batch",
    "ALONE": False,
    "BLOCK": 32,
}
BATCH = {
    "table": f"float32[{N}, {K}]",
    "rewards": None,
    "factors": f"float32[{K}]",
    "out": f"float32[{N}]",
    "num_completions": N,
    "num_rewards": K,
    "BLOCK": 1024,
}


def launch_advantages() -> None:
    group_advantages.group_advantages(card(N, K), group_size=8, factors=card(K), scale="batch")


def launch_advantages_by_label() -> None:
    order, labels = (card(N, dtype=torch.int64) for _ in range(2))
    group_advantages.group_advantages(card(N, K), order=order, labels=labels, aggregation="normalize_then_sum")


S, P = 16, 2000
COUNT = {
    "advantages": f"float32[{S}]",
    "importance": f"float32[{P}]",
    "mask": f"bool[{P}]",
    "cu_seqlens": f"int64[{S + 1}]",
    "tile_counts": "int32[2, 4]",
    "lengths": f"int32[{S}]",
    "num_tokens": P,
    "num_sequences": S,
    "num_tiles": 4,
    "steps": 4,
    "PER_TOKEN": False,
    "EVERY_ROW": False,
    "BLOCK": 512,
    "STRIDE": 4096,
}
TOKEN_RESULTS = {
    "weights": f"float32[{P}]",
    "token_advantages": f"float32[{P}]",
    "active_rows": f"bool[{P}]",
    "rows": f"int64[{P}]",
    "num_active": "int64[]",
}
WRITE = {"normalizer": None, "SEQUENCE_MEAN": True, "TOKEN_MEAN": False, "STRIDE": 1024} | TOKEN_RESULTS
POINTERS_OF_COUNT = {"advantages", "importance", "mask", "cu_seqlens", "tile_counts", "lengths"}


def launch_token_rows() -> None:
    group_rows.token_rows(
        card(S),
        card(S + 1, dtype=torch.int64),
        mask=card(P, dtype=torch.bool),
        importance=card(P),
        normalizer=None,
        aggregation="sequence_mean",
        every_row=False,
        weights=card(P),
        token_advantages=card(P),
        active=card(P, dtype=torch.bool),
        rows=card(P, dtype=torch.int64),
        num_active=card(dtype=torch.int64),
    )


N_IDS, HIDDEN = 5000, 1024
SUPPORTS = ROWS | {
    "logits": f"float32[{N_IDS}]",
    "row_stride": None,
    "offsets": f"int64[{R + 1}]",
    "num_columns": None,
    "LANES": 128,
}
GATHERS = {
    "weight": f"bfloat16[{V}, {HIDDEN}]",
    "weight_stride": HIDDEN,
    "ids": f"int32[{N_IDS}]",
    "offsets": f"int64[{R + 1}]",
    "width": HIDDEN,
    "ENTRIES": 8,
    "COLUMNS": 512,
}
HIDDEN_STATES = {"hidden": f"bfloat16[{R}, {HIDDEN}]", "hidden_stride": HIDDEN}
GRAD_HIDDEN = {"grad_hidden": f"float32[{R}, {HIDDEN}]", "grad_stride": HIDDEN}
OPERANDS = {"hidden", "hidden_stride", "weight", "weight_stride", "width"}


def supports(offset: int = 0, **options: Any) -> Rows:
    given = {"temperature": 0.7} | options
    offsets, targets = (card(size, dtype=torch.int64, offset=offset) for size in (R + 1, R))
    return Rows(card(N_IDS), targets, offsets=offsets, **given)


def gathers(offset: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, ids and offsets. A slice of the hidden states begins anywhere."""
    hidden = card(R, HIDDEN, dtype=torch.bfloat16, offset=offset)
    ids, offsets = card(N_IDS, dtype=torch.int32, offset=offset), card(R + 1, dtype=torch.int64, offset=offset)
    return hidden, card(V, HIDDEN, dtype=torch.bfloat16), ids, offsets


def launch_statistics_of_supports() -> None:
    row_statistics.row_statistics_of(supports())


def launch_gradient_of_supports() -> None:
    chunk = supports(bias=card(N_IDS, dtype=torch.bfloat16), temperature=card(R), softcap=30.0)
    row_gradient.row_gradient_of(chunk, *(card(R) for _ in range(4)), chunk.logits)


def launch_objective_of_supports() -> None:
    tokens, chunk = {name: card(R) if name in TOKENS[:2] else None for name in TOKENS}, supports()
    row_objective.row_objective_of(chunk, objective(), tokens, chunk.logits, entropy_gradient=None, grad_scale=None)


def launch_sparse_logits() -> None:
    sparse_rows.sparse_logits(*gathers(), card(N_IDS))


def launch_sparse_grad_hidden() -> None:
    sparse_rows.sparse_grad_hidden(card(N_IDS), *gathers()[1:], card(R, HIDDEN))


def launch_sparse_objective() -> None:
    hidden, weight, ids, _ = gathers()
    tokens = {name: card(R) if name in TOKENS[:2] else None for name in TOKENS}
    sparse_rows.sparse_objective(
        hidden, weight, ids, supports(), objective(), tokens, None, entropy_gradient=None, grad_scale=None
    )


def launch_sparse_objective_full() -> None:
    hidden, weight, ids, _ = gathers()
    chunk, one = supports(bias=card(N_IDS, dtype=torch.bfloat16), temperature=card(R), logit_scale=-1.0), card(1)
    full = objective("ppo_dual", "k3", "token_mask")
    tokens = {name: card(R) for name in TOKENS}
    options = {"entropy_gradient": one, "grad_scale": one}
    sparse_rows.sparse_objective(hidden, weight, ids, chunk, full, tokens, card(R, HIDDEN), **options)


def launch_sparse_weight() -> None:
    hidden = gathers()[0]
    ids, places = card(N_IDS, dtype=torch.int32), card(N_IDS, dtype=torch.int64)
    sparse_weight.sparse_grad_weight(card(N_IDS), hidden, ids, places, places, card(V, HIDDEN))


def launch_scale() -> None:
    scale_unless_one(card(3, 5000, dtype=torch.bfloat16), card())


# Pointers to one number a row, and numbers of rows, are nothing to compile for: chunks are of any length and begin
# anywhere. Everything that threads walk over is: logits, dx, bias, their strides.
WALKED = {"logits", "row_stride"}
SITES: dict[str, tuple[Callable[[], None], list[Expected]]] = {
    "statistics": (
        launch_statistics,
        [Expected("_row_statistics_kernel", ROW_GRID, ROWS | NO_OPTIONS | RESULTS | {"lse": FLOATS}, WALKED)],
    ),
    "gradient": (
        launch_gradient,
        [
            Expected(
                "_row_gradient_kernel",
                ROW_GRID,
                ROWS
                | NO_OPTIONS
                | dict.fromkeys(("lse", "entropy", "g"), FLOATS)
                | {"dx": f"bfloat16[{R}, {V}]", "dx_stride": 2 * PITCH, "e": None, "vocab_start": V, "IN_PLACE": True},
                WALKED | {"dx", "dx_stride"},
            )
        ],
    ),
    "gradient, full": (
        launch_gradient_full,
        [
            Expected(
                "_row_gradient_kernel",
                ROW_GRID,
                ROWS
                | {"bias": f"bfloat16[{V}]", "row_temperature": FLOATS, "TRANSFORM": "softcap", "chain": 1.0}
                | {"factor": 30 / 0.6931471805599453, "cap_scale": 2 / 30 / 0.6931471805599453}
                | dict.fromkeys(("lse", "entropy", "g", "e"), FLOATS)
                | {"dx": f"float16[{R}, {V}]", "dx_stride": V, "vocab_start": 0, "IN_PLACE": False},
                WALKED | {"bias", "dx"},
            )
        ],
    ),
    "objective": (
        launch_objective,
        [
            Expected(
                "_row_objective_kernel",
                ROW_GRID,
                ROWS
                | NO_OPTIONS
                | RESULTS
                | {name: FLOATS if name in TOKENS[:2] else None for name in TOKENS}
                | {"live": f"bool[{R}]", "parameters": "float32[12]", "entropy_gradient": None, "grad_scale": None}
                | {"dx": f"bfloat16[{R}, {V}]", "dx_stride": 2 * PITCH, "IN_PLACE": True}
                | {"POLICY": POLICIES["clipped"], "KL": "none", "KL_TIMES_RATIO": True, "CORRECTION": "none"},
                WALKED | {"dx", "dx_stride"},
            )
        ],
    ),
    "objective, full": (
        launch_objective_full,
        [
            Expected(
                "_row_objective_kernel",
                ROW_GRID,
                ROWS
                | {"bias": f"float32[{V}]", "row_temperature": FLOATS, "TRANSFORM": "negate"}
                | {"factor": 1 / 0.6931471805599453, "chain": -1.0}
                | RESULTS
                | dict.fromkeys(TOKENS, FLOATS)
                | {"live": f"bool[{R}]", "parameters": "float32[12]"}
                | dict.fromkeys(("entropy_gradient", "grad_scale"), "float32[1]")
                | {"dx": f"bfloat16[{R}, {V}]", "dx_stride": PITCH, "IN_PLACE": False}
                | {"POLICY": POLICIES["ppo_dual"], "KL": "k3", "KL_TIMES_RATIO": True, "CORRECTION": "token_mask"},
                WALKED | {"bias", "dx", "dx_stride"},
            )
        ],
    ),
    "statistics of supports": (
        launch_statistics_of_supports,
        [Expected("_row_statistics_kernel", ROW_GRID, SUPPORTS | NO_OPTIONS | RESULTS | {"lse": FLOATS}, {"logits"})],
    ),
    "gradient of supports": (
        launch_gradient_of_supports,
        [
            Expected(
                "_row_gradient_kernel",
                ROW_GRID,
                SUPPORTS
                | {"bias": f"bfloat16[{N_IDS}]", "row_temperature": FLOATS, "TRANSFORM": "softcap", "chain": 1.0}
                | {"factor": 30 / 0.6931471805599453, "cap_scale": 2 / 30 / 0.6931471805599453}
                | dict.fromkeys(("lse", "entropy", "g", "e"), FLOATS)
                | {"dx": f"float32[{N_IDS}]", "dx_stride": None, "vocab_start": 0, "IN_PLACE": True},
                {"logits", "dx", "bias"},
            )
        ],
    ),
    "objective of supports": (
        launch_objective_of_supports,
        [
            Expected(
                "_row_objective_kernel",
                ROW_GRID,
                SUPPORTS
                | NO_OPTIONS
                | RESULTS
                | {name: FLOATS if name in TOKENS[:2] else None for name in TOKENS}
                | {"live": f"bool[{R}]", "parameters": "float32[12]", "entropy_gradient": None, "grad_scale": None}
                | {"dx": f"float32[{N_IDS}]", "dx_stride": None, "IN_PLACE": True}
                | {"POLICY": POLICIES["clipped"], "KL": "none", "KL_TIMES_RATIO": True, "CORRECTION": "none"},
                {"logits", "dx"},
            )
        ],
    ),
    "sparse logits": (
        launch_sparse_logits,
        [
            Expected(
                "_sparse_logits_kernel",
                ROW_GRID,
                GATHERS | HIDDEN_STATES | {"products": f"float32[{N_IDS}]"},
                OPERANDS | {"products"},
            )
        ],
    ),
    "sparse dHidden": (
        launch_sparse_grad_hidden,
        [
            Expected(
                "_sparse_grad_hidden_kernel",
                ROW_GRID,
                GATHERS | GRAD_HIDDEN | {"dx": f"float32[{N_IDS}]"},
                {"weight", "weight_stride", "width", "dx", "grad_hidden", "grad_stride"},
            )
        ],
    ),
    "sparse objective": (
        launch_sparse_objective,
        [
            Expected(
                "_sparse_objective_kernel",
                ROW_GRID,
                {k: v for k, v in SUPPORTS.items() if k not in ("logits", "row_stride", "num_rows", "num_columns")}
                | GATHERS
                | HIDDEN_STATES
                | NO_OPTIONS
                | RESULTS
                | {name: FLOATS if name in TOKENS[:2] else None for name in TOKENS}
                | {"live": f"bool[{R}]", "parameters": "float32[12]", "entropy_gradient": None, "grad_scale": None}
                | {"dx": f"float32[{N_IDS}]", "grad_hidden": None, "grad_stride": None}
                | {"POLICY": POLICIES["clipped"], "KL": "none", "KL_TIMES_RATIO": True, "CORRECTION": "none"},
                OPERANDS | {"dx"},
            )
        ],
    ),
    "sparse objective, full": (
        launch_sparse_objective_full,
        [
            Expected(
                "_sparse_objective_kernel",
                ROW_GRID,
                {k: v for k, v in SUPPORTS.items() if k not in ("logits", "row_stride", "num_rows", "num_columns")}
                | GATHERS
                | HIDDEN_STATES
                | GRAD_HIDDEN
                | {"bias": f"bfloat16[{N_IDS}]", "row_temperature": FLOATS, "TRANSFORM": "negate"}
                | {"factor": 1 / 0.6931471805599453, "chain": -1.0}
                | RESULTS
                | dict.fromkeys(TOKENS, FLOATS)
                | {"live": f"bool[{R}]", "parameters": "float32[12]", "dx": f"float32[{N_IDS}]"}
                | dict.fromkeys(("entropy_gradient", "grad_scale"), "float32[1]")
                | {"POLICY": POLICIES["ppo_dual"], "KL": "k3", "KL_TIMES_RATIO": True, "CORRECTION": "token_mask"},
                OPERANDS | {"dx", "bias", "grad_hidden", "grad_stride"},
            )
        ],
    ),
    "sparse dWeight": (
        launch_sparse_weight,
        [
            Expected(
                "_sparse_weight_kernel",
                (1056, 4),  # 32 programs a multiprocessor, over four blocks of columns
                HIDDEN_STATES
                | dict.fromkeys(("entries", "rows"), f"int64[{N_IDS}]")
                | {"dx": f"float32[{N_IDS}]", "ids": f"int32[{N_IDS}]", "starts": f"int64[{N_IDS + 1}]"}
                | {"num_ids": "int64[1]", "out": f"float32[{V}, {HIDDEN}]", "out_stride": HIDDEN, "width": HIDDEN}
                | {"ENTRIES": 16, "COLUMNS": 256},
                {"hidden", "hidden_stride", "out", "out_stride", "width"},
            )
        ],
    ),
    "forward": (
        launch_forward,
        [
            Expected(
                "_forward_kernel",
                (2 * J,),
                FORWARD
                | {"hidden": f"bfloat16[{T}, {H}] in blocks [128, 64]"}
                | {"weight": f"bfloat16[16000, {H}] in blocks [256, 64]"},
                {"partials"},
            ),
            COMBINE,
        ],
    ),
    "forward, pointers": (
        launch_forward_pointers,
        [
            Expected(
                "_forward_kernel",
                (4 * 125,),
                FORWARD
                | {"hidden": f"bfloat16[{T}, {H}]", "weight": f"bfloat16[16000, {H}]", "bias": "bfloat16[16000]"}
                | {"temperature": f"float32[{T}]", "partials": f"float32[125, 4, {T}]", "DESCRIPTORS": False}
                | {"UNIT": 1, "SOFTCAP": True, "width": H, "hidden_stride": H, "weight_stride": H}
                | {"inner": 2 * 1.4426950408889634 / 30, "outer": 30 * 1.4426950408889634}
                | {"BLOCK_T": 64, "BLOCK_V": 128, "BLOCK_K": 16},
                {"partials"},
            ),
            Expected(
                "_combine_kernel",
                (2,),
                COMBINE.arguments | {"partials": f"float32[125, 4, {T}]", "num_splits": 125},
                COMBINE.aligned,
            ),
        ],
    ),
    "advantages": (
        launch_advantages,
        [
            Expected("_group_kernel", (3, 1), GROUP, {"rewards", "factors", "out"}),
            Expected("_batch_kernel", (1,), BATCH, {"table", "factors", "out"}),
        ],
    ),
    "advantages by label": (
        launch_advantages_by_label,
        [
            Expected(
                "_group_kernel",
                (N, K),
                GROUP
                | {"factors": None, "order": f"int64[{N}]", "labels": f"int64[{N}]", "out": f"float32[{N}, {K}]"}
                | {"group_size": 0, "SCALE": "group", "ALONE": True, "BLOCK": 128},
                {"rewards", "order", "labels", "out"},
            ),
            Expected(
                "_batch_kernel",
                (1,),
                BATCH | {"factors": None, "rewards": f"float32[{N}, {K}]"},
                {"table", "rewards", "out"},
            ),
        ],
    ),
    "token rows": (
        launch_token_rows,
        [
            Expected("_count_kernel", (4 + S,), COUNT, POINTERS_OF_COUNT),
            Expected("_write_kernel", (4,), COUNT | WRITE, POINTERS_OF_COUNT | set(TOKEN_RESULTS)),
        ],
    ),
    "factor": (
        launch_scale,
        [
            Expected(
                "_scale_kernel",
                (4,),
                {"values": "bfloat16[3, 5000]", "factor": "float32[]", "num_elements": 15000, "BLOCK": 4096},
                {"values"},
            )
        ],
    ),
}
