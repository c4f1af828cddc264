"""The triton backend under the interpreter: the oracle matrix, and the backend-neutral tests of losses and edges again.

`auto` is triton here (tests/conftest.py), so the tests that are imported run through its kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.loss import token_logprobs
from grpo_fast.ops import call
from tests.cases import OBJECTIVES, TOLERANCES, assert_close, make_case
from tests.test_edges import (  # noqa: F401
    check_first_step_ratio,
    test_a_compiled_caller_has_no_graph_break,
    test_backward_twice_gives_the_same,
    test_bad_hidden_states_are_counted,
    test_compaction_changes_nothing_but_the_work,
    test_forbidden_tokens_by_bias,
    test_huge_logits,
    test_nothing_to_learn_is_a_differentiable_zero,
    test_padding_may_hold_anything,
    test_vocabulary_of_one_and_single_tokens,
)
from tests.test_loss import (  # noqa: F401
    eager,
    legal_plans,
    oracle,
    run,
    test_main_grad_takes_the_weight_gradient,
    test_wrong_results_would_fail,
)
from tests.test_losses import _table, check_registered, test_the_device_term_is_the_records  # noqa: F401
from tests.test_memory import run as run_and_spy

LENGTHS = (7, 1, 9, 0, 5, 9)
WORKSPACE = 2**27


@pytest.mark.parametrize("kwargs", OBJECTIVES)
def test_every_objective_and_plan(kwargs: dict[str, Any]) -> None:
    """Loss and every gradient within 1e-5 (float32) of the oracle, in every plan that serves the objective."""
    config = LossConfig(**kwargs, temperature=0.9)
    case = make_case(1, LENGTHS, bias=True, softcap=20.0, temperature=0.9, zero_advantages=0.3)
    expected, gradients = oracle(case, config)
    plain_loss, plain = eager(case, config)
    for plan in legal_plans(config):
        out, actual = run(case, config, plan=plan)
        assert_close(f"{plan} loss", out.loss, expected.loss, eager=plain_loss)
        for name, gradient in gradients.items():
            assert_close(f"{plan} grad {name}", actual[name], gradient, eager=plain[name])
        assert_close("logprobs", out.logprobs[out.computed], expected.logprobs[out.computed])
        assert_close("entropy", out.entropy[out.computed], expected.entropy[out.computed])


@pytest.mark.parametrize("kwargs", OBJECTIVES[::9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    config = LossConfig(**kwargs)
    case = make_case(2, LENGTHS, dtype=dtype, bias=True, token_advantages=True, missing_sampling=0.1)
    expected, gradients = oracle(case, config)
    plain_loss, plain = eager(case, config)
    for plan in legal_plans(config):
        out, actual = run(case, config, plan=plan, workspace_bytes=WORKSPACE)
        assert_close(f"{plan} loss", out.loss, expected.loss, eager=plain_loss)
        for name, gradient in gradients.items():
            assert_close(f"{plan} grad {name}", actual[name], gradient, eager=plain[name])


def test_registered_losses() -> None:
    """Losses without a device term: statistics and gradients by the kernels, torch between."""
    check_registered("triton", make_case(5, LENGTHS, zero_advantages=0.3), ("single_pass", "resident", "lean"))


@pytest.mark.parametrize("vocab", [1000, 32000, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("plan", ["single_pass", "lean"])
def test_real_vocabularies(plan: str, dtype: torch.dtype, vocab: int) -> None:
    case = make_case(3, lengths=(3, 4), hidden_size=24, vocab=vocab, dtype=dtype, masked_sequence=False)
    config = LossConfig(entropy_coef=0.01, beta=0.05)
    expected, gradients = oracle(case, config)
    plain_loss, plain = eager(case, config)
    out, actual = run(case, config, plan=plan, workspace_bytes=2**28)
    assert_close("loss", out.loss, expected.loss, eager=plain_loss)
    for name, gradient in gradients.items():
        assert_close(f"grad {name}", actual[name], gradient, eager=plain[name])
    error = (out.logprobs - expected.logprobs)[out.computed].square().mean().sqrt()
    assert error <= TOLERANCES[dtype].logprob_nats


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_first_step_ratio_is_exactly_one(dtype: torch.dtype) -> None:
    check_first_step_ratio(1000, dtype, (30, 7, 9, 0, 5))


@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean", "resident"])
def test_runs_repeat_bit_for_bit(plan: str) -> None:
    case = make_case(5, LENGTHS, vocab=5003, bias=True)
    config = LossConfig(importance_sampling_level="token" if plan == "single_pass" else "sequence")
    first, first_grads = run(case, config, plan=plan)
    second, second_grads = run(case, config, plan=plan)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_negative_logit_scale(softcap: float | None) -> None:
    case = make_case(6, LENGTHS, bias=True, logit_scale=-0.5, softcap=softcap)
    config = LossConfig(entropy_coef=0.05)
    expected, gradients = oracle(case, config)
    for plan in ("single_pass", "lean"):
        out, actual = run(case, config, plan=plan)
        assert_close("loss", out.loss, expected.loss)
        for name, gradient in gradients.items():
            assert_close(f"{plan} grad {name}", actual[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_forward(dtype: torch.dtype) -> None:
    """Without gradients only, masked rows left out; the oracle's numbers."""
    case = make_case(7, LENGTHS, dtype=dtype, bias=True, softcap=20.0, temperature=0.8, vocab=1000)
    head = HeadConfig(softcap=20.0)
    options = {"bias": case.bias, "temperature": 0.8, "head": head, "loss_mask": case.loss_mask}
    with torch.no_grad():
        out = token_logprobs(case.hidden, case.weight, case.targets, plan="fused_forward", **options)
    kept = case.loss_mask
    for ours, exact in ((out.logprobs, case.logprobs), (out.entropy, case.entropy)):
        assert (ours - exact)[kept].square().mean().sqrt() <= 1e-5
        assert not ours[~kept].any()
    with pytest.raises(ValueError, match=r"'fused_forward' cannot serve this call: it keeps nothing for a backward"):
        token_logprobs(case.hidden.requires_grad_(), case.weight, case.targets, plan="fused_forward", **options)


def test_temperatures_by_row() -> None:
    case = make_case(4, LENGTHS, bias=True, softcap=10.0, logit_scale=0.7)
    temperature = torch.linspace(0.5, 1.5, case.targets.numel())
    for row in (2, 9, 20):
        one = token_logprobs(
            case.hidden[row : row + 1],
            case.weight,
            case.targets[row : row + 1],
            bias=case.bias,
            temperature=float(temperature[row]),
            head=HeadConfig(logit_scale=0.7, softcap=10.0),
        )
        all_rows = token_logprobs(
            case.hidden,
            case.weight,
            case.targets,
            bias=case.bias,
            temperature=temperature,
            head=HeadConfig(logit_scale=0.7, softcap=10.0),
        )
        torch.testing.assert_close(one.logprobs[0], all_rows.logprobs[row], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.entropy[0], all_rows.entropy[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["single_pass", "resident", "recompute", "lean", "frozen_head"])
def test_memory(plan: str, dtype: torch.dtype) -> None:
    """Logits, staged dx and all within the cap."""
    tokens, vocab = 192, 3001
    rows = 240 // (4 + dtype.itemsize)  # with dx beside them
    workspace = call.workspace_for("triton", 3072, dtype, torch.device("cpu"), rows)
    spy, rest = run_and_spy(plan, tokens, 16, vocab, dtype, workspace, sequences=12, backend="triton")
    assert spy.elements < tokens * vocab / 2
    assert spy.largest <= max(workspace, 4 * vocab * 16), spy.largest_shape
    assert spy.peak <= workspace + rest


@pytest.mark.parametrize("plan", ["single_pass", "recompute", "frozen_head"])
def test_staged_chunks_with_two_buffers_are_exact(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of several tiles each, tiles in turn in two buffers, the last of everything ragged."""
    budget = call.RowBudget(tile_rows=8, chunk_rows=16, staged_rows=24, num_buffers=2)
    monkeypatch.setattr(call, "row_budget", lambda *args: budget)
    config = LossConfig(entropy_coef=0.0 if plan == "frozen_head" else 0.02)
    case = make_case(5, lengths=(20, 3, 31, 0, 12), vocab=301, zero_advantages=0.2)
    expected, gradients = oracle(case, config)
    if plan == "frozen_head":
        hidden = case.hidden.clone().requires_grad_()
        out = token_logprobs(hidden, case.weight, case.targets, plan=plan)
        upstream = torch.randn_like(out.logprobs)
        (out.logprobs * upstream).sum().backward()
        exact = case.double()
        leaf = exact.hidden.clone().requires_grad_()
        exact_logprobs = torch.log_softmax(leaf @ exact.weight.T, -1).gather(1, case.targets[:, None])[:, 0]
        (exact_logprobs * upstream).sum().backward()
        assert_close("grad hidden", hidden.grad, leaf.grad)
        return
    out, actual = run(case, config, plan=plan)
    assert_close("loss", out.loss, expected.loss)
    for name, gradient in gradients.items():
        assert_close(f"grad {name}", actual[name], gradient)
