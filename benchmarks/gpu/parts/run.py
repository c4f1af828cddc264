"""Does it run at all: doctor, then one step a backend at a real shape, in several chunks and every storage dtype.

Result of `doctor`: lines, sound. Of a step: plan, seconds (of three; the first compiles), errors against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.parts import Context, Task
from grpo_fast.config import LossConfig
from grpo_fast.loss import grpo_loss

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 2e-3}
CONFIG = LossConfig(beta=0.05, entropy_coef=0.01)


def tasks(context: Context) -> Iterable[Task]:
    yield Task("doctor", 30, doctor)
    for backend in context.backends(slow=True):
        slow = backend in context.device.slow
        for dtype in (torch.bfloat16,) if slow else (torch.bfloat16, torch.float16, torch.float32):
            for plan in ("single_pass",) if slow else ("single_pass", "recompute"):
                name = str(dtype).removeprefix("torch.")
                yield Task(f"{backend}-{name}-{plan}", 30, _task(context, backend, dtype, plan))


def doctor() -> dict[str, Any]:
    from grpo_fast.doctor import doctor as examine

    lines, sound = examine()
    print("\n".join(lines))
    if not sound:
        raise RuntimeError("doctor: " + "\n".join(line for line in lines if "WRONG" in line))
    return {"lines": lines, "sound": sound}


def _task(context: Context, backend: str, dtype: torch.dtype, plan: str) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        with context.device.environment():  # not around doctor, which looks at the CPU as well
            return one_step(context, backend, dtype, plan)

    return run


def one_step(context: Context, backend: str, dtype: torch.dtype, plan: str) -> dict[str, Any]:
    """A step of several chunks; all of T for the loss, the first rows' gradients against float64.

    The loss adds a gradient only through rows, so that of the first 64 rows needs nothing of the others.
    """
    tokens, width, vocab = context.shapes.run_shape
    device, rows = context.device.torch, min(64, tokens // 2)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden = normal(tokens, width).to(dtype).requires_grad_()
    weight = (normal(vocab, width) * (2.5 / width**0.5)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    given = {"old_logprobs": normal(tokens) - 12, "ref_logprobs": normal(tokens) - 12}
    advantages = normal(tokens)
    workspace = context.workspace(backend, vocab, 3 * 2**28 if not context.shapes.tiny else 64 * 2**10)

    def step() -> Any:
        hidden.grad = weight.grad = None
        out = grpo_loss(
            hidden, weight, targets, advantages, cu_seqlens=torch.arange(tokens + 1, device=device), config=CONFIG,
            backend=backend, plan=plan, workspace_bytes=workspace, **given,
        )  # fmt: skip
        out.loss.backward()
        return out

    seconds, outs = [], []
    for _ in range(1 if backend in context.device.slow else 3):  # the first compiles
        outs.clear()
        seconds.append(context.device.timed(lambda: outs.append(step())))
    out = outs[0]
    assert hidden.grad is not None
    assert weight.grad is not None
    exact, grad = _exact_rows(hidden, weight, targets, advantages, given, rows)
    errors = {
        "logprobs": float((out.logprobs[:rows] - exact).abs().max()),
        "grad_hidden": _relative(hidden.grad[:rows], grad),
        "grad_weight finite": float(weight.grad.isfinite().all()),
        "loss finite": float(out.loss.isfinite()),
    }
    right = errors["logprobs"] <= 1e-3 and errors["grad_hidden"] <= BOUNDS[dtype]
    if not right or min(errors["grad_weight finite"], errors["loss finite"]) < 1:
        raise RuntimeError(f"{backend} {dtype} {plan}: {errors}")
    return {"plan": out.plan, "backend": out.backend, "seconds": seconds, "errors": errors}


def _exact_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, given: dict[str, Tensor], rows: int
) -> tuple[Tensor, Tensor]:
    """(logprobs, d loss / d hidden) of the first rows in float64; the loss's denominators are those of all rows."""
    from grpo_fast.reference import reference_logprobs, reference_policy_loss

    share = rows / hidden.shape[0]
    leaf = hidden.detach()[:rows].double().requires_grad_()
    logprobs, entropy = reference_logprobs(leaf, weight.detach().double(), targets[:rows])
    loss = reference_policy_loss(
        logprobs,
        entropy,
        advantages[:rows].double(),
        config=CONFIG,
        cu_seqlens=torch.arange(rows + 1, device=hidden.device),
        **{name: values[:rows].double() for name, values in given.items()},
    )
    (loss * share).backward()
    assert leaf.grad is not None
    return logprobs.detach(), leaf.grad


def _relative(actual: Tensor, expected: Tensor) -> float:
    error = (actual.detach().double() - expected).square().mean().sqrt()
    return float(error / expected.square().mean().sqrt())
