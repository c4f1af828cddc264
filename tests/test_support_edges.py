"""What is exact of losses on supports, what is refused, and what a GPU's branches make of them."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.backends.base import RowChunk, RowIds, RowSlopes, RowStatistics, Transform, get_backend
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.loss import grpo_loss, sparse_limit, token_logprobs
from grpo_fast.ops.support import split_rows
from grpo_fast.packing import Support
from tests.cases import BACKENDS, INTERPRETED, TOLERANCES, Case, make_case, rel_rms
from tests.stand_in import stand_in
from tests.supports import SHARE, as_support, draw_support, sparse_share, supported
from tests.test_loss import head_options, oracle, run
from tests.test_support import DTYPES, NAMES, legal_plans, rows_of_logits

GSPO = LossConfig(loss_type="grpo", importance_sampling_level="sequence")
SEQUENCES = [
    LossConfig(loss_type="gmpo"),
    LossConfig(loss_type="vespo"),
    replace(GSPO, importance_sampling_level="sequence_token", beta=0.1),
    replace(GSPO, top_entropy_quantile=0.5),
]
PLANS = ("single_pass", "recompute", "lean", "frozen_head", "auto")
WITH_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
STAND_IN = "triton" if INTERPRETED else "torch"
MOST_WAITS = 8 if INTERPRETED else 14
"""Of a step: to count rows, to split them in either pass, and where torch's row functions pad rows to one length."""


def head_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case.hidden, case.weight, case.targets, case.advantages


# -- exact ------------------------------------------------------------------------------------------------------------


@WITH_BACKENDS
@pytest.mark.parametrize("share", [1, SHARE, 1000], ids=["sparse", "both", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_the_first_ratio_is_exactly_one(dtype: torch.dtype, share: int, backend: str) -> None:
    """Old log-probabilities of a forward pass, in every plan, whatever rows it computes beside a row: bit for bit."""
    case = make_case(3, bias=True, softcap=20.0, dtype=dtype, temperature=0.8, zero_advantages=0.3)
    case = replace(case, temperature=0.8)
    support = draw_support(case.targets, 97, "mixed", 3)
    options = {"support": support, "backend": backend, "bias": case.bias, **head_options(case)}
    with sparse_share(share, backend):
        rows = rows_of_logits(backend, 32, case)
        with torch.no_grad():
            old = token_logprobs(
                *head_of(case)[:3], config=LossConfig(temperature=0.8), workspace_bytes=rows, **options
            ).logprobs
        for config in (LossConfig(beta=0.1), replace(GSPO, beta=0.1)):
            for plan in PLANS:
                if plan == "single_pass" and config.importance_sampling_level == "sequence":
                    continue
                leaves = case.leaves()
                for name in ("weight", "bias"):
                    leaves[name].requires_grad_(plan != "frozen_head")
                out = grpo_loss(
                    leaves["hidden"], leaves["weight"], *head_of(case)[2:], cu_seqlens=case.cu_seqlens,
                    loss_mask=case.loss_mask, old_logprobs=old, ref_logprobs=old, plan=plan, workspace_bytes=rows,
                    config=replace(config, temperature=0.8), **(options | {"bias": leaves["bias"]}),
                )  # fmt: skip
                out.loss.backward()
                metrics = out.metrics.as_dict()
                assert metrics["ratio/min"] == metrics["ratio/max"] == 1.0, plan
                assert metrics["approx_kl"] == metrics["kl"] == 0.0, plan
                assert torch.equal(out.logprobs[out.computed], old[out.computed]), plan


@WITH_BACKENDS
@pytest.mark.parametrize("share", [1, SHARE, 1000], ids=["sparse", "both", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_the_first_ratio_is_one_whatever_rows_are_left_out(dtype: torch.dtype, share: int, backend: str) -> None:
    """Old log-probabilities were of all rows; a step computes some, and the longest are not among them."""
    case = make_case(3, dtype=dtype, zero_advantages=0.0)
    support = draw_support(case.targets, 97, "mixed", 3)
    options = {"support": support, "backend": backend}
    sizes = support.sizes_in(97)
    with sparse_share(share, backend):
        rows = rows_of_logits(backend, 32, case)
        with torch.no_grad():
            old = token_logprobs(*head_of(case)[:3], workspace_bytes=rows, **options)
        for longest in (2, 3, 5, 29, 58):
            mask = (sizes <= longest) & (sizes > 1)
            out, _ = run(
                replace(case, loss_mask=mask, old_logprobs=old.logprobs), LossConfig(), workspace_bytes=rows, **options
            )
            assert 0 < out.computed.sum() < 86
            assert torch.equal(out.logprobs[out.computed], old.logprobs[out.computed]), longest
            assert torch.equal(out.entropy[out.computed], old.entropy[out.computed]), longest


@WITH_BACKENDS
@pytest.mark.parametrize("mixture", ["mixed", "sparse", "masked"])
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_the_same_bits_again(plan: str, mixture: str, backend: str) -> None:
    """On every run, and with ids in int32 and int64."""
    case, support = supported(make_case(4, bias=True, dtype=torch.bfloat16), mixture, 9)
    results = []
    for given in (support, support, Support(support.token_ids.int(), support.offsets.int())):
        with sparse_share(SHARE, backend):
            rows = rows_of_logits(backend, 32, case)
            out, grads = run(case, LossConfig(), support=given, plan=plan, backend=backend, workspace_bytes=rows)
        results.append((out.loss.detach(), out.logprobs, out.entropy, *grads.values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@WITH_BACKENDS
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_whole_supports_are_none(plan: str, backend: str) -> None:
    """All of V in every row: no support, up to rounding. No tokens in every row: no support, bit for bit."""
    case = make_case(5, bias=True, softcap=20.0, zero_advantages=0.3)
    count = case.targets.numel()
    every = Support(torch.arange(97).repeat(count), torch.arange(count + 1) * 97)
    empty = Support(torch.zeros(0, dtype=torch.int64), torch.zeros(count + 1, dtype=torch.int64))
    config = LossConfig(beta=0.1, entropy_coef=0.01)
    options = {"plan": plan, "backend": backend, "workspace_bytes": rows_of_logits(backend, 32, case)}
    plain, plain_grads = run(case, config, **options)
    for support, share in ((empty, SHARE), (every, SHARE), (every, 1)):
        with sparse_share(share, backend):
            out, grads = run(case, config, support=support, **options)
        for a, b in zip((out.loss, out.logprobs, out.entropy, *grads.values()),
                        (plain.loss, plain.logprobs, plain.entropy, *plain_grads.values()), strict=True):  # fmt: skip
            assert torch.equal(a, b) if support is empty else rel_rms(a, b) <= 1e-6
        assert out.metrics.as_dict() == pytest.approx(plain.metrics.as_dict(), rel=1e-6, abs=1e-7)


@WITH_BACKENDS
@pytest.mark.parametrize("config", [LossConfig(beta=0.1, entropy_coef=0.1), GSPO], ids=["dapo", "gspo"])
@pytest.mark.parametrize("plan", PLANS)
def test_one_word_leaves_nothing_to_learn(plan: str, config: LossConfig, backend: str) -> None:
    """Log-probability and entropy 0, no gradient, and a hidden state that holds NaN is not looked at."""
    if plan == "single_pass" and config is GSPO:
        pytest.skip("it couples tokens")
    if plan == "frozen_head" and config.entropy_coef:
        config = LossConfig(beta=0.1)
    case, support = supported(make_case(6, masked_sequence=False), "mixed", 1)
    single = support.sizes == 1
    assert 5 < int(single.sum()) < 40
    results = []
    for fill in (1.0, math.nan):
        filled = replace(case, hidden=torch.where(single[:, None], fill, case.hidden))
        leaves = filled.leaves()
        leaves["weight"].requires_grad_(plan != "frozen_head")
        with sparse_share(SHARE, backend):
            out = grpo_loss(
                leaves["hidden"], leaves["weight"], *head_of(filled)[2:], config=config, support=support, plan=plan,
                backend=backend, **case.policy_inputs(config),
            )  # fmt: skip
        out.loss.backward()
        assert not out.logprobs[single].any()
        assert not out.entropy[single].any()
        assert not leaves["hidden"].grad[single].any()
        assert leaves["hidden"].grad[~single & case.loss_mask].any()
        assert out.metrics.as_dict()["bad_rows"] == 0
        grads = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
        results.append([out.loss.detach(), out.logprobs, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@WITH_BACKENDS
def test_nothing_but_single_words(backend: str) -> None:
    case = make_case(7)
    support = draw_support(case.targets, 97, "singletons", 0)
    for plan in ("single_pass", "recompute", "lean"):
        out, grads = run(case, LossConfig(), support=support, plan=plan, backend=backend, old_logprobs=None)
        assert not any(gradient.any() for gradient in grads.values())
        assert not out.logprobs.any()
        assert out.metrics.as_dict()["ratio/max"] == 1.0


@WITH_BACKENDS
def test_rows_do_not_see_the_longest(backend: str) -> None:
    """Row functions give a row's bits whatever the lengths beside it, as far apart as lengths are."""
    gen = torch.Generator().manual_seed(0)
    sizes = torch.tensor([2, 3, 5, 17, 33, 100, 300, *range(40, 60), *range(500, 4000, 97), 20001])
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    logits, places = 3 * torch.randn(int(offsets[-1]), generator=gen), sizes // 2
    g, e = (torch.randn(sizes.numel(), generator=gen) for _ in range(2))

    def computed(count: int) -> tuple[Tensor, ...]:
        own, size = offsets[: count + 1], int(offsets[count])
        rows = RowChunk(
            logits[:size].clone(), places[:count], Transform(HeadConfig(softcap=9.0), None, 0.7), offsets=own,
            longest=int(sizes[:count].max()),
        )  # fmt: skip
        found = RowStatistics(*(torch.empty(count) for _ in range(3)))
        get_backend(backend).statistics(rows, found)
        slopes = RowSlopes(found.lse, found.entropy, g[:count], e[:count])
        return *found, get_backend(backend).gradient(rows, slopes, dtype=torch.float32)

    everything = computed(sizes.numel())
    for count in (1, 3, 4, 6, 27, sizes.numel() - 1):
        for part, whole in zip(computed(count), everything, strict=True):
            assert torch.equal(part, whole[: part.numel()]), count


@pytest.mark.skipif(INTERPRETED, reason="torch's and C++'s rows are the same")
@WITH_BACKENDS
def test_a_lone_row_is_summed_as_one_of_several(backend: str) -> None:
    """Also where torch would cut a lone row among its threads."""
    threads = torch.get_num_threads()
    logits = 3 * torch.randn(16, 50_000, generator=torch.Generator().manual_seed(0))

    def statistics(rows: slice) -> RowStatistics:
        own = logits[rows].clone()
        found = RowStatistics(*(torch.empty(own.shape[0]) for _ in range(3)))
        chunk = RowChunk(own, torch.arange(16)[rows], Transform(HeadConfig(), None, 1.0))
        get_backend(backend).statistics(chunk, found)
        return found

    try:
        torch.set_num_threads(2)
        together = statistics(slice(None))
        alone = [statistics(slice(row, row + 1)) for row in range(16)]
    finally:
        torch.set_num_threads(threads)
    for name in RowStatistics._fields:
        assert torch.equal(torch.cat([getattr(one, name) for one in alone]), getattr(together, name)), name


# -- backward ---------------------------------------------------------------------------------------------------------


@WITH_BACKENDS
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_backward_twice_and_scaled(plan: str, backend: str) -> None:
    case, support = supported(make_case(8, bias=True), "mixed", 2)
    _, gradients = oracle(case, LossConfig(), support=support)
    leaves = case.leaves()
    with sparse_share(SHARE, backend):
        out = grpo_loss(
            leaves["hidden"], leaves["weight"], *head_of(case)[2:], bias=leaves["bias"], support=support, plan=plan,
            backend=backend, **case.policy_inputs(LossConfig()),
        )  # fmt: skip
        loss, inputs = out.loss * 3, list(leaves.values())
        first = [g.clone() for g in torch.autograd.grad(loss, inputs, retain_graph=True)]
        second = torch.autograd.grad(loss, inputs)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    for name, one, other in zip(leaves, first, second, strict=True):
        assert torch.equal(one, other)
        assert rel_rms(one, 3 * gradients[name]) <= 1e-5


@WITH_BACKENDS
@pytest.mark.parametrize("mixture", ["mixed", "sparse", "masked"])
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_small_gradients_of_float16(plan: str, mixture: str, backend: str) -> None:
    """A denominator of 1e6 takes them below what float16 can say; a loss scaler brings them back."""
    case, support = supported(make_case(9, dtype=torch.float16, bias=True), mixture, 4)
    _, gradients = oracle(case, LossConfig(), support=support, normalizer=1e6)
    leaves = case.leaves()
    with sparse_share(SHARE, backend):
        out = grpo_loss(
            leaves["hidden"], leaves["weight"], *head_of(case)[2:], bias=leaves["bias"], support=support, plan=plan,
            normalizer=1e6, backend=backend, **case.policy_inputs(LossConfig()),
        )  # fmt: skip
        (out.loss * 2.0**16).backward()
    for name, gradient in gradients.items():
        bound = TOLERANCES[torch.float16].floor
        assert rel_rms(leaves[name].grad, 2.0**16 * gradient) <= bound, name


@pytest.mark.skipif(INTERPRETED, reason="what a compiler sees is the same")
@pytest.mark.parametrize(("config", "backend"), [(LossConfig(), "cpu"), (GSPO, "torch")], ids=["dapo", "gspo"])
def test_a_compiled_caller_has_no_graph_break(config: LossConfig, backend: str) -> None:
    case, support = supported(make_case(8, bias=True), "mixed", 2)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        given = Support(ids, offsets)
        out = grpo_loss(
            hidden * 1.5, weight, case.targets, case.advantages, bias=bias, config=config, support=given,
            backend=backend, **case.policy_inputs(config),
        )  # fmt: skip
        plain = token_logprobs(hidden, weight, case.targets, bias=bias, support=given, backend=backend)
        return out.loss * 2 + plain.logprobs.mean(), out.logprobs, out.metrics.vector

    results = []
    torch._dynamo.reset()
    with sparse_share(SHARE, backend):
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaves = case.leaves()
            loss, logprobs, metrics = function(*leaves.values(), support.token_ids, support.offsets)
            loss.backward()
            results.append((loss, logprobs, metrics.nan_to_num(), *(leaf.grad for leaf in leaves.values())))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


@WITH_BACKENDS
def test_supports_of_inference_mode(backend: str) -> None:
    """A rollout's, with a backward through a pass that saves them."""
    with torch.inference_mode():
        case, support = make_case(2), None
        support = draw_support(case.targets, 97, "mixed", 2)
    case = case.map(torch.clone)
    leaves = case.leaves()
    with sparse_share(SHARE, backend):
        got = token_logprobs(leaves["hidden"], leaves["weight"], case.targets, support=support, backend=backend)
    got.logprobs.sum().backward()
    assert leaves["weight"].grad.any()


@WITH_BACKENDS
def test_the_weights_gradient_is_rounded_once(backend: str) -> None:
    """With what is there: a narrow gradient is the wide one of the same numbers, rounded."""
    case, dtype = make_case(2), torch.float16 if INTERPRETED else torch.bfloat16
    support = draw_support(case.targets, 97, "sparse", 3)
    of = RowIds(support.token_ids.int(), support.offsets.long(), support.rows_of_ids())
    gen = torch.Generator().manual_seed(0)
    dx, base = torch.randn(of.ids.numel(), generator=gen), torch.randn(case.weight.shape, generator=gen).to(dtype)
    narrow, wide = base.clone(), base.float()
    for out in (narrow, wide):
        get_backend(backend).sparse_grad_weight(dx, case.hidden.to(dtype), of, out)
    assert torch.equal(narrow, wide.to(dtype))
    assert not torch.equal(narrow, base)


# -- plans, compaction and metrics ------------------------------------------------------------------------------------


@WITH_BACKENDS
@pytest.mark.parametrize("config", SEQUENCES, ids=lambda c: f"{c.loss_type}-{c.importance_sampling_level}")
def test_objectives_of_sequences_go_through_recompute(config: LossConfig, backend: str) -> None:
    case, support = supported(make_case(3, missing_sampling=0.1), "mixed", 3)
    with sparse_share(SHARE, backend):
        assert run(case, config, support=support, backend=backend)[0].plan == "recompute"
        with pytest.raises(ValueError, match=r"plan: 'resident' cannot serve this call: .*supports"):
            run(case, config, support=support, backend=backend, plan="resident")


@WITH_BACKENDS
def test_fused_forward_is_refused(backend: str) -> None:
    case, support = supported(make_case(3), "mixed", 3)
    with torch.no_grad(), pytest.raises(ValueError, match=r"plan: 'fused_forward' cannot serve this call.* a support"):
        token_logprobs(*head_of(case)[:3], support=support, plan="fused_forward", backend=backend)


@WITH_BACKENDS
@pytest.mark.parametrize(
    "config", [LossConfig(), LossConfig(loss_type="grpo"), *SEQUENCES[:2]], ids=lambda c: c.key[:9]
)
def test_every_tokens_metrics(config: LossConfig, backend: str) -> None:
    """Rows without a gradient are left out, supports or not, unless metrics of every token are asked for."""
    case, support = supported(make_case(7, zero_advantages=0.8), "mixed", 6)
    expected, gradients = oracle(case, config, support=support)
    results = []
    with sparse_share(SHARE, backend):
        for everything in (False, True):
            each = replace(config, all_token_metrics=everything)
            results.append((each, *run(case, each, support=support, backend=backend)))
    assert results[0][1].computed.sum() < 0.7 * results[1][1].computed.sum()
    for each, out, grads in results:
        assert all(rel_rms(grads[name], gradients[name]) <= 1e-5 for name in gradients)
        metrics, kept = out.metrics.as_dict(), out.computed
        assert metrics["entropy"] == pytest.approx(expected.entropy[kept].mean().item(), rel=1e-5)
        assert rel_rms(out.logprobs[kept], expected.logprobs[kept]) <= 1e-5
        assert torch.equal(kept, case.loss_mask) or not each.all_token_metrics


# -- refused ----------------------------------------------------------------------------------------------------------


def calls(case: Case, support: Any, **options: Any) -> list[Any]:
    return [
        lambda: grpo_loss(*head_of(case), cu_seqlens=case.cu_seqlens, support=support, **options),
        lambda: token_logprobs(*head_of(case)[:3], support=support, **options),
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda s: s[:-1], "support: expected 86 rows on cpu, one a target; got 85 on cpu"),
        (lambda s: s.to("meta"), "support: expected 86 rows on cpu, one a target; got 86 on meta"),
        (lambda s: (s.token_ids, s.offsets), "support: expected a Support; got tuple"),
        (lambda s: s.token_ids, "support: expected a Support; got torch.int"),
    ],
)
def test_wrong_supports(wrong: Any, message: str) -> None:
    case = make_case(1)
    for call in calls(case, wrong(draw_support(case.targets, 97, "mixed", 0))):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_ids_outside_the_vocabulary() -> None:
    case = make_case(1)
    support = draw_support(case.targets, 97, "mixed", 0)
    support = Support.cat([support[:-1], as_support([[97, int(case.targets[-1])]])])
    for call in calls(case, support):
        with pytest.raises(ValueError, match=re.escape("support: expected token ids in [0, 97); got 97")):
            call()
    weight = case.weight[:50]
    compiled = torch.compile(lambda: token_logprobs(case.hidden, weight, case.targets % 50, support=support).logprobs)
    with pytest.raises(ValueError, match=re.escape("support: expected token ids in [0, 50); got 97")):
        compiled()


@pytest.mark.parametrize("gpu", [False, True])
def test_offsets_that_changed(gpu: bool) -> None:
    """In place, after the support was made; or, on a GPU, that nobody has looked at."""
    case = make_case(1)
    for at, value, message in ((5, 99999, "and a step down"), (0, 1, "got 1 first"), (-1, 3, "and a step down")):
        support = draw_support(case.targets, 97, "mixed", 0)
        support.offsets[at] = value
        for call in calls(case, support, loss_mask=torch.zeros(86, dtype=torch.bool)):
            with stand_in() if gpu else nullcontext(), pytest.raises(ValueError, match=f"support.offsets: .*{message}"):
                call()


def without_its_target(case: Case, row: int) -> Support:
    """A row of three words, none of them the target."""
    support = draw_support(case.targets, 97, "mixed", 0)
    ids = [(int(case.targets[row]) + k) % 97 for k in (1, 2, 3)]
    return Support.cat([support[:row], as_support([ids]), support[row + 1 :]])


def test_a_target_outside_its_support() -> None:
    case = make_case(1)
    for call in calls(case, without_its_target(case, 5)):
        with pytest.raises(
            ValueError,
            match=rf"support: expected the target .* got target {int(case.targets[5])} at \[5\], .* its 3 tokens",
        ):
            call()
    mask = torch.arange(86) != 5
    for call in calls(case, without_its_target(case, 5), loss_mask=mask):
        call()
    shaped = replace(case, hidden=case.hidden.reshape(43, 2, -1), targets=case.targets.reshape(43, 2))
    with pytest.raises(ValueError, match=r"at \[2, 1\]"):
        calls(shaped, without_its_target(case, 5))[1]()


@pytest.mark.parametrize("kind", ["sparse", "masked", "one word"])
@pytest.mark.parametrize("plan", ["single_pass", "recompute", "lean"])
def test_a_target_outside_its_support_on_a_gpu(plan: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log-probability is NaN and the row is counted; an error where values are checked."""
    case = make_case(1, (5, 3) if INTERPRETED else (9, 1, 14, 8), masked_sequence=False)
    row = int(case.loss_mask.nonzero()[3])
    support = without_its_target(case, row)
    if kind == "one word":
        support = Support.cat([support[:row], as_support([[(int(case.targets[row]) + 1) % 97]]), support[row + 1 :]])
    leaves = case.leaves()
    given = {"cu_seqlens": case.cu_seqlens, "loss_mask": case.loss_mask, "support": support, "backend": STAND_IN}
    with stand_in(), sparse_share(1000 if kind == "masked" else SHARE, STAND_IN):
        out = grpo_loss(leaves["hidden"], leaves["weight"], *head_of(case)[2:], plan=plan, **given)
        assert out.logprobs.isnan().nonzero().tolist() == [[row]]
        assert out.metrics.as_dict()["bad_rows"] == 1
        monkeypatch.setenv("GRPO_FAST_DEBUG", "1")
        with pytest.raises(ValueError, match=rf"support: .* at \[{row}\]"):
            grpo_loss(leaves["hidden"], leaves["weight"], *head_of(case)[2:], plan=plan, **given)


# -- a GPU's branches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("mixture", ["mixed", "sparse", "masked"])
def test_on_the_stand_in(mixture: str, dtype: torch.dtype) -> None:
    """Every plan within the dtype's bounds; the host waits a few times a pass, whatever is in the supports."""
    config = LossConfig(beta=0.1, entropy_coef=0.02)
    case, support = supported(make_case(2, bias=True, softcap=9.0, dtype=dtype), mixture, 3)
    _, gradients = oracle(case, config, support=support)
    floor = TOLERANCES[dtype].floor * (2 if INTERPRETED else 1)
    for plan in legal_plans(config):
        leaves = case.leaves()
        with stand_in(tile_rows=16) as device, sparse_share(SHARE, STAND_IN):
            rows = rows_of_logits(STAND_IN, 32, case)
            out = grpo_loss(
                leaves["hidden"], leaves["weight"], *head_of(case)[2:], bias=leaves["bias"], config=config,
                support=support, plan=plan, backend=STAND_IN, workspace_bytes=rows, **head_options(case),
                **case.policy_inputs(config),
            )  # fmt: skip
            out.loss.backward()
        for name, gradient in gradients.items():
            assert rel_rms(leaves[name].grad, gradient) <= floor, (plan, name)
        assert len(device.waits) <= MOST_WAITS, (plan, device.waits)


def test_a_row_that_lists_everything_is_whole() -> None:
    """One product instead of V gathered rows, and the bits of a row without a support."""
    case = make_case(3)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0)).tolist()
    listed, whole = as_support([order] * 86), Support.whole(86)
    for rows in (None, torch.tensor([3, 5, 80])):
        split = split_rows(listed, rows, case.targets, 97, limit=97)
        assert (split.num_whole, split.masked, split.sparse) == (86 if rows is None else 3, None, None)
    got, expected = (token_logprobs(*head_of(case)[:3], support=s, backend=BACKENDS[0]) for s in (listed, whole))
    assert torch.equal(got.logprobs, expected.logprobs)


def test_sparse_limit_is_a_share_of_the_vocabulary() -> None:
    for name in BACKENDS:
        limits = [sparse_limit(torch.zeros(vocab, 1), name) for vocab in (1, 1000, 16000, 151936)]
        assert limits == sorted(limits)
        assert limits[0] == 1
        assert limits[3] == 151936 // (16000 // limits[2])
    with pytest.raises(ValueError, match="backend"):
        sparse_limit(torch.zeros(10, 1), "abacus")  # type: ignore[arg-type]
