"""Backends on a CUDA device: the oracle matrix in all dtypes, full shapes, memory, bits, waits, streams, graphs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.loss import LossConfig, grpo_loss, token_logprobs
from grpo_fast.ops.backend import get_backend
from tests.cases import OBJECTIVES, TOLERANCES, assert_close, make_case, rel_rms
from tests.test_loss import eager, legal_plans, oracle, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BACKENDS = ("triton", "cuda", "torch")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = get_backend(request.param).why_unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


class Big:
    """Inputs of a real shape, made on the device."""

    def __init__(self, tokens: int, width: int, vocab: int, sequences: int = 32) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.hidden = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16().requires_grad_()
        weight = torch.randn(vocab, width, device="cuda", generator=generator) * (3 / width**0.5)
        self.weight = weight.bfloat16().requires_grad_()
        self.targets = torch.randint(0, vocab, (tokens,), device="cuda", generator=generator)
        self.advantages = torch.randn(sequences, device="cuda", generator=generator)
        self.cu_seqlens = torch.arange(sequences + 1, device="cuda") * (tokens // sequences)

    def step(self, **options: Any) -> tuple[Any, Tensor, Tensor]:
        """(result, gradients of hidden and weight) of one loss."""
        self.hidden.grad = self.weight.grad = None
        out = grpo_loss(self.hidden, self.weight, self.targets, self.advantages, cu_seqlens=self.cu_seqlens, **options)
        out.loss.backward()
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return out, self.hidden.grad, self.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kwargs", OBJECTIVES)
def test_objectives(kwargs: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    config = LossConfig(**kwargs, temperature=0.9)
    case = make_case(
        1, dtype=dtype, bias=True, vocab=1000, zero_advantages=0.3, softcap=20.0, temperature=0.9, device="cuda"
    )
    expected, gradients = oracle(case, config)
    plain_loss, plain = eager(case, config)
    for plan in (*legal_plans(config), "auto"):
        out, actual = run(case, config, plan=plan, workspace_bytes=2**28, backend=backend)
        assert_close(f"{plan} loss", out.loss, expected.loss, eager=plain_loss)
        for name, gradient in gradients.items():
            assert_close(f"{plan} grad {name}", actual[name], gradient, eager=plain[name])


@pytest.mark.parametrize("vocab", [1000, 32000, 50257, 151669, 256000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_real_vocabularies(plan: str, dtype: torch.dtype, vocab: int, backend: str) -> None:
    case = make_case(3, lengths=(50, 90, 20, 70), hidden_size=64, vocab=vocab, dtype=dtype, device="cuda")
    config = LossConfig(entropy_coef=0.01, beta=0.05)
    expected, gradients = oracle(case, config)
    plain_loss, plain = eager(case, config)
    out, actual = run(case, config, plan=plan, workspace_bytes=2**29, backend=backend)
    assert_close("loss", out.loss, expected.loss, eager=plain_loss)
    for name, gradient in gradients.items():
        assert_close(f"grad {name}", actual[name], gradient, eager=plain[name])
    error = (out.logprobs - expected.logprobs)[out.computed].square().mean().sqrt()
    assert error <= TOLERANCES[dtype].logprob_nats / 10


@pytest.mark.parametrize("gib", [1, 2.5])
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean", "resident"])
def test_real_shape_memory_and_bits(plan: str, gib: float, backend: str) -> None:
    """T = 4096, V = 151936: within the cap by the allocator's count, first ratio exactly 1, bitwise repeatable."""
    tokens, width, vocab, workspace = 4096, 1024, 151936, int(gib * 2**30)
    big = Big(tokens, width, vocab)
    level = "token" if plan == "single_pass" else "sequence"
    options: dict[str, Any] = {"backend": backend, "workspace_bytes": workspace}
    with torch.no_grad():
        old = token_logprobs(big.hidden, big.weight, big.targets, **options).logprobs
    results = []
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, *gradients = big.step(
            old_logprobs=old, config=LossConfig(importance_sampling_level=level), plan=plan, **options
        )
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        assert extra <= workspace + vocab * width * (4 + 2 * 2) + tokens * width * 20
        assert torch.equal(out.logprobs, old)
        results.append((out.loss.detach().clone(), *(g.clone() for g in gradients)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_backends_agree_at_full_shape() -> None:
    big = Big(4096, 2048, 128256)
    config = LossConfig(entropy_coef=0.01)
    theirs = [t.clone() for t in big.step(backend="torch", config=config)[1:]]
    ours = big.step(backend="triton", config=config)[1:]
    assert all(rel_rms(a, b) <= 4e-3 for a, b in zip(ours, theirs, strict=True))


def test_more_than_two_to_the_31_logits(backend: str) -> None:
    """One buffer of dx holds T V = 2.5e9 entries: the last rows are those of a call on them alone."""
    big = Big(16384, 64, 151936)
    out, grad_hidden, _ = big.step(backend=backend, workspace_bytes=13 * 2**30)
    tail = slice(16384 - 512, 16384)
    hidden = big.hidden[tail].detach().requires_grad_()
    alone = grpo_loss(
        hidden, big.weight.detach(), big.targets[tail], big.advantages[-1:], backend=backend,
        cu_seqlens=torch.tensor([0, 512], device="cuda"), normalizer=16384.0,
    )  # fmt: skip
    alone.loss.backward()
    assert torch.equal(out.logprobs[tail], alone.logprobs)
    assert hidden.grad is not None
    assert rel_rms(grad_hidden[tail], hidden.grad) <= 4e-3


def test_one_wait_at_most(backend: str) -> None:
    """A packed call without mask waits for the device once (to count its rows), one that needs every row never."""
    case = make_case(2, dtype=torch.bfloat16, vocab=1000, device="cuda")
    leaves = case.leaves()
    arguments = (leaves["hidden"], leaves["weight"], case.targets, case.advantages)
    config = LossConfig(entropy_coef=0.1)
    grpo_loss(*arguments, cu_seqlens=case.cu_seqlens, config=config, backend=backend).loss.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = grpo_loss(*arguments, cu_seqlens=case.cu_seqlens, config=config, backend=backend)
        out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_capture(backend: str) -> None:
    """A captured step, replayed on new inputs, does what the step does; two buffers of logits, two streams."""
    big = Big(4096, 256, 32000)
    options: dict[str, Any] = {"backend": backend, "config": LossConfig(beta=0.1), "workspace_bytes": 2**29}
    ref = torch.full((4096,), -3.0, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            big.step(ref_logprobs=ref, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, *gradients = big.step(ref_logprobs=ref, **options)
    with torch.no_grad():
        big.hidden.copy_(torch.randn_like(big.hidden))
    graph.replay()
    torch.cuda.synchronize()
    replayed = [out.loss.detach().clone(), *(g.clone() for g in gradients)]
    fresh, *expected = big.step(ref_logprobs=ref, **options)
    assert all(torch.equal(a, b) for a, b in zip(replayed, (fresh.loss.detach(), *expected), strict=True))


def test_torch_compile(backend: str) -> None:
    big = Big(512, 64, 1000)

    def loss(hidden: Tensor) -> Tensor:
        out = grpo_loss(hidden * 2, big.weight, big.targets, big.advantages, cu_seqlens=big.cu_seqlens, backend=backend)
        return out.loss

    plain = loss(big.hidden)
    compiled = torch.compile(loss, fullgraph=True)(big.hidden)
    assert torch.equal(plain, compiled)


def test_two_callers_streams(backend: str) -> None:
    """Steps on two streams at once do not disturb each other."""
    steps = [Big(2048, 256, 32000), Big(2048, 256, 32000)]
    expected = [t.clone() for t in steps[0].step(backend=backend)[1:]]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(3):
        results = []
        for big, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(big.step(backend=backend)[1:])
        torch.cuda.synchronize()
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_logprobs_are_unrounded(backend: str) -> None:
    case = make_case(3, dtype=torch.bfloat16, vocab=32000, hidden_size=256, device="cuda")
    with torch.no_grad():
        out = token_logprobs(case.hidden, case.weight, case.targets, backend=backend)
    error = (out.logprobs - case.logprobs).square().mean().sqrt()
    assert error <= TOLERANCES[torch.bfloat16].logprob_nats / 10


SANITIZED = """
import torch
from grpo_fast.loss import LossConfig
from tests.cases import make_case
from tests.test_loss import run
for vocab in (97, 5003):
    case = make_case(1, dtype=torch.bfloat16, vocab=vocab, bias=True, device="cuda")
    for plan in ("single_pass", "recompute", "lean"):
        run(case, LossConfig(beta=0.1, entropy_coef=0.1), plan=plan, backend={backend!r}, workspace_bytes=2**28)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str, backend: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    code = SANITIZED.format(backend=backend)
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
