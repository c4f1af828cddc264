"""Losses on supports against the float64 oracle with masked full logits: every objective, layout, plan and dtype.

Rows of every kind stand beside each other: of 1 token, of 2 and a few (sparse), of a share of V and of V - 1 (masked),
of all of V and without a support (whole). What is exact, refused or cut is in tests/test_support_edges.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast import devices
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.loss import grpo_loss, token_logprobs
from grpo_fast.ops.call import workspace_for
from grpo_fast.packing import Support
from grpo_fast.reference import reference_logprobs
from tests.cases import (
    AXES,
    BACKENDS,
    INTERPRETED,
    OBJECTIVES,
    TOLERANCES,
    Case,
    assert_close,
    make_case,
    objective_kwargs,
    padded,
    rel_rms,
)
from tests.supports import (
    SHARE,
    draw_support,
    on_support,
    padded_support,
    size_of,
    sparse_share,
    supported,
)
from tests.test_loss import eager, head_options, oracle, run
from tests.test_loss import legal_plans as plans_without

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("fp32", "bf16", "fp16")
WITH_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)


def legal_plans(config: LossConfig) -> list[str]:
    """Those that serve an objective on a support."""
    return [plan for plan in plans_without(config) if plan != "resident"]


def rows_of_logits(backend: str, rows: int, case: Case) -> int:
    """Bytes of a workspace that holds so many rows."""
    return workspace_for(backend, case.weight.shape[0], case.hidden.dtype, case.hidden.device, rows)


def in_layout(case: Case, support: Support, layout: str) -> tuple[Case, Support]:
    if layout == "packed":
        return case, support
    assert case.cu_seqlens is not None
    filled = padded(case, fill_target=-100, fill_logprob=float("nan"))
    return filled, padded_support(support, case.cu_seqlens)


def check(case: Case, support: Support, config: LossConfig, plan: str, **options: Any) -> Any:
    """A step within what its dtype allows of the oracle: loss, every gradient, log-probabilities, entropies."""
    expected, gradients = oracle(case, config, support=support)
    plain_loss, plain = eager(replace(case, targets=case.targets.clamp(min=0)), config, support)
    out, actual = run(case, config, plan=plan, support=support, **options)
    assert out.plan == plan or plan == "auto"
    # A loss is a difference of terms of the size of the advantages.
    error, size = (float(v) for v in ((out.loss - expected.loss).detach().abs(), case.advantages.abs().mean()))
    if not error <= TOLERANCES[torch.float32].floor * size:
        assert_close(f"{plan} loss", out.loss, expected.loss, eager=plain_loss)
    for name, gradient in gradients.items():
        assert actual[name].dtype == getattr(case, name).dtype
        assert_close(f"{plan} grad {name}", actual[name], gradient, eager=plain[name])
    for name in ("logprobs", "entropy"):  # of unrounded logits, whatever the operands
        error = (getattr(out, name) - getattr(expected, name))[out.computed].square().mean().sqrt()
        assert error <= TOLERANCES[torch.float32].logprob_nats, name
    return out


# -- the matrix -------------------------------------------------------------------------------------------------------


@WITH_BACKENDS
@pytest.mark.parametrize("number", range(0, len(OBJECTIVES), 5 if INTERPRETED else 1))
def test_every_objective_and_plan(number: int, backend: str) -> None:
    """float32 within 1e-5, in every plan that serves the objective; layouts take turns, and tiles of few rows."""
    config = LossConfig(**OBJECTIVES[number].values[0], temperature=0.9)
    case = make_case(1, bias=True, softcap=20.0, temperature=0.9, zero_advantages=0.3, missing_sampling=0.1)
    case, support = in_layout(*supported(case, "mixed", number), ("packed", "padded")[number // 3 % 2])
    for plan in ("auto", *legal_plans(config)):
        with sparse_share(SHARE, backend):
            rows = rows_of_logits(backend, (16, 1000)[number % 2], case)
            check(case, support, config, plan, backend=backend, workspace_bytes=rows)


@pytest.mark.skipif(INTERPRETED, reason="float64 is torch's")
@pytest.mark.parametrize("level", AXES["level"])
@pytest.mark.parametrize("loss_type", AXES["loss_type"])
def test_full_product_in_float64(loss_type: str, level: str) -> None:
    """Each KL with each correction, layouts and plans in turn: no rounding hides a wrong formula."""
    case = make_case(13, lengths=(5, 1, 7, 0, 4), hidden_size=8, vocab=31, dtype=torch.float64, bias=True)
    packed = supported(case, "mixed", 4)
    layouts = [in_layout(*packed, layout) for layout in ("packed", "padded")]
    combinations = [(kl, correction) for kl in AXES["kl"] for correction in AXES["correction"]]
    if loss_type == "vespo":  # it takes token-level corrections only
        combinations = [pair for pair in combinations if pair[1] not in ("strunc", "smask")]
    for number, (kl, correction) in enumerate(combinations):
        config = LossConfig(**objective_kwargs(loss_type, level, kl, correction, "nomask", "plain"))
        plans = legal_plans(config)
        layout, support = layouts[number // len(plans) % 2]
        expected, gradients = oracle(layout, config, support=support)
        with sparse_share(SHARE, "torch"):
            out, actual = run(layout, config, plan=plans[number % len(plans)], support=support)
        assert_close(f"{kl} {correction} loss", out.loss, expected.loss)
        for name, gradient in gradients.items():
            assert_close(f"{kl} {correction} {out.plan} grad {name}", actual[name], gradient)


@WITH_BACKENDS
@pytest.mark.parametrize("mixture", ["mixed", "sparse", "masked", "light", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_every_plan_and_dtype(dtype: torch.dtype, mixture: str, backend: str) -> None:
    """At most twice as far off as plain masked logits of the dtype, through all of the transform, in chunks."""
    config = LossConfig(beta=0.1, entropy_coef=0.02, temperature=1.3)
    case = make_case(
        2, (7, 1, 37, 0, 5, 19), vocab=203, bias=True, logit_scale=0.7, softcap=8.0, temperature=1.3, dtype=dtype
    )
    case, support = supported(case, mixture, 3)
    for plan in legal_plans(config)[:: 2 if INTERPRETED else 1]:
        with sparse_share(SHARE, backend):
            check(case, support, config, plan, backend=backend, workspace_bytes=rows_of_logits(backend, 16, case))


@WITH_BACKENDS
@pytest.mark.skipif(INTERPRETED, reason="large")
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
@pytest.mark.parametrize(("vocab", "dtype"), [*zip((1000, 32000, 50257), DTYPES, strict=True)])
def test_real_vocabularies(vocab: int, dtype: torch.dtype, plan: str, backend: str) -> None:
    """With the limit that the backend has measured."""
    case = make_case(3, lengths=(5, 9, 2, 7), hidden_size=48, vocab=vocab, dtype=dtype, token_advantages=True)
    support = draw_support(case.targets, vocab, "mixed", 5)
    check(
        on_support(case, support),
        support,
        LossConfig(entropy_coef=0.01, beta=0.05),
        plan,
        backend=backend,
        workspace_bytes=2**28,
    )


@WITH_BACKENDS
def test_sparse_masked_and_whole_rows_agree(backend: str) -> None:
    """One batch with every row sparse, with none sparse, and by the tests' limit: the same up to rounding."""
    case, support = supported(make_case(7, bias=True, softcap=9.0, zero_advantages=0.3), "mixed", 1)
    results = []
    for share in (1, SHARE, 1000):
        for plan in ("single_pass", "recompute", "lean")[:: 2 if INTERPRETED else 1]:
            with sparse_share(share, backend):
                out, gradients = run(case, LossConfig(), support=support, plan=plan, backend=backend)
            results.append({"loss": out.loss, "logprobs": out.logprobs, "entropy": out.entropy, **gradients})
    for name, value in results[0].items():
        for other in results[1:]:
            assert rel_rms(other[name], value) <= 2e-6, name


@WITH_BACKENDS
@pytest.mark.parametrize("elements", [1, 100, 1000])
@pytest.mark.parametrize("mixture", ["mixed", "sparse", "masked"])
def test_blocks_cut_rows_and_sums(mixture: str, elements: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row functions and sums of gathered rows that work in blocks: a segment of a few words crosses several."""
    monkeypatch.setitem(devices.TRAITS, "cpu", replace(devices.TRAITS["cpu"], row_block_elements=elements))
    config = LossConfig(entropy_coef=0.02)
    case, support = supported(make_case(5, (9, 1, 22), bias=True, dtype=torch.float32), mixture, 2)
    for plan in legal_plans(config):
        with sparse_share(SHARE, backend):
            check(case, support, config, plan, backend=backend)


@WITH_BACKENDS
@pytest.mark.parametrize("mixture", ["mixed", "sparse"])
def test_frozen_head_serves_every_objective(mixture: str, backend: str) -> None:
    """dHidden of every objective from one unit gradient; nothing is written for the head."""
    case, support = supported(make_case(6, bias=True, softcap=15.0), mixture, 2)
    for kwargs in (p.values[0] for p in OBJECTIVES[:: 26 if INTERPRETED else 3]):
        config = LossConfig(**kwargs)
        _, gradients = oracle(case, config, support=support)
        hidden = case.hidden.clone().requires_grad_()
        with sparse_share(SHARE, backend):
            out = grpo_loss(
                hidden, case.weight, case.targets, case.advantages, bias=case.bias, config=config, support=support,
                plan="frozen_head", backend=backend, **head_options(case), **case.policy_inputs(config),
            )  # fmt: skip
        out.loss.backward()
        assert out.plan == "frozen_head"
        plain = eager(case, config, support)[1]["hidden"]
        assert_close(str(kwargs), hidden.grad, gradients["hidden"], eager=plain)


@WITH_BACKENDS
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_a_temperature_for_each_row(plan: str, backend: str) -> None:
    case = make_case(11, bias=True, softcap=9.0, dtype=torch.float32)
    temperature = torch.linspace(0.4, 2.0, case.targets.numel())
    support = draw_support(case.targets, 97, "mixed", 8)
    config = LossConfig(beta=0.1, entropy_coef=0.03)
    given = case.policy_inputs(config) | {"temperature": temperature}
    expected, gradients = oracle(case, config, support=support, temperature=temperature.double())
    leaves = case.leaves()
    with sparse_share(SHARE, backend):
        out = grpo_loss(
            *(leaves["hidden"], leaves["weight"], case.targets, case.advantages), bias=leaves["bias"], config=config,
            support=support, plan=plan, backend=backend, workspace_bytes=rows_of_logits(backend, 16, case),
            **head_options(case), **given,
        )  # fmt: skip
    out.loss.backward()
    assert_close("loss", out.loss, expected.loss)
    for name, gradient in gradients.items():
        assert_close(name, leaves[name].grad, gradient)


# -- the weight's gradient --------------------------------------------------------------------------------------------


@WITH_BACKENDS
@pytest.mark.parametrize("mixture", ["mixed", "sparse", "singletons"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_main_grad(dtype: torch.dtype, mixture: str, backend: str) -> None:
    """It is added to, where ids occur: elsewhere its bits stay, -0.0 among them, if there are no dense rows."""
    case, support = supported(make_case(8, dtype=dtype, vocab=211, bias=True), mixture, 6)
    _, gradients = oracle(case, LossConfig(), support=support)
    before = torch.randn(case.weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-2
    before[::3] = -0.0
    touched = torch.zeros(211, dtype=torch.bool)
    touched[support[case.loss_mask].token_ids.long()] = True
    for plan in ("single_pass", "recompute", "lean"):
        leaves, buffer = case.leaves(), before.clone()
        with sparse_share(SHARE, backend):
            out = grpo_loss(
                *(leaves["hidden"], leaves["weight"], case.targets, case.advantages), bias=leaves["bias"],
                main_grad=buffer, support=support, plan=plan, backend=backend, **case.policy_inputs(LossConfig()),
            )  # fmt: skip
            out.loss.backward()
        assert leaves["weight"].grad is None
        if mixture != "mixed":
            assert 20 < int(touched.sum()) < 190
            rest = ~touched if mixture == "sparse" else slice(None)
            assert torch.equal(buffer[rest].view(torch.int32), before[rest].view(torch.int32)), plan
        floor = 2 * TOLERANCES[dtype].floor
        assert rel_rms(buffer.double() - before.double(), gradients["weight"]) <= floor
        assert rel_rms(leaves["hidden"].grad, gradients["hidden"]) <= floor
        assert rel_rms(leaves["bias"].grad, gradients["bias"]) <= floor


@WITH_BACKENDS
@pytest.mark.parametrize("share", [1, SHARE, 1000])
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_words_outside_every_support_get_exactly_no_gradient(plan: str, share: int, backend: str) -> None:
    case = make_case(12, vocab=150, bias=True, dtype=torch.bfloat16)
    case = replace(case, targets=case.targets % 40)
    support = draw_support(case.targets, 40, "mixed", 5)
    alone = Support(case.targets.int(), torch.arange(case.targets.numel() + 1))
    whole = support.sizes == 0  # in their places rows of one token
    both = Support.cat([support, alone])
    support = both[torch.where(whole, torch.arange(whole.numel()) + whole.numel(), torch.arange(whole.numel()))]
    config = LossConfig(entropy_coef=0.1)
    with sparse_share(share, backend):
        _, gradients = run(
            case,
            config,
            support=support,
            plan=plan,
            backend=backend,
            old_logprobs=None,
            workspace_bytes=rows_of_logits(backend, 16, case),
        )
    assert not gradients["weight"][40:].any()
    assert not gradients["bias"][40:].any()
    assert gradients["weight"][:40].any(1).sum() > 30


# -- token_logprobs ---------------------------------------------------------------------------------------------------


@WITH_BACKENDS
@pytest.mark.parametrize("through", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("plan", ["recompute", "lean", "frozen_head"])
def test_token_logprobs(plan: str, through: str, backend: str) -> None:
    """Values and gradients, with rows that are masked by the target and rows that are masked by the mask."""
    case = make_case(9, bias=True, softcap=10.0, logit_scale=0.7)
    support = draw_support(case.targets, 97, "mixed", 3)
    temperature = torch.linspace(0.5, 1.5, case.targets.numel())
    mask = torch.arange(case.targets.numel()) % 7 > 0
    targets = torch.where(torch.arange(case.targets.numel()) % 5 > 0, case.targets, -100)
    kept = mask & (targets != -100)
    upstream = torch.randn(2, case.targets.numel(), dtype=torch.float64)
    factors = [through != "entropy", through != "logprobs"]
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in case.leaves().items()}
    frozen = plan == "frozen_head"
    expected = reference_logprobs(
        exact["hidden"][kept], exact["weight"], targets[kept], bias=exact["bias"], head=case.head,
        temperature=temperature.double()[kept], support=support[kept],
    )  # fmt: skip
    sum((f * u[kept] * v).sum() for f, u, v in zip(factors, upstream, expected, strict=True)).backward()
    leaves = case.leaves()
    if frozen:
        leaves["weight"].requires_grad_(False)
        leaves["bias"].requires_grad_(False)
    with sparse_share(SHARE, backend):
        got = token_logprobs(
            leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], temperature=temperature, loss_mask=mask,
            support=support, plan=plan, backend=backend,
            head=HeadConfig(logit_scale=case.head.logit_scale, softcap=case.head.softcap),
        )  # fmt: skip
        sum(
            (f * u * v).sum() for f, u, v in zip(factors, upstream, (got.logprobs, got.entropy), strict=True)
        ).backward()
    for value, exact_value in zip((got.logprobs, got.entropy), expected, strict=True):
        assert rel_rms(value[kept], exact_value) <= 1e-5
        assert not value[~kept].any()
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert rel_rms(leaf.grad, exact[name].grad) <= 1e-5, name


@WITH_BACKENDS
def test_rows_are_those_of_flattened_targets(backend: str) -> None:
    case = make_case(10, lengths=(12,))
    support = draw_support(case.targets, 97, "mixed", 7)
    with sparse_share(SHARE, backend):
        flat = token_logprobs(case.hidden, case.weight, case.targets, support=support, backend=backend)
        shaped = token_logprobs(
            case.hidden.reshape(3, 4, -1), case.weight, case.targets.reshape(3, 4), support=support, backend=backend
        )
    assert torch.equal(shaped.logprobs.reshape(-1), flat.logprobs)
    assert torch.equal(shaped.entropy.reshape(-1), flat.entropy)


# -- a test that passes on anything is none ---------------------------------------------------------------------------


def test_the_oracle_tells_supports_apart() -> None:
    """Mixtures have rows of every kind, and one word more or less in one row is far beyond the tolerance."""
    case, support = supported(make_case(1), "mixed", 0)
    sizes = support.sizes
    kinds = [sizes == 0, sizes == 1, (sizes > 1) & (sizes <= 97 // SHARE), (sizes > 97 // SHARE) & (sizes < 97)]
    assert all(int(kind.sum()) >= 5 for kind in (*kinds, sizes == 97))
    assert size_of(-1, 97) == 96
    config = LossConfig(loss_type="reinforce")
    row = int((kinds[2] & case.loss_mask & (sizes > 2)).nonzero()[0])
    ids = support[row : row + 1].token_ids
    other = int(ids[ids != case.targets[row]][0])
    less = Support(ids[ids != other], torch.tensor([0, ids.numel() - 1]))
    changed = Support.cat([support[:row], less, support[row + 1 :]])
    one, two = (oracle(case, config, support=s) for s in (support, changed))
    assert rel_rms(two[1]["weight"], one[1]["weight"]) > 1e-3
    with pytest.raises(AssertionError, match="grad"):
        assert_close("grad", _float(two[1]["weight"]), one[1]["weight"])


def _float(values: Tensor) -> Tensor:
    return values.float()
