"""Where numbers are extreme: float16's scale, logits of -inf, bad rows, a process that allows less than float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu.step import statistics_of
from grpo_fast.backends import torch as torch_backend
from grpo_fast.backends.base import RowChunk, RowSlopes, Transform, get_backend
from grpo_fast.backends.torch import add_product
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.loss import grpo_loss, policy_loss, token_logprobs
from tests.allocations import AllocationSpy
from tests.cases import BACKENDS, TOLERANCES, make_case, rel_rms
from tests.test_loss import legal_plans, oracle, run

HALF = TOLERANCES[torch.float16].floor


# -- float16's scale --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
@pytest.mark.parametrize("advantage", [0.0, 1e-8])
def test_only_the_entropy_has_a_gradient(advantage: float, plan: str, backend: str) -> None:
    """B2: g = 0, or next to it, says nothing of the scale that e needs."""
    case = make_case(1, dtype=torch.float16)
    case.advantages.fill_(advantage)
    config = LossConfig(entropy_coef=5.0)
    _, gradients = oracle(case, config)
    _, actual = run(case, config, plan=plan, backend=backend, workspace_bytes=None)
    assert all(rel_rms(actual[name], gradients[name]) <= 2 * HALF for name in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", ["single_pass", "resident", "recompute", "lean"])
@pytest.mark.parametrize("normalizer", [1e6, 1.0, 1e-3])
def test_weights_of_any_size(normalizer: float, plan: str, backend: str) -> None:
    """B3: a loss divided by a million tokens, or by a thousandth; the gradients come back as float32 scaled sums."""
    case = make_case(2, dtype=torch.float16)
    config = LossConfig(beta=0.01, entropy_coef=0.01)
    given = {"normalizer": normalizer, "entropy_normalizer": normalizer}
    exact, leaves = case.double(), case.double().leaves()
    policy = exact.policy_inputs(config)
    from grpo_fast.reference import reference_loss

    out = reference_loss(
        leaves["hidden"], leaves["weight"], exact.targets, exact.advantages, config=replace(config, entropy_coef=0.0),
        normalizer=normalizer, **policy,
    )  # fmt: skip
    kept = exact.loss_mask
    from grpo_fast.reference import reference_logprobs

    _, entropy = reference_logprobs(leaves["hidden"][kept], leaves["weight"], exact.targets[kept])
    (out.loss - config.entropy_coef * entropy.sum() / normalizer).backward()
    buffer, ours = torch.zeros(case.weight.shape), case.leaves()
    result = grpo_loss(
        ours["hidden"], ours["weight"], case.targets, case.advantages, config=config, plan=plan, backend=backend,
        main_grad=buffer, **given, **case.policy_inputs(config),
    )  # fmt: skip
    result.loss.backward()
    assert rel_rms(buffer, leaves["weight"].grad) <= HALF
    if normalizer != 1e6:  # the gradient of hidden is float16 itself, and a millionth is below its normal numbers
        assert rel_rms(ours["hidden"].grad, leaves["hidden"].grad) <= 2 * HALF


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharp_temperature_does_not_overflow(backend: str) -> None:
    case = make_case(3, dtype=torch.float16, temperature=1e-4)
    config = LossConfig(temperature=1e-4)
    _, gradients = oracle(case, config)
    for plan in legal_plans(config):
        leaves, buffer = case.leaves(), torch.zeros(case.weight.shape)
        out = grpo_loss(
            leaves["hidden"], leaves["weight"], case.targets, case.advantages, config=config, plan=plan,
            backend=backend, main_grad=buffer, **case.policy_inputs(config),
        )  # fmt: skip
        out.loss.backward()
        assert rel_rms(buffer, gradients["weight"]) <= HALF, plan


@pytest.mark.parametrize("plan", ["resident", "recompute", "lean"])
@pytest.mark.parametrize("old", [-500.0, 500.0])
def test_old_logprobs_of_rows_not_computed_reach_no_exponential(old: float, plan: str) -> None:
    """A sequence of zero advantage is left out; exp(0 - old) of it would be infinite, and infinity times 0 is NaN."""
    case = make_case(4, lengths=(5, 6, 7), masked_fraction=0.0, masked_sequence=False)
    case.advantages[1] = 0.0
    left_out = slice(5, 11)
    config = LossConfig(importance_sampling_level="token" if plan != "resident" else "sequence")
    given = case.policy_inputs(config)
    plain, gradients = run(case, config, plan=plan, **given)
    far = given["old_logprobs"].clone()
    far[left_out] = old
    out, actual = run(case, config, plan=plan, **(given | {"old_logprobs": far}))
    assert not out.computed[left_out].any()
    assert out.loss == plain.loss
    assert all(torch.equal(actual[name], gradients[name]) for name in gradients)
    ours, expected = out.metrics.as_dict(), plain.metrics.as_dict()
    assert ours == expected


# -- logits of -inf ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("e", [3.0, -40.0, 1e4])
def test_words_that_cannot_be(e: float, backend: str) -> None:
    """B7: of probability 0; their gradient is 0 however large the entropy's slope."""
    logits = torch.randn(4, 64)
    logits[:, ::5] = -torch.inf
    rows = RowChunk(logits, torch.tensor([1, 2, 3, 4]), Transform(HeadConfig(), None, 1.0))
    engine = get_backend(backend)
    logprobs, entropy, lse = statistics_of(engine, rows)
    slopes = RowSlopes(lse, entropy, torch.full((4,), 0.5), torch.full((4,), e))
    z = logits.double().requires_grad_()
    possible = z.isfinite()
    log_p = torch.log_softmax(z, -1)
    entropies = -(log_p.exp() * torch.where(possible, log_p, 0.0)).sum(-1)
    assert rel_rms(entropy, entropies) <= 1e-6
    p = log_p.exp().detach()
    finite = torch.where(possible, log_p, 0.0).detach()
    expected = 0.5 * (torch.nn.functional.one_hot(rows.targets, 64) - p) - e * p * (
        finite + entropies[:, None].detach()
    )
    dx = engine.gradient(rows, slopes, dtype=torch.float32)
    assert rel_rms(dx, expected) <= 1e-5
    assert not dx[:, ::5].any()
    assert logprobs.isfinite().all()


# -- bad rows ---------------------------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")
BAD_NUMBERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("old -inf", {"old_logprobs": -INF}, {}),
    ("old inf", {"old_logprobs": INF}, {}),
    ("old nan", {"old_logprobs": NAN}, {}),
    ("old far", {"old_logprobs": -200.0}, {}),
    ("ref nan", {"ref_logprobs": NAN}, {"beta": 0.1}),
    ("ref far", {"ref_logprobs": 200.0}, {"beta": 0.1}),
    ("sampling inf", {"sampling_logprobs": -INF}, {"loss_type": "dppo"}),
    ("advantage nan", {"advantages": NAN}, {}),
    ("advantage inf", {"advantages": INF}, {}),
    ("hidden nan", {"hidden": NAN}, {}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("changes", "options"), [pytest.param(c, o, id=i) for i, c, o in BAD_NUMBERS])
def test_bad_rows_are_counted(changes: dict[str, Any], options: dict[str, Any], backend: str) -> None:
    """B9: whatever is not finite, value or gradient, in what is given or what comes out."""
    case = make_case(4, (6, 5, 4), token_advantages=True, masked_fraction=0.0, masked_sequence=False)
    config = LossConfig(**options, epsilon_high=0.3)
    assert run(case, config, backend=backend)[0].metrics.as_dict()["bad_rows"] == 0
    for name, number in changes.items():
        values = getattr(case, name).clone()
        values[[2, 9]] = number
        case = replace(case, **{name: values})
    case.advantages[[2, 9]] = case.advantages[[2, 9]].abs()  # at A > 0 the clipped side hides an infinite ratio
    out, gradients = run(case, config, backend=backend)
    assert out.metrics.as_dict()["bad_rows"] == 2
    known_good = [n for n, g in gradients.items() if bool(g.isfinite().all())]
    assert out.loss.isfinite() or not known_good or changes  # counted, whether or not the sum shows it


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_soft_cap_hides_no_infinite_state(backend: str) -> None:
    """cap tanh(inf) is finite; the gradient, 0 times inf, is not."""
    case = make_case(4, (6, 5, 4), softcap=10.0, masked_fraction=0.0, masked_sequence=False)
    case.hidden[[3, 8], 5] = torch.inf
    out, gradients = run(case, LossConfig(), backend=backend)
    assert out.logprobs.isfinite().all()
    assert not gradients["weight"].isfinite().all()
    assert out.metrics.as_dict()["bad_rows"] == 2


def test_unknown_sampling_logprobs_are_not_bad() -> None:
    case = make_case(5, missing_sampling=0.3)
    config = LossConfig(loss_type="dppo", importance_sampling_mode="token_mask")
    given = case.policy_inputs(config)
    assert bool(given["sampling_logprobs"].isnan().any())
    out = policy_loss(case.logprobs, case.advantages, config=config, **given)
    assert out.metrics.as_dict()["bad_rows"] == 0


# -- products ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bf16", "tf32"])
def allowed(request: pytest.FixtureRequest) -> Iterator[str]:
    """The process allows the CPU's library to multiply float32 operands in less."""
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = request.param
    yield str(request.param)
    assert switch.fp32_precision == request.param  # nobody has turned it
    switch.fp32_precision = before


@pytest.mark.parametrize("overwrite", [False, True])
def test_products_of_parts_are_float32(allowed: str, overwrite: bool) -> None:
    left, right = torch.randn(64, 256), torch.randn(256, 128)
    left[3, 5], left[7, 0], right[0, 9] = 1e-30, 1e30, 0.0
    out = torch.randn(64, 128)
    expected = left.double() @ right.double() + (0 if overwrite else out.double())
    add_product(out, left, right, overwrite=overwrite)
    assert rel_rms(out, expected) <= 1e-6
    left[0, 0] = torch.inf
    add_product(out, left, right, overwrite=True)
    assert not out[0].isfinite().any()
    assert out[1:].isfinite().all()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(7, 300, 5), (301, 3, 9), (2, 5, 700), (33, 34, 35), (1, 1, 1), (3, 0, 2)])
def test_parts_are_made_a_block_at_a_time(
    m: int, k: int, n: int, overwrite: bool, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "block_elements", lambda device: 64)
    torch.manual_seed(0)
    wide = torch.randn(m, n + 3)
    left, right, out = torch.randn(k, m).t(), torch.randn(k, n), wide[:, 2 : n + 2]
    expected = left.double() @ right.double() + (0 if overwrite else out.double())
    beside = wide[:, [0, 1, n + 2]]
    with AllocationSpy() as spy:
        add_product(out, left, right, overwrite=overwrite)
    assert spy.elements <= 64
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(wide[:, [0, 1, n + 2]], beside)


@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_memory_where_less_is_allowed(plan: str, allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a whole head would be several times its size, besides the workspace."""
    monkeypatch.setattr(torch_backend, "block_elements", lambda device: 2**14)
    vocab, width, tokens = 4000, 128, 256
    scratch = get_backend("torch").scratch_bytes(vocab, torch.float32, torch.device("cpu"))
    workspace = scratch + 4 * 64 * vocab
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    with AllocationSpy() as spy:
        out = grpo_loss(
            hidden, weight, torch.randint(vocab, (tokens,)), torch.ones(1), plan=plan, backend="torch",
            workspace_bytes=workspace,
        )  # fmt: skip
        out.loss.backward()
    assert spy.peak <= workspace + 2 * 4 * vocab * width + tokens * (5 * 4 * width + 400)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logprobs_where_less_is_allowed(allowed: str, dtype: torch.dtype) -> None:
    """A5, on a CPU: `torch.set_float32_matmul_precision("medium")` is bf16 there."""
    case = make_case(6, (64, 64), hidden_size=64, vocab=1000, dtype=dtype, logit_std=4.0)
    found = token_logprobs(case.hidden, case.weight, case.targets, backend="torch").logprobs
    assert float((found - case.logprobs).square().mean().sqrt()) <= 2e-6
    gradients = oracle(case, LossConfig())[1]
    actual = run(case, LossConfig(), backend="torch", workspace_bytes=None)[1]
    assert rel_rms(actual["weight"], gradients["weight"]) <= max(TOLERANCES[dtype].floor, 1e-5)


def test_nobody_turns_the_processs_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's: others multiply meanwhile."""
    turned: list[Any] = []

    class Switch:
        fp32_precision = property(lambda self: "ieee", lambda self, value: turned.append(value))

    monkeypatch.setattr(torch.backends.mkldnn, "matmul", Switch())
    case = make_case(7, dtype=torch.bfloat16)
    run(case, LossConfig(), backend="torch", workspace_bytes=None)
    assert not turned
