"""The backends on a CUDA device: the oracle matrix in all dtypes, memory, repeatability, waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_fast.loss import LossConfig, grpo_loss, token_logprobs
from grpo_fast.ops.backend import get_backend
from tests.cases import OBJECTIVES, TOLERANCES, assert_close, make_case
from tests.test_loss import eager, legal_plans, oracle, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=["torch", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend; a skip that says why where it does not run."""
    reason = get_backend(request.param).why_unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kwargs", OBJECTIVES)
def test_objectives(kwargs: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    config = LossConfig(**kwargs)
    case = make_case(1, dtype=dtype, bias=True, vocab=1000, zero_advantages=0.3, device="cuda")
    expected, gradients = oracle(case, config)
    plain_loss, plain = eager(case, config)
    for plan in (*legal_plans(config), "auto"):
        out, actual = run(case, config, plan=plan, backend=backend, workspace_bytes=2**28)
        assert_close(f"{plan} loss", out.loss, expected.loss, eager=plain_loss)
        for name, gradient in gradients.items():
            assert_close(f"{plan} grad {name}", actual[name], gradient, eager=plain[name])


@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean", "resident"])
def test_real_shape_memory_and_bits(plan: str, backend: str) -> None:
    """T = 4096, V = 151936: within the cap by the allocator's count, first ratio exactly 1, bitwise repeatable."""
    tokens, width, vocab, workspace = 4096, 1024, 151936, 2**30
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, width, device="cuda", generator=generator) * 0.1).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device="cuda", generator=generator)
    advantages = torch.randn(32, device="cuda", generator=generator)
    cu_seqlens = torch.arange(33, device="cuda") * (tokens // 32)
    level = "token" if plan == "single_pass" else "sequence"
    with torch.no_grad():
        old = token_logprobs(hidden, weight, targets, backend=backend).logprobs
    results = []
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = grpo_loss(
            hidden,
            weight,
            targets,
            advantages,
            cu_seqlens=cu_seqlens,
            old_logprobs=old,
            config=LossConfig(importance_sampling_level=level),
            plan=plan,
            backend=backend,
            workspace_bytes=workspace,
        )
        out.loss.backward()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        gradients = vocab * width * (4 + 2 * 2) + tokens * width * 20
        assert extra <= workspace + gradients
        assert torch.equal(out.logprobs, old)
        results.append((out.loss.detach().clone(), hidden.grad.clone(), weight.grad.clone()))
        hidden.grad = weight.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_wait_at_most(backend: str) -> None:
    """A packed call without mask waits for the device once (to count its rows), one that needs every row never."""
    case = make_case(2, dtype=torch.bfloat16, vocab=1000, device="cuda")
    leaves = case.leaves()
    arguments = (leaves["hidden"], leaves["weight"], case.targets, case.advantages)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = grpo_loss(*arguments, cu_seqlens=case.cu_seqlens, config=LossConfig(entropy_coef=0.1), backend=backend)
        out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_logprobs_are_unrounded(backend: str) -> None:
    case = make_case(3, dtype=torch.bfloat16, vocab=32000, hidden_size=256, device="cuda")
    with torch.no_grad():
        out = token_logprobs(case.hidden, case.weight, case.targets, backend=backend)
    error = (out.logprobs - case.logprobs).square().mean().sqrt()
    assert error <= TOLERANCES[torch.bfloat16].logprob_nats / 10
