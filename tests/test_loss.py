"""`grpo_loss` and `token_logprobs` against the float64 oracle: every objective, layout, plan and dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.loss import HeadConfig, LossConfig, grpo_loss, policy_loss, token_logprobs
from grpo_fast.objectives import slope_scope
from grpo_fast.packing import Support
from grpo_fast.reference import reference_logprobs, reference_loss
from tests.cases import (
    AXES,
    BACKENDS,
    OBJECTIVES,
    TOLERANCES,
    Case,
    assert_close,
    make_case,
    objective_kwargs,
    padded,
    rel_rms,
)
from tests.supports import outside

WORKSPACE = 24 * 2**20


def head_options(case: Case) -> dict[str, Any]:
    return {"head": HeadConfig(logit_scale=case.head.logit_scale, softcap=case.head.softcap)}


def oracle(case: Case, config: LossConfig, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """The float64 result on the same rounded inputs, and its gradients."""
    exact = case.double()
    leaves = exact.leaves()
    given = exact.policy_inputs(config) | options
    out = reference_loss(
        leaves["hidden"],
        leaves["weight"],
        exact.targets,
        exact.advantages,
        bias=leaves.get("bias"),
        head=exact.head,
        config=config,
        **given,
    )
    out.loss.backward()
    return out, {name: leaf.grad for name, leaf in leaves.items()}


def eager(case: Case, config: LossConfig, support: Support | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """What a plain loss does in the case's dtype: logits rounded to it, softmax in float32."""
    leaves = case.leaves()
    logits = leaves["hidden"] @ leaves["weight"].T
    if case.bias is not None:
        logits = logits + leaves["bias"]
    logits = logits.float() * case.head.logit_scale
    if case.head.softcap is not None:
        logits = case.head.softcap * torch.tanh(logits / case.head.softcap)
    out = torch.zeros_like(logits, dtype=torch.bool) if support is None else outside(support, logits)
    log_p = torch.log_softmax((logits / config.temperature).masked_fill(out, -torch.inf), -1)
    logprobs = log_p.gather(-1, case.targets.clamp(min=0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p.masked_fill(out, 0.0)).sum(-1)
    loss = policy_loss(logprobs, case.advantages, entropy=entropy, config=config, **case.policy_inputs(config)).loss
    loss.backward()
    return loss, {name: leaf.grad for name, leaf in leaves.items()}


def run(case: Case, config: LossConfig, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    leaves = case.leaves()
    out = grpo_loss(
        leaves["hidden"],
        leaves["weight"],
        case.targets,
        case.advantages,
        bias=leaves.get("bias"),
        config=config,
        **head_options(case),
        **(case.policy_inputs(config) | {"workspace_bytes": WORKSPACE} | options),
    )
    out.loss.backward()
    return out, {name: leaf.grad for name, leaf in leaves.items()}


def legal_plans(config: LossConfig) -> list[str]:
    """The plans that serve an objective when everything needs a gradient and the old logprobs are given."""
    fused = [] if (config.top_entropy_quantile < 1) else ["resident"]
    if slope_scope(config, has_old=True) == "row":
        fused.append("single_pass")
    return [*fused, "recompute", "lean"]


# -- the matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kwargs", OBJECTIVES)
def test_every_objective_and_plan(kwargs: dict[str, Any], layout: str, backend: str) -> None:
    """Loss and every gradient within 1e-5 (float32) of the oracle, in every plan that serves the objective."""
    config = LossConfig(**kwargs, temperature=0.9)
    case = make_case(1, bias=True, softcap=20.0, temperature=0.9, zero_advantages=0.3)
    case = padded(case, fill_target=-100, fill_logprob=float("nan")) if layout == "padded" else case
    expected, gradients = oracle(case, config)
    plain_loss, plain = eager(replace(case, targets=case.targets.clamp(min=0)), config)
    for plan in (*legal_plans(config), "auto"):
        out, actual = run(case, config, plan=plan, backend=backend)
        assert plan in (out.plan, "auto")
        # A loss is a difference of sums: its own conditioning shows in plain float32 arithmetic.
        assert_close(f"{plan} loss", out.loss, expected.loss, eager=plain_loss)
        for name, gradient in gradients.items():
            assert_close(f"{plan} grad {name}", actual[name], gradient, eager=plain[name])
        assert_close("logprobs", out.logprobs[out.computed], expected.logprobs[out.computed])
        assert_close("entropy", out.entropy[out.computed], expected.entropy[out.computed])


@pytest.mark.parametrize("level", AXES["level"])
@pytest.mark.parametrize("loss_type", AXES["loss_type"])
def test_full_product_in_float64(loss_type: str, level: str) -> None:
    """Each KL with each correction, both layouts, every plan in turn: no rounding hides a wrong formula."""
    case = make_case(13, lengths=(5, 1, 7, 0, 4), hidden_size=8, vocab=31, dtype=torch.float64, bias=True)
    layouts = (case, padded(case, fill_target=-100))
    combinations = [(kl, correction) for kl in AXES["kl"] for correction in AXES["correction"]]
    if loss_type == "vespo":  # it takes token-level corrections only
        combinations = [pair for pair in combinations if pair[1] not in ("strunc", "smask")]
    for number, (kl, correction) in enumerate(combinations):
        config = LossConfig(**objective_kwargs(loss_type, level, kl, correction, "nomask", "plain"))
        plans = legal_plans(config)
        for layout in layouts:
            expected, gradients = oracle(layout, config)
            out, actual = run(layout, config, plan=plans[number % len(plans)])
            assert_close(f"{kl} {correction} loss", out.loss, expected.loss)
            for name, gradient in gradients.items():
                assert_close(f"{kl} {correction} {out.plan} grad {name}", actual[name], gradient)


@pytest.mark.parametrize("kwargs", OBJECTIVES[::3])
def test_float64_agrees_to_ten_digits(kwargs: dict[str, Any]) -> None:
    """In float64 no rounding hides a wrong formula."""
    config = LossConfig(**kwargs)
    case = make_case(2, dtype=torch.float64, bias=True, logit_scale=0.5, token_advantages=True, missing_sampling=0.1)
    expected, gradients = oracle(case, config)
    for plan in ("auto", "lean"):
        out, actual = run(case, config, plan=plan)
        assert_close("loss", out.loss, expected.loss)
        for name, gradient in gradients.items():
            assert_close(f"grad {name}", actual[name], gradient)


@pytest.mark.parametrize("vocab", [1000, 32000, 50257, 151669])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_real_vocabularies(plan: str, dtype: torch.dtype, vocab: int) -> None:
    """Gradients at most twice as far off as a plain loss in the same dtype; logprobs of unrounded logits."""
    case = make_case(3, lengths=(5, 9, 2, 7), hidden_size=48, vocab=vocab, dtype=dtype)
    config = LossConfig(entropy_coef=0.01, beta=0.05)
    expected, gradients = oracle(case, config)
    plain_loss, plain = eager(case, config)
    out, actual = run(case, config, plan=plan, workspace_bytes=2**28)
    assert_close("loss", out.loss, expected.loss, eager=plain_loss)
    for name, gradient in gradients.items():
        assert actual[name].dtype == dtype
        assert_close(f"grad {name}", actual[name], gradient, eager=plain[name])
    error = (out.logprobs - expected.logprobs)[out.computed].square().mean().sqrt()
    assert error <= TOLERANCES[dtype].logprob_nats


def test_half_logits_are_not_rounded() -> None:
    """bf16 operands, float32 logits: far closer than bf16 logits could be."""
    case = make_case(4, lengths=(64, 64), hidden_size=64, vocab=4000, dtype=torch.bfloat16, logit_std=5.0)
    with torch.no_grad():
        ours = token_logprobs(case.hidden, case.weight, case.targets).logprobs
        logits = (case.hidden @ case.weight.T).float()
    exact = case.double().logprobs if case.logprobs.dtype == torch.float64 else case.logprobs.double()
    rounded = torch.log_softmax(logits, -1).gather(1, case.targets[:, None])[:, 0]
    error = (ours - exact).square().mean().sqrt()
    assert error <= 1e-5
    assert (rounded - exact).square().mean().sqrt() >= 100 * error


@pytest.mark.parametrize("plan", ["single_pass", "resident", "recompute", "lean", "auto"])
def test_small_chunks_are_exact(plan: str) -> None:
    """Many chunks, the last one ragged, give the same as one."""
    config = LossConfig(entropy_coef=0.02, importance_sampling_level="token" if plan == "single_pass" else "sequence")
    case = make_case(5, lengths=(40, 3, 90, 0, 61), vocab=3001, dtype=torch.float32, zero_advantages=0.2)
    expected, gradients = oracle(case, config)
    small = 4 * 2**19 * 4 + 112 * 3001 * 4  # scratch, and 112 rows of logits
    out, actual = run(case, config, plan=plan, workspace_bytes=small)
    assert_close("loss", out.loss, expected.loss)
    for name, gradient in gradients.items():
        assert_close(f"grad {name}", actual[name], gradient)


def test_frozen_head_serves_every_objective() -> None:
    """With weight and bias frozen, dHidden of every objective comes from one unit gradient."""
    case = make_case(6, bias=True, softcap=15.0)
    for kwargs in (p.values[0] for p in OBJECTIVES):
        config = LossConfig(**kwargs)
        _, gradients = oracle(case, config)
        hidden = case.hidden.clone().requires_grad_()
        out = grpo_loss(
            hidden,
            case.weight,
            case.targets,
            case.advantages,
            bias=case.bias,
            config=config,
            plan="frozen_head",
            **head_options(case),
            **case.policy_inputs(config),
        )
        out.loss.backward()
        assert out.plan == "frozen_head"
        assert_close(str(kwargs), hidden.grad, gradients["hidden"], eager=eager(case, config)[1]["hidden"])


def test_normalizer_splits_a_step_exactly() -> None:
    """Micro-batches with the step's normalizer add up to the undivided loss and gradients."""
    case = make_case(7, dtype=torch.float64)
    bounds = case.cu_seqlens.tolist()
    for loss_type, normalizer in (("dapo", case.loss_mask.sum()), ("grpo", 12.0), ("bnpo", int(case.loss_mask.sum()))):
        config = LossConfig(loss_type=loss_type)
        whole, whole_grads = run(case, config)
        leaves, total = case.leaves(), 0.0
        for first, last in ((0, 3), (3, 8), (8, 12)):
            rows = slice(bounds[first], bounds[last])
            out = grpo_loss(
                leaves["hidden"][rows],
                leaves["weight"],
                case.targets[rows],
                case.advantages[first:last],
                cu_seqlens=case.cu_seqlens[first : last + 1] - bounds[first],
                loss_mask=case.loss_mask[rows],
                old_logprobs=case.old_logprobs[rows],
                config=config,
                normalizer=normalizer,
            )
            out.loss.backward()
            total += out.loss.item()
        assert total == pytest.approx(whole.loss.item(), rel=1e-12)
        assert rel_rms(leaves["weight"].grad, whole_grads["weight"]) <= 1e-12


@pytest.mark.parametrize("plan", ["single_pass", "resident", "recompute", "lean"])
def test_main_grad_takes_the_weight_gradient(plan: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = make_case(8, dtype=dtype)
        expected, gradients = oracle(case, LossConfig())
        leaves, buffer = case.leaves(), torch.ones(case.weight.shape)
        out = grpo_loss(
            leaves["hidden"],
            leaves["weight"],
            case.targets,
            case.advantages,
            main_grad=buffer,
            plan=plan,
            **case.policy_inputs(LossConfig()),
        )
        out.loss.backward()
        assert leaves["weight"].grad is None
        assert rel_rms(buffer - 1, gradients["weight"]) <= max(2 * TOLERANCES[dtype].floor, 1e-5)
        assert rel_rms(leaves["hidden"].grad, gradients["hidden"]) <= 2 * TOLERANCES[dtype].floor
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3, abs=1e-4)


# -- token_logprobs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["auto", "recompute", "lean"])
@pytest.mark.parametrize("through", ["logprobs", "entropy", "both"])
def test_token_logprobs_gradients(through: str, plan: str) -> None:
    case = make_case(9, dtype=torch.float64, bias=True, softcap=10.0, logit_scale=0.7)
    temperature = torch.linspace(0.5, 1.5, case.targets.numel(), dtype=torch.float64)
    upstream = torch.randn(2, case.targets.numel(), dtype=torch.float64)
    results = []
    for function in (token_logprobs, reference_logprobs):
        leaves = case.leaves()
        options = {"bias": leaves["bias"], "temperature": temperature}
        if function is token_logprobs:
            out = token_logprobs(
                leaves["hidden"], leaves["weight"], case.targets, plan=plan, **options, **head_options(case)
            )
            logprobs, entropy = out.logprobs, out.entropy
        else:
            logprobs, entropy = reference_logprobs(
                leaves["hidden"], leaves["weight"], case.targets, head=case.head, **options
            )
        loss = (logprobs * upstream[0]).sum() * (through != "entropy") + (entropy * upstream[1]).sum() * (
            through != "logprobs"
        )
        loss.backward()
        results.append((logprobs, entropy, *(leaf.grad for leaf in leaves.values())))
    for ours, exact in zip(*results, strict=True):
        assert rel_rms(ours, exact) <= 1e-10


def test_token_logprobs_shapes_and_mask() -> None:
    case = make_case(10, lengths=(12,))
    hidden, targets = case.hidden.reshape(3, 4, -1), case.targets.reshape(3, 4)
    mask = torch.arange(12).reshape(3, 4) % 2
    full = token_logprobs(hidden, case.weight, targets)
    some = token_logprobs(hidden, case.weight, torch.where(mask == 1, targets, -100), loss_mask=mask, entropy=False)
    assert full.logprobs.shape == full.entropy.shape == (3, 4)
    assert some.entropy is None
    assert torch.equal(some.logprobs, full.logprobs * mask)


def test_autocast_casts_like_a_linear_layer() -> None:
    case = make_case(11)
    leaves = case.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grpo_loss(leaves["hidden"], leaves["weight"], case.targets, case.advantages, cu_seqlens=case.cu_seqlens)
    out.loss.backward()
    half = grpo_loss(
        case.hidden.bfloat16(), case.weight.bfloat16(), case.targets, case.advantages, cu_seqlens=case.cu_seqlens
    )
    assert torch.equal(out.loss, half.loss)
    assert leaves["weight"].grad.dtype == torch.float32


# -- a test that passes on anything is none ---------------------------------------------------------------------------


def test_wrong_results_would_fail() -> None:
    """Zeroed, scaled and partly missing gradients are all beyond the tolerances."""
    case = make_case(12)
    _, gradients = oracle(case, LossConfig())
    good = run(case, LossConfig())[1]["weight"]
    assert_close("good", good, gradients["weight"])
    for bad in (torch.zeros_like(good), good * 1.0001, torch.where(torch.arange(97)[:, None] == 5, 0.0, good)):
        with pytest.raises(AssertionError):
            assert_close("bad", bad, gradients["weight"])
