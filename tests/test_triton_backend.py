"""The triton backend without a GPU: when it is there, why it is not, what its workspace holds."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from grpo_fast.backends import base as backend
from grpo_fast.backends.base import get_backend, native_objective, resolve_backend
from grpo_fast.backends.triton import _objective
from grpo_fast.config import LossConfig
from grpo_fast.inputs import token_inputs
from grpo_fast.losses import Segments
from grpo_fast.objectives import Tokens, _kernel_objective, kernel_objective
from grpo_fast.ops import operators
from grpo_fast.ops.call import default_workspace_bytes, row_budget, tuning

GPU = torch.device("cuda", 0)
MIB = 2**20
MASK = torch.ones(2, dtype=torch.bool)
TOKENS = Tokens(torch.ones(2), MASK, Segments(torch.tensor([0, 2]), 2), MASK.sum())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a Hopper GPU, as far as questions about it go; and without native code."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("grpo_fast.backends.triton._why_not_running", lambda device: None)
    monkeypatch.setattr("grpo_fast.backends.cpu._C", None)
    monkeypatch.setattr(backend, "_announced", set())
    return monkeypatch


def test_auto_takes_triton_on_a_gpu_and_says_so_once(gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    with caplog.at_level(logging.INFO, logger="grpo_fast"):
        assert resolve_backend("auto", GPU) == resolve_backend("auto", GPU) == "triton"
    assert [r.message for r in caplog.records] == ["backend auto: using 'triton' on cuda"]


def test_auto_without_triton(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr("grpo_fast.backends.triton.find_spec", lambda name: None)
    assert resolve_backend("auto", GPU) == "torch"
    with pytest.raises(ValueError, match=r"'triton' is not available on cuda:0: Triton is not installed; pip install"):
        resolve_backend("triton", GPU)


def test_auto_where_triton_cannot_compile(gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A3: installed is not enough. The next backend serves, losses and groups, and the reason is said once."""
    pytest.importorskip("triton")
    gpu.setattr("grpo_fast.backends.triton._why_not_running", lambda device: "RuntimeError: Failed to find C compiler")
    with caplog.at_level(logging.INFO, logger="grpo_fast"):
        assert resolve_backend("auto", GPU) == resolve_backend("auto", GPU) == "torch"
    said = "backend auto: using 'torch' on cuda; not 'triton': RuntimeError: Failed to find C compiler"
    assert [r.message for r in caplog.records] == [said]
    with pytest.raises(
        ValueError, match="'triton' is not available on cuda:0: RuntimeError: Failed to find C compiler"
    ):
        resolve_backend("triton", GPU)


def test_triton_that_does_not_import(gpu: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    gpu.undo()
    gpu.setattr(torch.cuda, "is_available", lambda: True)
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    gpu.setitem(sys.modules, "grpo_fast.kernels.probe", None)
    with pytest.raises(ValueError, match="'triton' is not available on cuda:0: Triton does not import: "):
        resolve_backend("triton", GPU)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_no_driver_is_a_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D6: our own words, not torch's exception."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("grpo_fast.backends.cuda._cuda", object())
    with pytest.raises(ValueError, match=rf"backend: '{name}' is not available on cuda:0: torch sees no CUDA device"):
        resolve_backend(name, GPU)


@pytest.mark.parametrize("name", ["torch", "cuda", "cpu", "triton"])
def test_group_rows_are_the_backends_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A3: a loss by `torch` or `cuda` launches no Triton kernel for its rows."""
    pytest.importorskip("triton")
    from grpo_fast.kernels import group_rows

    asked = []
    monkeypatch.setattr(group_rows, "token_rows", lambda *args, **given: asked.append("triton"))
    if get_backend("cpu").why_unavailable(torch.device("cpu")) is not None:
        pytest.skip("needs grpo_fast._C")
    rows = token_inputs(
        torch.ones(4), (4,), torch.ones(2), cu_seqlens=torch.tensor([0, 2, 4]), loss_mask=None, config=LossConfig(),
        normalizer=None, backend=name,
    ).active  # fmt: skip
    assert rows is not None
    assert (rows.listed is None) == (name in ("torch", "cuda"))
    assert asked == ["triton"] * (name == "triton")


def test_objectives_kept_for_kernels_are_few() -> None:
    """A9: an entropy bonus that changes from call to call makes no new entry, and there is an end to the others."""
    for number in range(300):
        kernel_objective(LossConfig(entropy_coef=number / 7), TOKENS)
        kernel_objective(LossConfig(beta=number / 7), TOKENS)
    for cached in (_kernel_objective, _objective, native_objective):
        assert cached.cache_info().maxsize == 64
    one, other = (kernel_objective(LossConfig(entropy_coef=coef), TOKENS) for coef in (0.1, 0.2))
    assert one == other


def test_operators_stay_out_of_cuda_graphs() -> None:
    """A6: under torch.compile(mode="reduce-overhead") they may wait for the device."""
    for operator in (operators.forward_op, operators.backward_op, operators.objective_op):
        assert torch.Tag.cudagraph_unsafe in operator._opoverload.tags


def test_reasons(gpu: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0 or higher; this device has 7\.5"):
        resolve_backend("triton", GPU)
    gpu.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="its kernels run on NVIDIA GPUs"):
        resolve_backend("triton", torch.device("cpu"))


@pytest.mark.parametrize("workspace_mib", [128, 256, 1024, 2560])
@pytest.mark.parametrize("vocab", [32000, 50257, 151936, 256000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_budget(dtype: torch.dtype, vocab: int, workspace_mib: int) -> None:
    """Logits and staged dx fill the cap and keep within it; dx holds more rows than logits over which it is written."""
    budget = row_budget("triton", vocab, 1024, dtype, GPU, workspace_mib * MIB)
    pitch = get_backend("triton").row_pitch(vocab)
    assert pitch % 64 == 0
    assert 0 <= pitch - vocab < 64
    used = budget.num_buffers * budget.tile_rows * pitch * 4 + budget.staged_rows * pitch * dtype.itemsize
    slack = budget.tile_rows * pitch * 4
    assert workspace_mib * MIB - slack < used <= workspace_mib * MIB
    assert budget.staged_rows % budget.tile_rows == 0
    assert budget.chunk_rows * pitch * 4 <= workspace_mib * MIB
    if dtype == torch.bfloat16:
        assert budget.staged_rows >= budget.chunk_rows
    if vocab == 151936:
        assert budget.num_buffers == 1
        assert budget.tile_rows == {128: 64, 256: 128, 1024: 512, 2560: 1024}[workspace_mib]
    with tuning(row_stream=True, tile_rows=512):
        two = row_budget("triton", vocab, 1024, dtype, GPU, workspace_mib * MIB)
        assert two.num_buffers == (2 if 4 * two.tile_rows * 4 * pitch <= workspace_mib * MIB else 1)
        assert two.tile_rows <= 512


@pytest.mark.parametrize(("gib", "expected"), [(6, 2**29), (24, 24 * 2**26), (80, 2**32), (141, 2**32)])
def test_default_workspace(gib: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the card, from 512 MiB to 4 GiB, whatever is free of it."""
    properties = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert default_workspace_bytes(GPU) == expected
    assert default_workspace_bytes(torch.device("cpu")) == 2**28


def test_bad_tuning() -> None:
    with (
        pytest.raises(ValueError, match="tile_rows: expected a power of two, at least 16; got 24"),
        tuning(tile_rows=24),
    ):
        pass
