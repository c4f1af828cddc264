"""The operators are what their schemas and fake implementations say: what a compiler believes of them is true."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.losses import Segments
from grpo_fast.objectives import Tokens
from grpo_fast.ops import operators
from grpo_fast.ops.call import ActiveRows, HeadCall
from grpo_fast.ops.operators import backward_op, forward_op, objective_op
from tests.supports import draw_support

T, H, V = 12, 8, 50
CHECKS = ("test_schema", "test_faketensor")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
WITH_MAIN_GRAD = pytest.mark.parametrize("with_main_grad", [False, True], ids=["grad", "main_grad"])

SUPPORTED = pytest.mark.parametrize("supported", [False, True], ids=["all", "support"])


def wire(dtype: torch.dtype, plan: str, *, masked: bool, supported: bool = False) -> tuple[Any, ...]:
    """A call with all that a call can have, as an operator takes it."""
    torch.manual_seed(0)
    targets = torch.randint(0, V, (T,))
    call = HeadCall.of(
        torch.randn(T, H).to(dtype),
        torch.randn(V, H).to(dtype),
        torch.randn(V).to(dtype),
        targets,
        torch.rand(T) + 0.5,
        HeadConfig(softcap=5.0, logit_scale=-0.5),
        ActiveRows(torch.arange(T) % 3 > 0) if masked else None,
        "torch",
        None,
        draw_support(targets, V, "mixed", 1) if supported else None,
    )
    call.plan = plan
    return call.to_wire()


def main_grad_for(dtype: torch.dtype, *, wanted: bool) -> Tensor | None:
    return torch.zeros(V, H, dtype=torch.promote_types(dtype, torch.float32)) if wanted else None


def check(operator: Any, *arguments: Any) -> None:
    torch.library.opcheck(operator, arguments, test_utils=CHECKS)


@DTYPES
@SUPPORTED
@pytest.mark.parametrize("plan", ["forward", "frozen_head"])
def test_forward(plan: str, supported: bool, dtype: torch.dtype) -> None:
    for masked in (False, True):
        check(forward_op, *wire(dtype, plan, masked=masked, supported=supported))


@DTYPES
@WITH_MAIN_GRAD
@SUPPORTED
@pytest.mark.parametrize("plan", ["recompute", "lean"])
def test_backward(plan: str, supported: bool, with_main_grad: bool, dtype: torch.dtype) -> None:
    """float16's gradients come in float32: a compiler that took them for float16 read their bytes as such."""
    rows = [torch.randn(T, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(4)]
    main_grad = main_grad_for(dtype, wanted=with_main_grad)
    check(backward_op, *wire(dtype, plan, masked=True, supported=supported), rows, main_grad, [True, True, True])


@DTYPES
@WITH_MAIN_GRAD
@SUPPORTED
def test_objective(supported: bool, with_main_grad: bool, dtype: torch.dtype) -> None:
    advantages, weights = (torch.randn(T, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    mask, segments = torch.arange(T) % 3 > 0, Segments(torch.tensor([0, 5, T]), T)
    tokens = Tokens(advantages, mask, segments, torch.tensor(8)).to_wire()
    main_grad = main_grad_for(dtype, wanted=with_main_grad)
    for want in ([True, True, True], [True, with_main_grad, False]):
        call = wire(dtype, "single_pass", masked=True, supported=supported)
        check(objective_op, *call, tokens, weights, LossConfig().key, None, main_grad, want)


def test_products_are_in_the_operands_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast has cast the operands when they enter; inside it would round what is to be float32."""
    seen = []
    plain = operators.forward_pass

    def forward_pass(call: HeadCall) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return plain(call)

    monkeypatch.setattr(operators, "forward_pass", forward_pass)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward_op(*wire(torch.float32, "forward", masked=False))
    assert seen == [False]
