"""The `cpu` backend beyond the oracle matrix: its products, paths for other machines, what it says where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.backends import base as table
from grpo_fast.backends import cpu as cpu_backend
from grpo_fast.backends.base import get_backend, resolve_backend
from grpo_fast.config import LossConfig
from grpo_fast.install import install_command
from grpo_fast.loss import grpo_loss, token_logprobs
from grpo_fast.objectives import slope_scope
from tests.cases import OBJECTIVES, make_case, rel_rms

CPU = torch.device("cpu")
_C = cpu_backend._C
needs_native = pytest.mark.skipif(_C is None, reason="grpo_fast._C is not built")
NARROW = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            _C is None or cpu_backend.gemm_obstacle(dtype) is not None, reason=f"no {dtype} products on this CPU"
        ),
    )
    for dtype in (torch.bfloat16, torch.float16)
]
# Ragged on purpose: odd widths and vocabularies leave a column without a partner, 1500 rows are more than one block.
SHAPES = [(64, 32, 97), (100, 24, 1000), (7, 48, 5023), (1500, 65, 333), (1, 1, 1), (33, 130, 3001), (3, 2050, 70)]


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def operands(rows: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, and a dx whose rows are the first halves of longer ones."""
    generator = torch.Generator().manual_seed(rows + width + vocab)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    dx = torch.full((rows, 2 * vocab), torch.nan, dtype=dtype)[:, :vocab]
    return hidden, weight, dx.copy_(torch.randn(rows, vocab, generator=generator))


def products(hidden: Tensor, weight: Tensor, dx: Tensor) -> dict[str, Tensor]:
    """All products of the backend, with and without something to add to."""
    cpu = get_backend("cpu")
    shape, wide = tuple(weight.shape), torch.float32
    logits = torch.empty(hidden.shape[0], shape[0])
    cpu.logits(hidden, weight, logits, hidden.shape[0])
    grad_hidden = torch.ones(hidden.shape)
    cpu.grad_hidden(dx, weight, grad_hidden, accumulate=True)
    added, plain, narrow = torch.ones(shape), torch.empty(shape, dtype=wide), torch.empty(shape, dtype=hidden.dtype)
    cpu.grad_weight(dx, hidden, added, added)
    cpu.grad_weight(dx, hidden, plain, None)
    cpu.grad_weight(dx, hidden, narrow, plain.clone())
    return {"logits": logits, "grad_hidden": grad_hidden, "added": added, "plain": plain, "narrow": narrow}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_exact_to_float32(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden, weight, dx = operands(*shape, dtype)
    found = products(hidden, weight, dx)
    h, w, d = hidden.double(), weight.double(), dx.double()
    expected = {"logits": h @ w.T, "grad_hidden": 1 + d @ w, "added": 1 + d.T @ h, "plain": d.T @ h}
    for name, exact in expected.items():
        assert rel_rms(found[name], exact) <= 1e-6, name
    assert rel_rms(found["narrow"], 2 * expected["plain"]) <= 2.0**-8  # rounded once


@pytest.mark.parametrize("dtype", NARROW)
def test_products_do_not_depend_on_threads_or_other_rows(dtype: torch.dtype, threads: Any) -> None:
    hidden, weight, dx = operands(300, 576, 1503, dtype)  # wide enough for threads to share columns
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(products(hidden, weight, dx))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name
    for rows in (slice(0, 1), slice(17, 130), slice(250, 300)):
        assert torch.equal(products(hidden[rows], weight, dx[rows])["logits"], results[0]["logits"][rows])


@pytest.mark.parametrize("dtype", NARROW)
def test_no_rows_leave_nothing_undefined(dtype: torch.dtype) -> None:
    hidden, weight, dx = operands(0, 8, 20, dtype)
    found = products(hidden, weight, dx)
    assert found["plain"].eq(0).all()
    assert found["added"].eq(1).all()
    assert found["narrow"].eq(0).all()


TOKEN_LOCAL = [p for p in OBJECTIVES if slope_scope(LossConfig(**p.values[0]), has_old=False) == "row"]


@needs_native
@pytest.mark.parametrize("kwargs", TOKEN_LOCAL)
def test_on_policy_rows_agree_with_autograd(kwargs: dict[str, Any]) -> None:
    """Without old logprobs the ratio is 1 with a gradient and corrections come from the current policy."""
    config = LossConfig(**kwargs)
    case = make_case(3, bias=True, softcap=15.0, temperature=0.8, missing_sampling=0.2)
    given = case.policy_inputs(config, on_policy=True)
    results = []
    for backend in ("cpu", "torch"):
        leaves = case.leaves()
        arguments = (leaves["hidden"], leaves["weight"], case.targets, case.advantages)
        out = grpo_loss(*arguments, bias=leaves["bias"], config=config, backend=backend, plan="single_pass", **given)
        out.loss.backward()
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, gradient in results[1].items():
        assert rel_rms(results[0][name], gradient) <= 2e-6, name
        assert gradient.abs().max() > 0


@needs_native
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_machines_without_narrow_products(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There torch multiplies and dx stays float32; the row functions are the same."""
    monkeypatch.setattr(cpu_backend, "gemm_obstacle", lambda dtype: "pretended")
    case = make_case(4, dtype=torch.bfloat16, vocab=1003, hidden_size=48)
    results = []
    for backend in ("cpu", "torch"):
        leaves = case.leaves()
        out = grpo_loss(
            leaves["hidden"],
            leaves["weight"],
            case.targets,
            case.advantages,
            backend=backend,
            plan=plan,
            **case.policy_inputs(LossConfig()),
        )
        out.loss.backward()
        results.append((out.logprobs, leaves["hidden"].grad, leaves["weight"].grad))
    for ours, plain, bound in zip(*results, (1e-5, 4e-3, 4e-3), strict=True):
        assert rel_rms(ours, plain) <= bound


def test_what_is_not_built_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By name it raises; `auto` goes on and says why, since pip swallows what setup.py says."""
    monkeypatch.setattr(cpu_backend, "_C", None)
    monkeypatch.setattr(cpu_backend, "_missing", "No module named 'grpo_fast._C'")
    monkeypatch.setattr(table, "_announced", set())
    with pytest.raises(ValueError, match=r"'cpu' is not available on cpu: grpo_fast._C is not built .*C\+\+17"):
        resolve_backend("cpu", CPU)
    with caplog.at_level("INFO", logger="grpo_fast"):
        assert resolve_backend("auto", CPU) == resolve_backend("auto", CPU) == "torch"
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("backend auto: using 'torch' on cpu; not 'cpu': grpo_fast._C is not built (No module")
    assert f"GRPO_FAST_CPU=1 {install_command()} shows why it fails" in message


@needs_native
def test_auto_prefers_it_on_a_cpu_only() -> None:
    assert resolve_backend("auto", CPU) == "cpu"
    assert "run on the CPU" in str(get_backend("cpu").why_unavailable(torch.device("cuda")))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "torch"])
def test_few_rows_are_as_exact_as_many(backend: str, rows: int) -> None:
    """dHidden sums over the vocabulary; weights with a common part make a straight float32 sum lose digits."""
    gen = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(60000, 32, generator=gen) + 0.1
    hidden = 3 * torch.randn(rows, 32, generator=gen)
    targets = torch.randint(0, 60000, (rows,), generator=gen)
    grads = []
    for dtype in (torch.float32, torch.float64):
        states = hidden.to(dtype, copy=True).requires_grad_()
        token_logprobs(states, weight.to(dtype), targets, backend=backend).logprobs.sum().backward()
        grads.append(states.grad)
    assert rel_rms(grads[0], grads[1]) < 3e-6
