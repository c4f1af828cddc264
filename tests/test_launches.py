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
from dataclasses import dataclass
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
    row_gradient,
    row_objective,
    row_statistics,
    sparse_rows,
    sparse_weight,
)
from grpo_fast.kernels.configuration import Configuration  # noqa: E402
from grpo_fast.kernels.rows import dx_over  # noqa: E402
from tests.cards import CARD, card  # noqa: E402
from tests.launch_sites import HIDDEN, MULTIPROCESSORS, N_IDS, SITES, TOKENS, R, gathers, rows, supports  # noqa: E402

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
    row_gradient.row_gradient_of(chunk, *slopes, dx_over(chunk.logits, torch.bfloat16), vocab_start=offset)


def objective_at(offset: int) -> None:
    chunk = rows(offset, temperature=card(R, offset=offset))
    tokens = {name: card(R, offset=offset) for name in TOKENS}
    results = [card(R, dtype=dtype, offset=offset) for dtype in (torch.float32, torch.float32, torch.bool)]
    one = card(1, offset=offset)
    row_objective.row_objective_of(
        chunk,
        row_objective.Objective("clipped", "k3", True, "token_mask", card(12, offset=offset)),
        tokens,
        dx_over(chunk.logits, torch.bfloat16),
        entropy_gradient=one,
        grad_scale=one,
        results=results,
    )


def sparse_objective_at(offset: int) -> None:
    hidden, weight, ids, _ = gathers(offset)
    tokens = {name: card(R, offset=offset) for name in TOKENS}
    results = [card(R, dtype=dtype, offset=offset) for dtype in (torch.float32, torch.float32, torch.bool)]
    one = card(1, offset=offset)
    full = row_objective.Objective("clipped", "k3", True, "token_mask", card(12, offset=offset))
    chunk = supports(offset, temperature=card(R, offset=offset))
    options = {"entropy_gradient": one, "grad_scale": one, "results": results}
    sparse_rows.sparse_objective(hidden, weight, ids, chunk, full, tokens, card(R, HIDDEN), **options)


@pytest.mark.parametrize("call", [statistics_at, gradient_at, objective_at, sparse_objective_at])
def test_a_chunk_that_begins_anywhere_compiles_once(call: Callable[[int], None], launches: list[Launch]) -> None:
    for offset in range(4):
        call(offset)
    assert len(launches) == 4
    addresses = {launch.arguments["entropy"].data_ptr() % 16 for launch in launches}
    assert len(addresses) == 4, "the slices are aligned after all"
    assert_compiled_once(launches)


@pytest.mark.parametrize(
    "call",
    [
        lambda offset: sparse_rows.sparse_logits(*gathers(offset), card(N_IDS)),
        lambda offset: sparse_rows.sparse_grad_hidden(card(N_IDS), *gathers(offset)[1:], card(R, HIDDEN)),
    ],
    ids=["logits", "dHidden"],
)
def test_products_on_supports_that_begin_anywhere_compile_once(
    call: Callable[[int], None], launches: list[Launch]
) -> None:
    """And so are summed in one order: hidden states that are not aligned are copied."""
    for offset in range(4):
        call(offset)
    assert len({launch.arguments["ids"].data_ptr() % 16 for launch in launches}) == 4
    assert_compiled_once(launches)


def test_nothing_is_launched_for_no_rows(launches: list[Launch]) -> None:
    hidden, weight, ids, offsets = gathers()
    none, of = card(0), (ids[:0], offsets[:1])
    sparse_rows.sparse_logits(hidden[:0], weight, *of, none)
    sparse_rows.sparse_grad_hidden(none, weight, *of, hidden[:0])
    sparse_weight.sparse_grad_weight(none, hidden[:0], ids[:0], offsets[:0], offsets[:0], weight)
    assert launches == []


def assert_compiled_once(launches: list[Launch]) -> None:
    keys = [(launch.specialization(), launch.options) for launch in launches]
    assert all(key == keys[0] for key in keys)
