"""Every plan and storage once on fake CUDA tensors: devices, dtypes and shapes are a GPU's, values there are none.

What would have to read a value back raises by itself (FakeTensorMode has none to give), and copies between host and
device are counted. Kernels are not launched: the launcher and the extension are stand-ins that look at what they get.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_fast import devices
from grpo_fast.backends import cuda as cuda_backend
from grpo_fast.backends import triton as triton_backend
from grpo_fast.backends.base import get_backend
from grpo_fast.config import LossConfig
from grpo_fast.loss import grpo_loss, token_logprobs
from grpo_fast.ops import call as calls
from tests.allocations import OPERATORS
from tests.stand_in import Streams

pytest.importorskip("triton")
from grpo_fast.kernels import group_rows, launcher, objective, row_gradient, row_objective, row_statistics, scale  # noqa: F401

CARD = torch.device("cuda", 0)
GIB = 2**30
T, H, V, S = 4096, 256, 32000, 8
EVERY_ROW = LossConfig(beta=0.1, entropy_coef=0.01)
GSPO = LossConfig(loss_type="grpo", importance_sampling_level="sequence", beta=0.1)


class Watch(TorchDispatchMode):
    """Copies between host and device, and operators on another device than the card."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OPERATORS:
            with self:
                return OPERATORS[func](*args, **kwargs)
        given = {a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() > 0}
        result = func(*args, **kwargs)
        made = {
            r.device.type for r in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(r, Tensor)
        }
        if len(given | made) > 1:
            self.copies.append(func.__name__)
        return result


class Extension(ModuleType):
    """grpo_fast._cuda: takes addresses and sizes, does nothing."""

    ARCHITECTURES = "none"

    def __init__(self) -> None:
        super().__init__("_cuda")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.DType = type("DType", (), {"__getattr__": lambda self, name: name})()
        self.PARAMETERS = objective.PARAMETERS
        self.Objective = lambda **given: SimpleNamespace(**given)
        self.Rows = lambda **given: SimpleNamespace(**given)
        self.narrow_offset = lambda columns: 2 * (columns // 8 * 8)
        for name in ("row_statistics", "row_objective", "row_gradient"):
            setattr(self, name, lambda *args, _name=name, **given: self.calls.append((_name, given)))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A Hopper GPU, as far as questions about it go."""
    seen = SimpleNamespace(launches=[], extension=Extension(), streams=Streams())
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr("grpo_fast.backends.triton._why_not_running", lambda device: None)
    monkeypatch.setattr(cuda_backend, "_cuda", seen.extension)
    monkeypatch.setattr(cuda_backend, "_queue", lambda tensor: {"device": tensor.device.index, "stream": 7})
    monkeypatch.setattr(Tensor, "data_ptr", lambda self: 256)
    monkeypatch.setitem(devices.TRAITS, "cuda", replace(devices.TRAITS["cuda"], streams=seen.streams))
    monkeypatch.setattr("grpo_fast.kernels.rows.storage_of", lambda tensor: id(tensor.untyped_storage()), raising=False)

    def launched(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], device: torch.device) -> None:
        assert device == CARD
        assert 0 < grid[0] <= 4 * 132 or "scale" in kernel.fn.__name__
        assert {t.device for t in arguments.values() if isinstance(t, Tensor)} == {CARD}
        seen.launches.append(kernel.fn.__name__)

    # The one copy from the host, made once an objective: fake tensors do not take numbers.
    monkeypatch.setattr(objective, "objective_parameters", lambda values, device: torch.empty(12, device=device))
    triton_backend._objective.cache_clear()
    original = launcher.launch
    for name, module in list(sys.modules.items()):
        if name.startswith("grpo_fast.kernels.") and getattr(module, "launch", None) is original:
            monkeypatch.setattr(module, "launch", launched)
    yield seen
    triton_backend._objective.cache_clear()


@contextmanager
def fake() -> Iterator[Watch]:
    watch = Watch()
    with FakeTensorMode(), watch:
        yield watch


def inputs(dtype: torch.dtype, *, head: bool) -> dict[str, Any]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=CARD)

    return {
        "hidden": empty(T, H, dtype=dtype).requires_grad_(),
        "weight": empty(V, H, dtype=dtype).requires_grad_(head),
        "targets": empty(T, dtype=torch.int64),
        "advantages": empty(S),
        "cu_seqlens": empty(S + 1, dtype=torch.int64),
        "old_logprobs": empty(T),
        "ref_logprobs": empty(T),
        "bias": empty(V, dtype=dtype).requires_grad_(head),
    }


PLANS = ("single_pass", "resident", "recompute", "lean", "frozen_head")


@pytest.mark.parametrize("rows", [None, 1000], ids=["all-rows", "some-rows"])
@pytest.mark.parametrize("row_stream", ["0", "1"], ids=["one-stream", "two-streams"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("backend", ["triton", "cuda", "torch"])
def test_a_step(
    backend: str,
    dtype: torch.dtype,
    plan: str,
    row_stream: str,
    rows: int | None,
    card: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRPO_FAST_ROW_STREAM", row_stream)
    monkeypatch.setattr(calls.HeadCall, "rows_of_sequences", lambda self, segments, mask: [(rows or T) // S] * S)
    config = GSPO if plan == "resident" else LossConfig(beta=0.1) if plan == "frozen_head" else EVERY_ROW
    with fake() as watch:
        given = inputs(dtype, head=plan != "frozen_head")
        mask = None
        if rows is not None:
            mask = torch.empty(T, dtype=torch.bool, device=CARD)
            index = torch.empty(rows, dtype=torch.int64, device=CARD)
            monkeypatch.setattr(calls, "listed_rows", lambda active, num_rows=-1: index)
        watch.copies.clear()
        # frozen_head's workspace holds one tile, the others' several chunks of two
        out = grpo_loss(
            **given, config=config, plan=plan, backend=backend, ignore_index=None, loss_mask=mask,
            workspace_bytes=GIB // 4,
        )  # fmt: skip
        out.loss.backward()
        assert out.plan == plan
        for name, shape in (("hidden", (T, H)), ("weight", (V, H)), ("bias", (V,))):
            grad = given[name].grad
            if given[name].requires_grad:
                assert (tuple(grad.shape), grad.dtype, grad.device) == (shape, dtype, CARD)
        for result in (out.logprobs, out.entropy, out.loss, out.computed, out.metrics.vector):
            assert result.device == CARD
        assert out.logprobs.dtype == torch.float32
        assert not watch.copies
    fused = {
        "triton": [name for name in card.launches if name.startswith("_row")],
        "cuda": [name for name, _ in card.extension.calls],
        "torch": [],
    }[backend]
    assert bool(fused) == (backend != "torch")
    if backend == "cuda":
        assert all(call["device"] == 0 and call["stream"] == 7 for _, call in card.extension.calls)
    if row_stream == "1" and backend != "torch" and plan in ("single_pass", "recompute", "frozen_head"):
        assert len(card.streams.made) == 1


@pytest.mark.parametrize("backend", ["triton", "cuda", "torch"])
@pytest.mark.parametrize("plan", ["auto", "fused_forward"])
def test_logprobs_without_gradient(plan: str, backend: str, card: SimpleNamespace) -> None:
    if plan == "fused_forward" and not get_backend(backend).has_fused_forward:
        pytest.skip("only triton has it")
    if plan == "fused_forward":
        pytest.skip("its descriptors want addresses: tests/test_launches.py")
    with fake() as watch, torch.no_grad():
        given = inputs(torch.bfloat16, head=True)
        watch.copies.clear()
        out = token_logprobs(
            given["hidden"], given["weight"], given["targets"], bias=given["bias"], backend=backend, plan=plan,
            ignore_index=None, temperature=torch.ones(T, device=CARD),
        )  # fmt: skip
        assert out.logprobs.device == out.entropy.device == CARD
        assert not watch.copies


def test_a_wait_would_be_seen(card: SimpleNamespace) -> None:
    """Counting rows is one, and fake tensors do not give the number."""
    with fake():
        given = inputs(torch.bfloat16, head=True)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            grpo_loss(**given, config=LossConfig(), backend="torch", ignore_index=None)
