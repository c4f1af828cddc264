"""No `[T, V]` tensor, and nothing above the workspace cap: allocations are intercepted in forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from grpo_fast.loss import LossConfig, grpo_loss, token_logprobs
from grpo_fast.ops import call, passes
from tests.allocations import AllocationSpy
from tests.cases import BACKENDS

MIB = 2**20
PLANS = ("single_pass", "resident", "recompute", "lean", "frozen_head")
SEQUENCE = LossConfig(importance_sampling_level="sequence", beta=0.1)
TOKEN = LossConfig(beta=0.1, entropy_coef=0.01)


CPU = torch.device("cpu")


def run(
    plan: str, tokens: int, width: int, vocab: int, dtype: torch.dtype, workspace: int, sequences: int, backend: str
):
    """Forward and backward of one plan; returns (spy, bytes that are no workspace: gradients, accumulator, O(T H))."""
    config = TOKEN if plan == "single_pass" else SEQUENCE
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_(plan != "frozen_head")
    targets = torch.randint(0, vocab, (tokens,))
    cu_seqlens = torch.arange(sequences + 1) * (tokens // sequences)
    with AllocationSpy() as spy:
        out = grpo_loss(
            hidden,
            weight,
            targets,
            torch.randn(sequences),
            cu_seqlens=cu_seqlens,
            ref_logprobs=torch.randn(tokens),
            config=config,
            plan=plan,
            workspace_bytes=workspace,
            backend=backend,
            ignore_index=None,
        )
        out.loss.backward()
    assert out.plan == plan
    accumulator = 0 if plan in ("lean", "frozen_head") else 4 * vocab * width
    gradient = 0 if plan == "frozen_head" else weight.numel() * weight.element_size()
    if plan in ("single_pass", "resident"):
        gradient *= 2  # kept by the forward, scaled in the backward
    per_token = tokens * (5 * 4 * width + 400)  # hidden, its chunks and gradients; some fifty [T] vectors
    return spy, accumulator + gradient + per_token


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
def test_real_run(plan: str, dtype: torch.dtype, backend: str) -> None:
    tokens, vocab = 1024, 3001
    workspace = call.workspace_for(backend, vocab, dtype, CPU, 300)
    spy, rest = run(plan, tokens, 16, vocab, dtype, workspace, sequences=64, backend=backend)
    assert spy.elements < tokens * vocab / 2
    assert spy.largest <= max(workspace, 4 * vocab * 16), spy.largest_shape
    assert spy.peak <= workspace + rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
def test_large_shapes_without_running_them(plan: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """T = 8192, V = 151936 with the default CPU workspace, on fake tensors (which hold no values to count)."""
    tokens, vocab, width, sequences = 8192, 151936, 1024, 64
    monkeypatch.setattr(passes, "_without_idle_rows", lambda index, hidden, dx, live: (index, hidden, dx))
    counts = [tokens // sequences] * sequences
    monkeypatch.setattr(call.HeadCall, "rows_of_sequences", lambda self, segments, mask: counts)
    with FakeTensorMode():
        spy, rest = run(plan, tokens, width, vocab, dtype, 256 * MIB, sequences, "torch")
    assert spy.elements < tokens * vocab / 4
    gradient_bytes = 4 * vocab * width
    assert spy.largest <= max(256 * MIB, gradient_bytes), spy.largest_shape
    if spy.largest > 256 * MIB:
        assert spy.largest_shape == (vocab, width)
    assert spy.peak <= 256 * MIB + rest


@pytest.mark.parametrize("plan", PLANS)
def test_large_vocabulary_with_the_default_workspace(plan: str) -> None:
    """V = 151936 for real (native code takes no fake tensors), with a narrow head."""
    tokens, vocab = 1024, 151936
    spy, rest = run(plan, tokens, 8, vocab, torch.bfloat16, 256 * MIB, sequences=64, backend="cpu")
    assert 128 * MIB < spy.largest <= 256 * MIB
    assert spy.peak <= 256 * MIB + rest


def test_logits_are_caught() -> None:
    """The spy sees a plain loss make the tensor that must not be."""
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    with AllocationSpy() as spy:
        torch.log_softmax(hidden @ weight.T, -1).sum().backward()
    assert spy.elements == 64 * 500
    assert spy.peak >= 2 * spy.largest


def test_no_grad_keeps_nothing() -> None:
    """Old and reference passes: no gradient buffers, nothing alive afterwards but the results."""
    hidden, weight = torch.randn(1024, 16), torch.randn(2000, 16, requires_grad=True)
    targets = torch.randint(0, 2000, (1024,))
    for backend in BACKENDS:
        workspace = call.workspace_for(backend, 2000, torch.float32, CPU, 300)
        with AllocationSpy() as spy, torch.no_grad():
            out = token_logprobs(hidden, weight, targets, workspace_bytes=workspace, backend=backend)
        assert spy.peak <= workspace + 1024 * 400
    assert spy.live <= 1024 * 100
    assert out.logprobs.grad_fn is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_main_grad_needs_no_vocabulary_sized_temporary(backend: str) -> None:
    """With a caller-owned float32 buffer no `[V, H]` tensor is made at all."""
    hidden = torch.randn(512, 64).bfloat16().requires_grad_()
    weight = torch.randn(3000, 64).bfloat16().requires_grad_()
    buffer, targets = torch.zeros(3000, 64), torch.randint(0, 3000, (512,))
    workspace = call.workspace_for(backend, 3000, torch.bfloat16, CPU, 300)
    for plan in ("single_pass", "recompute", "lean"):
        with AllocationSpy() as spy:
            out = grpo_loss(
                hidden,
                weight,
                targets,
                torch.randn(512),
                main_grad=buffer,
                plan=plan,
                workspace_bytes=workspace,
                backend=backend,
            )
            out.loss.backward()
        assert weight.grad is None
        # The torch backend widens the bf16 weight by blocks, here the whole of so small a one; no gradient is as large.
        assert spy.peak <= workspace + 512 * (5 * 4 * 64 + 400)
    assert buffer.abs().sum() > 0
