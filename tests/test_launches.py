"""Every launch of a Triton kernel, seen by a stand-in for Triton's runtime: the device that is current, the grid, each
argument, and what the compiler will specialise on.

Two cards are made up: `cuda:0` is current, tensors say that they are on `cuda:1`. Their memory is the CPU's, so that
addresses and their alignment are real. Launches through csrc/ are tests/test_cuda_build.py's.
"""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="kernels are launched by triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have another runtime", allow_module_level=True)

from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from grpo_fast.kernels import (  # noqa: E402
    aot,
    forward_logprobs,
    group_advantages,
    group_rows,
    row_gradient,
    row_objective,
    row_statistics,
)
from grpo_fast.kernels.configuration import Configuration  # noqa: E402
from grpo_fast.kernels.objective import PARAMETERS, POLICIES  # noqa: E402
from grpo_fast.kernels.rows import Rows  # noqa: E402
from grpo_fast.kernels.scale import scale_unless_one  # noqa: E402
from tests.cards import CARD, card  # noqa: E402

MULTIPROCESSORS = 132
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


@dataclass
class Launch:
    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    current: int

    def specialization(self) -> dict[str, tuple[str, Any]]:
        """By argument, type and key, as Triton takes a launch apart."""
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, CUDABackend)
        bound, found, _ = binder(**self.arguments)
        return dict(zip(bound, found, strict=True))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """What is launched, in order."""
    current, seen = [0], []

    def exchange(index: int) -> int:
        before, current[0] = current[0], index
        return before

    def run(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        assert not warmup
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        options = {name: given.pop(name) for name in OPTIONS & given.keys()}
        seen.append(Launch(self, grid, given, options, current[0]))

    monkeypatch.setattr(JITFunction, "run", run)
    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    forward_logprobs._device_facts.cache_clear()
    yield seen
    forward_logprobs._device_facts.cache_clear()
    assert current == [0], "the device that was current is current again"


# -- the launch sites -------------------------------------------------------------------------------------------------


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
    row_gradient.row_gradient_of(chunk, *slopes, None, chunk.dx(torch.bfloat16), vocab_start=V)


def launch_gradient_full() -> None:
    chunk = rows(bias=card(V, dtype=torch.bfloat16), temperature=card(R), softcap=30.0)
    row_gradient.row_gradient_of(chunk, *(card(R) for _ in range(4)), card(R, V, dtype=torch.float16))


def launch_objective() -> None:
    tokens = {name: card(R) if name in TOKENS[:2] else None for name in TOKENS}
    chunk = rows()
    row_objective.row_objective_of(
        chunk, objective(), tokens, chunk.dx(torch.bfloat16), entropy_gradient=None, grad_scale=None
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


def described(value: object) -> object:
    """A tensor as "dtype[shape]"; anything else as it is."""
    if isinstance(value, TensorDescriptor):
        assert value.padding == "zero"
        return f"{described(value.base)} in blocks {value.block_shape}"
    if not isinstance(value, Tensor):
        return value
    assert value.device == CARD
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


@pytest.mark.parametrize("site", SITES)
def test_a_launch_site(site: str, launches: list[Launch]) -> None:
    call, expected = SITES[site]
    call()
    assert [launch.kernel.__name__ for launch in launches] == [each.kernel for each in expected]
    for launch, wanted in zip(launches, expected, strict=True):
        assert launch.current == CARD.index, f"{wanted.kernel} is launched on another device than its tensors'"
        assert launch.grid == wanted.grid
        assert set(launch.arguments) == set(launch.kernel.arg_names)
        found = {name: described(value) for name, value in launch.arguments.items()}
        numbers = {name for name, value in wanted.arguments.items() if isinstance(value, float)}
        assert {name: found[name] for name in numbers} == pytest.approx(
            {name: wanted.arguments[name] for name in numbers}
        )
        assert {k: v for k, v in found.items() if k not in numbers} == {
            k: v for k, v in wanted.arguments.items() if k not in numbers
        }
        assert launch.options["enable_fp_fusion"] is False
        assert launch.options["num_warps"] in (1, 2, 4, 8, 16, 32)

        special = launch.specialization()
        marked = {name: constexpr.is_constexpr for name, constexpr in _parameters(launch.kernel).items()}
        aligned = {name for name, (kind, key) in special.items() if kind != "constexpr" and key == "D"}
        constants = {name for name, (kind, _) in special.items() if kind == "constexpr" and not marked[name]}
        absent = {name for name, value in launch.arguments.items() if value is None}
        assert aligned == wanted.aligned
        assert constants == wanted.constants | absent


def _parameters(kernel: JITFunction) -> dict[str, Any]:
    return {parameter.name: parameter for parameter in kernel.params}


@pytest.mark.parametrize("site", [name for name in SITES if not name.startswith("forward")])
def test_what_is_compiled_ahead_is_what_is_launched(site: str, launches: list[Launch]) -> None:
    """`Configuration.of_launch`, by which kernels are judged without a GPU, against Triton's own rules."""
    SITES[site][0]()
    for launch in launches:
        special = launch.specialization()
        options = {name: value for name, value in launch.options.items() if name != "enable_fp_fusion"}
        found = Configuration.of_launch(site, launch.kernel, launch.arguments | options)
        assert found.signature == {name: kind for name, (kind, _) in special.items() if kind != "constexpr"}
        assert set(found.divisible) == {n for n, (kind, key) in special.items() if kind != "constexpr" and key == "D"}


def test_every_kernel_has_a_site() -> None:
    modules = [importlib.import_module(f"grpo_fast.kernels.{name}") for name in aot.MODULES]
    kernels = {name for module in modules for name, value in vars(module).items() if _launched(name, value)}
    assert kernels == {each.kernel for _, expected in SITES.values() for each in expected}


def _launched(name: str, value: object) -> bool:
    return isinstance(value, JITFunction) and name.endswith("_kernel")


def test_only_the_launcher_launches() -> None:
    for path in (Path(__file__).resolve().parent.parent / "kernels").glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        launched = [ast.unparse(call.func) for call in calls if isinstance(call.func, ast.Subscript)]
        assert launched == (["kernel[grid]"] if path.name == "launcher.py" else []), path.name


# -- chunks begin anywhere --------------------------------------------------------------------------------------------


def statistics_at(offset: int) -> None:
    out = [card(R, offset=offset) for _ in range(3)]
    row_statistics.row_statistics_of(rows(offset, temperature=card(R, offset=offset)), out)


def gradient_at(offset: int) -> None:
    chunk = rows(offset, temperature=card(R, offset=offset))
    slopes = [card(R, offset=offset) for _ in range(4)]
    row_gradient.row_gradient_of(chunk, *slopes, chunk.dx(torch.bfloat16), vocab_start=offset)


def objective_at(offset: int) -> None:
    chunk = rows(offset, temperature=card(R, offset=offset))
    tokens = {name: card(R, offset=offset) for name in TOKENS}
    results = [card(R, dtype=dtype, offset=offset) for dtype in (torch.float32, torch.float32, torch.bool)]
    one = card(1, offset=offset)
    row_objective.row_objective_of(
        chunk,
        row_objective.Objective("clipped", "k3", True, "token_mask", card(12, offset=offset)),
        tokens,
        chunk.dx(torch.bfloat16),
        entropy_gradient=one,
        grad_scale=one,
        results=results,
    )


@pytest.mark.parametrize("call", [statistics_at, gradient_at, objective_at])
def test_a_chunk_that_begins_anywhere_compiles_once(call: Callable[[int], None], launches: list[Launch]) -> None:
    for offset in range(4):
        call(offset)
    assert len(launches) == 4
    addresses = {launch.arguments["entropy"].data_ptr() % 16 for launch in launches}
    assert len(addresses) == 4, "the slices are aligned after all"
    keys = [(launch.specialization(), launch.options) for launch in launches]
    assert all(key == keys[0] for key in keys)
