"""A bound that is met exactly: the same gradients from every backend and the oracle, on every version of torch.

An on-policy ratio is exactly 1, so epsilon = 0 and delta = 1 are such bounds. torch changed its clamp's gradient there
in 2.14; ours is its older rule: a value on a bound passes its gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast.config import LOSS_TYPES
from grpo_fast.loss import LossConfig, grpo_loss
from grpo_fast.losses import Segments
from grpo_fast.objectives import Tokens, clamp, objective
from grpo_fast.reference import reference_loss
from tests.cases import BACKENDS, make_case, rel_rms

INFINITY, NAN = float("inf"), float("nan")
CLAMPS = {"objectives": clamp, "reference": reference._limit}


def gradients_of(function: Any, values: list[float], dtype: torch.dtype, **bounds: Any) -> tuple[Tensor, Tensor]:
    leaf = torch.tensor(values, dtype=dtype, requires_grad=True)
    result = function(leaf, **bounds)
    (gradient,) = torch.autograd.grad(result.sum(), leaf)
    return result.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CLAMPS)
def test_the_rule(name: str, dtype: torch.dtype) -> None:
    values = [-INFINITY, 0.7, 0.8, 1.0, 1.2, 1.3, INFINITY, NAN]
    limited, gradient = gradients_of(CLAMPS[name], values, dtype, low=0.8, high=1.2)
    expected = torch.tensor(values, dtype=dtype).clamp(0.8, 1.2)
    assert torch.equal(limited[:-1], expected[:-1])
    assert limited[-1].isnan()
    assert gradient.tolist() == [0, 0, 1, 1, 1, 0, 0, 1]
    assert gradients_of(CLAMPS[name], values, dtype, low=1.0)[1].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert gradients_of(CLAMPS[name], values, dtype, high=1.0)[1].tolist() == [1, 1, 1, 1, 0, 0, 0, 1]
    assert gradients_of(CLAMPS[name], values, dtype)[1].tolist() == [1] * 8


def test_a_tensor_is_a_bound_like_a_number() -> None:
    values, bound = [0.9, 1.0, 1.1], torch.tensor(1.0)
    assert gradients_of(clamp, values, torch.float32, high=bound)[1].tolist() == [1, 1, 0]
    assert gradients_of(clamp, values, torch.float32, low=bound)[0].tolist() == pytest.approx([1.0, 1.0, 1.1])


def test_the_rule_compiles() -> None:
    values = torch.tensor([0.5, 1.0, 1.5, NAN], requires_grad=True)
    compiled = torch.compile(lambda x: clamp(x, 0.5, 1.0).square(), backend="aot_eager", fullgraph=True)
    compiled(values).sum().backward()
    assert values.grad is not None
    assert values.grad[:3].tolist() == [1.0, 2.0, 0.0]


class _Watched(torch.overrides.TorchFunctionMode):
    """Fails where torch's own clamp meets what has a gradient."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("clamp", "clip", "clamp_min", "clamp_max", "hardtanh"):
            assert not args[0].requires_grad, f"{name} of a tensor with a gradient: its rule depends on torch's version"
        return function(*args, **(kwargs or {}))


def config_of(loss_type: str, **options: Any) -> LossConfig:
    length = {"max_completion_length": 50} if loss_type == "dr_grpo" else {}
    return LossConfig(loss_type=loss_type, **length, **options)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nobody_differentiates_torchs_clamp(loss_type: str) -> None:
    case = make_case(5, masked_fraction=0.0, masked_sequence=False)
    config = config_of(loss_type, epsilon=0.1, epsilon_high=0.2, delta=1.5)
    logprobs = case.logprobs.clone().requires_grad_()
    given = {name: v for name, v in case.policy_inputs(config).items() if name != "loss_mask"}
    with _Watched():
        reference.reference_policy_loss(logprobs, None, case.advantages, config=config, **given).backward()
        count = logprobs.numel()
        assert case.cu_seqlens is not None
        segments, mask = Segments(case.cu_seqlens, count), torch.ones(count, dtype=torch.bool)
        tokens = Tokens(
            segments.spread(case.advantages),
            mask,
            segments,
            mask.sum(),
            old_logprobs=case.old_logprobs,
            sampling_logprobs=given["sampling_logprobs"],
        )
        objective(logprobs, None, tokens, config).policy.sum().backward()


BOUNDS = [
    pytest.param({"epsilon": 0.0, "epsilon_high": 0.0}, id="epsilon"),
    pytest.param({"epsilon": 0.0, "epsilon_high": 0.28, "delta": 1.0}, id="delta"),
]


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "cispo"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_met_at_the_first_step(backend: str, loss_type: str, bounds: dict[str, float]) -> None:
    """Every ratio is 1, on the bounds: each backend gives the oracle's gradient, which is not zero."""
    case, config = make_case(7), config_of(loss_type, **bounds)
    leaves, exact = case.leaves(), case.double().leaves()
    given = case.policy_inputs(config, on_policy=True)
    out = grpo_loss(
        leaves["hidden"], leaves["weight"], case.targets, case.advantages, config=config, backend=backend, **given
    )
    out.loss.backward()
    wide = case.double().policy_inputs(config, on_policy=True)
    oracle = reference_loss(
        exact["hidden"], exact["weight"], case.targets, case.double().advantages, config=config, **wide
    )
    oracle.loss.backward()
    for name, leaf in leaves.items():
        expected = exact[name].grad
        assert expected is not None
        assert expected.abs().max() > 1e-4, "the oracle learns nothing here"
        assert leaf.grad is not None
        assert rel_rms(leaf.grad, expected) <= 1e-5, name
