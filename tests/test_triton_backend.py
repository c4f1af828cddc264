"""The triton backend without a GPU: when it is there, what its workspace holds, how two streams are ordered."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from grpo_fast.ops import backend, workspace
from grpo_fast.ops.backend import get_backend, resolve_backend
from grpo_fast.ops.planner import row_budget

GPU = torch.device("cuda", 0)
MIB = 2**20


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a Hopper GPU, as far as questions about it go; and without native code."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("grpo_fast.ops.cpu_backend._C", None)
    monkeypatch.setattr(backend, "_announced", set())
    return monkeypatch


def test_auto_takes_triton_on_a_gpu_and_says_so_once(gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    with caplog.at_level(logging.INFO, logger="grpo_fast"):
        assert resolve_backend("auto", GPU) == resolve_backend("auto", GPU) == "triton"
    assert [r.message for r in caplog.records] == ["backend auto: using 'triton' on cuda"]


def test_auto_without_triton(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr("grpo_fast.ops.triton_backend.find_spec", lambda name: None)
    assert resolve_backend("auto", GPU) == "torch"
    with pytest.raises(ValueError, match=r"'triton' is not available on cuda:0: Triton is not installed; pip install"):
        resolve_backend("triton", GPU)


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
    if workspace_mib == 2560 and vocab == 151936:
        assert (budget.tile_rows, budget.num_buffers) == (512, 2)


class FakeStream:
    """Runs what it is given in order, after the events that it waits for: a set of the operations done before."""

    def __init__(self, *_: Any) -> None:
        self.done: set[str] = set()

    def run(self, name: str) -> set[str]:
        before = set(self.done)
        self.done.add(name)
        return before

    def record_event(self) -> set[str]:
        return set(self.done)

    def wait_event(self, event: set[str]) -> None:
        self.done |= event

    def wait_stream(self, other: FakeStream) -> None:
        self.done |= other.done


def test_two_streams_never_meet_in_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row function runs after its product, a product after the row function that last read its buffer."""
    caller, current = FakeStream(), []

    @contextmanager
    def stream(other: FakeStream) -> Iterator[None]:
        current.append(other)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: caller)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    second = workspace.RowStream(GPU, 2)
    for chunk in range(2):
        for turn in range(5):
            second.before_product(turn % 2)
            before = caller.run(f"product {chunk} {turn}")
            assert turn < 2 or f"rows {chunk} {turn - 2}" in before
            assert turn == 0 or f"rows {chunk} {turn - 1}" not in before  # beside each other, not one after the other
            with second.enter():
                assert f"product {chunk} {turn}" in current[-1].run(f"rows {chunk} {turn}")
                assert chunk == 0 or "backward 0" in current[-1].done  # dx is free again
                second.leave(turn % 2)
        second.join()
        assert all(f"rows {chunk} {turn}" in caller.run(f"backward {chunk}") for turn in range(5))
