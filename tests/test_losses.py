"""The table of losses: what records promise is so, what derives from them follows, and losses from outside."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import grpo_fast
from grpo_fast import Loss, LossConfig, Parameter, TermInputs, grpo_loss, policy_loss, register_loss
from grpo_fast.config import BUILT_IN, METRIC_GROUPS, _check
from grpo_fast.loss_page import documentation
from grpo_fast.losses import CLIP_METRICS, IMPORTANCE_SAMPLING_MODES, LOSS_TYPES, LOSSES, Coupling, Kernel, Segments
from grpo_fast.metrics import Metrics
from grpo_fast.objectives import Tokens, objective, slope_beside_advantage
from grpo_fast.ops.call import workspace_for
from tests.cases import BACKENDS, Case, assert_close, make_case, objective_kwargs
from tests.random_cases import TUNED
from tests.test_loss import oracle, run

DOCS = Path(__file__).resolve().parent.parent / "docs"
BOUNDS = (0, 4, 9)
"""Of the two sequences that records are held to."""


@pytest.fixture(autouse=True)
def _table() -> Iterator[None]:
    """What a test registers goes with it."""
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)
    LossConfig.from_key.cache_clear()


def config_of(name: str, **options: Any) -> LossConfig:
    return LossConfig(**(objective_kwargs(name, "token", "nokl", "nocorr", "nomask", "plain") | options))


# -- records keep their promises --------------------------------------------------------------------------------------


def slopes(config: LossConfig, logprobs: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
    """(terms, derivative of their weighted sum) of nine tokens, whose weights differ so that nothing cancels."""
    logprobs = logprobs.clone().requires_grad_()
    mask = torch.ones(BOUNDS[-1], dtype=torch.bool)
    segments = Segments(torch.tensor(BOUNDS), BOUNDS[-1])
    tokens = Tokens(given.pop("advantages", ADVANTAGES), mask, segments, mask.sum(), old_logprobs=OLD, **given)
    policy = objective(logprobs, None, tokens, config).policy
    (slope,) = torch.autograd.grad((policy * torch.arange(1.0, 10.0)).sum(), logprobs)
    return policy.detach(), slope


ADVANTAGES = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
OLD = torch.linspace(-0.3, -0.6, BOUNDS[-1])
NEAR = OLD + torch.tensor([0.02, -0.01, 0.03, 0.01, -0.02, 0.015, 0.01, -0.03, 0.02])


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_what_a_loss_couples(name: str) -> None:
    """One log-probability moves: the slopes that follow are its own, or all of its sequence."""
    moved = NEAR.clone()
    moved[5] += 0.01
    before, after = (slopes(config_of(name), p)[1] for p in (NEAR, moved))
    changed = set((before != after).nonzero().flatten().tolist())
    assert changed <= {5} if LOSSES[name].couples == "nothing" else changed == set(range(*BOUNDS[1:]))


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_what_does_not_multiply_the_advantage(name: str) -> None:
    _, slope = slopes(config_of(name), NEAR, advantages=torch.zeros(BOUNDS[-1]))
    assert bool((slope != 0).any()) == (LOSSES[name].beside_advantage is not None)
    parameter = LOSSES[name].beside_advantage
    if parameter is not None:
        assert not slopes(config_of(name, **{parameter: 0}), NEAR, advantages=torch.zeros(BOUNDS[-1]))[1].any()


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_what_a_loss_reads(name: str) -> None:
    far = OLD - 2
    plain, _ = slopes(config_of(name), NEAR)
    with_sampling, _ = slopes(config_of(name), NEAR, sampling_logprobs=far)
    assert torch.equal(plain, with_sampling) == ("sampling_logprobs" not in LOSSES[name].reads)
    corrected = config_of(name, importance_sampling_mode="token_truncate")
    importance = torch.linspace(0.5, 1.5, BOUNDS[-1])
    weighted, _ = slopes(corrected, NEAR, sampling_logprobs=far, importance=importance)
    assert torch.equal(weighted, with_sampling * importance) == ("importance" not in LOSSES[name].reads)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_weights_are_those_of_the_aggregation(name: str) -> None:
    """The mean of terms that are all 1, over sequences of three and five tokens of which two are masked."""
    config = config_of(name)
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 1, 0], dtype=torch.bool)
    lengths, cu_seqlens = (3, 3), torch.tensor([0, 3, 8])
    expected = {
        "token_mean": [1 / 6] * 2,
        "sequence_mean": [1 / (2 * n) for n in lengths],
        "sequence_sum": [1 / 2] * 2,
        "constant_length": [1 / (2 * (config.max_completion_length or 0))] * 2 if config.max_completion_length else [],
    }[LOSSES[name].aggregation]
    logprobs = torch.full((8,), -1.0)
    given = {"cu_seqlens": cu_seqlens, "loss_mask": mask, "config": config}
    # A sequence's share of the loss: the rest has advantage zero.
    shares = [policy_loss(logprobs, torch.tensor(A), **given).loss.item() for A in ([1.0, 0.0], [0.0, 1.0])]
    term = policy_loss(logprobs[:1], torch.ones(1), config=replace(config, max_completion_length=1)).loss.item()
    assert shares == pytest.approx([term * n * w for n, w in zip(lengths, expected, strict=True)])


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_metrics_are_those_of_the_record(name: str) -> None:
    case = make_case(3)

    def reported(loss_type: str) -> set[str]:
        config = config_of(loss_type)
        given = case.policy_inputs(config) | {"sampling_logprobs": None}
        return set(policy_loss(case.logprobs, case.advantages, config=config, **given).metrics.as_dict())

    own = {*CLIP_METRICS[LOSSES[name].clip], *LOSSES[name].metrics}
    assert reported(name) - reported("reinforce") == own
    section = documentation().partition(f"## {name}\n")[2].partition("\n## ")[0]
    assert all(metric in section for metric in own)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in LOSS_TYPES if LOSSES[name].kernel is not None])
def test_the_device_term_is_the_records(name: str, backend: str) -> None:
    """A record that names another's kernel: rows of every branch in one pass against the oracle."""
    case, config = make_case(4), config_of(name, delta=1.3, dual_clip=1.2, dppo_log_ratio_coef=0.1)
    expected, gradients = oracle(case, config)
    out, actual = run(case, config, plan="single_pass", backend=backend)
    assert_close("loss", out.loss, expected.loss)
    for leaf, gradient in gradients.items():
        assert_close(f"grad {leaf}", actual[leaf], gradient)


@pytest.mark.parametrize(("couples", "spoilt"), [("nothing", 1), ("sequence", 5), ("clamped_sequence", 1)])
def test_what_a_bad_token_spoils(couples: Coupling, spoilt: int) -> None:
    """An infinite ratio, then one that is no number, in a sequence of five."""
    record = replace(LOSSES["reinforce"], name="rows", couples=couples, kernel=None)
    config = LossConfig(loss_type=register_loss(record))
    for value, expected in ((-torch.inf, spoilt), (torch.nan, max(spoilt, 1 if couples == "nothing" else 5))):
        old = OLD.clone()
        old[6] = value
        out = policy_loss(
            NEAR, torch.ones(2), old_logprobs=old, cu_seqlens=torch.tensor(BOUNDS), config=config
        )  # fmt: skip
        assert out.metrics.as_dict()["bad_rows"] == expected


def test_slopes_beside_the_advantage() -> None:
    """What scales float16's gradients where advantages are small."""
    assert slope_beside_advantage(config_of("dapo", beta=0.5)) == 0.5
    assert slope_beside_advantage(config_of("dppo", beta=0.5, dppo_log_ratio_coef=0.25)) == 0.75
    assert slope_beside_advantage(LossConfig(loss_type=register_loss(hinge()), parameters={"pull": 0.5})) == 0.5


# -- what derives from them -------------------------------------------------------------------------------------------


def test_no_field_has_a_default() -> None:
    given = {f.name: getattr(LOSSES["grpo"], f.name) for f in fields(Loss)}
    for name in given:
        with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{name}'"):
            Loss(**{other: value for other, value in given.items() if other != name})


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_records_are_what_may_be_registered(name: str) -> None:
    _check(LOSSES[name])


def test_random_cases_draw_every_parameter() -> None:
    assert [name for name, *_ in TUNED] == [parameter.name for parameter in BUILT_IN]


def test_device_terms_are_those_of_the_kernels() -> None:
    pytest.importorskip("triton")
    from grpo_fast.kernels.objective import POLICIES

    assert get_args(Kernel) == tuple(POLICIES)


@pytest.mark.parametrize("parameter", [p for loss in LOSSES.values() for p in loss.parameters], ids=lambda p: p.name)
def test_options_have_the_records_defaults_and_bounds(parameter: Parameter) -> None:
    assert getattr(LossConfig(), parameter.name) == parameter.default
    wrong = parameter.above if parameter.above > -1 else parameter.at_least - 0.5
    with pytest.raises(ValueError, match=f"^{parameter.name}: expected a finite number >=? 0; got"):
        LossConfig(**{parameter.name: wrong})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dr_grpo"}, "max_completion_length: dr_grpo divides by it; expected an integer >= 1, got None"),
        (
            {"loss_type": "cispo"},
            "epsilon_high: expected a number, as cispo bounds the ratio by it, not by 1 + it (MiniMax-M1: 5); got None "
            "(TRL then takes epsilon, 0.2)",
        ),
        (
            {"loss_type": "vespo", "importance_sampling_mode": "sequence_mask"},
            "importance_sampling_mode: vespo expects token_truncate, token_mask or None; got 'sequence_mask'",
        ),
        ({"loss_type": "dap"}, f"loss_type: expected one of {', '.join(LOSS_TYPES)}; got 'dap'"),
        ({"parameters": 1}, "parameters: expected those of dapo (none); got 1"),
        ({"parameters": {"tau": 1}}, "parameters: expected those of dapo (none); got {'tau': 1}"),
    ],
)
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LossConfig(**options)


def test_the_page_is_the_tables() -> None:
    assert (DOCS / "losses.md").read_text() == documentation(), "python -m grpo_fast.loss_page > docs/losses.md"


# -- from outside -----------------------------------------------------------------------------------------------------


def hinge_term(c: TermInputs) -> Tensor:
    """Not in the package, and none of its parts: -A min(w, m) + c r^2, m the parameter `most`."""
    capped = torch.where(c.ratio > c.config.parameter("most"), c.config.parameter("most"), c.ratio)
    c.note("hinge/capped", (capped < c.ratio).to(c.ratio.dtype))
    return -c.advantages * capped + c.config.parameter("pull") * c.log_ratio.square()


def hinge(**changes: Any) -> Loss:
    record = Loss(
        name="hinge",
        term=hinge_term,
        formula="-A min(w, most) + pull r^2",
        when="a test",
        paper="none",
        aggregation="sequence_mean",
        reads=(),
        couples="nothing",
        beside_advantage="pull",
        requires={},
        importance_sampling_modes=IMPORTANCE_SAMPLING_MODES,
        clip="none",
        metrics={"hinge/capped": "tokens"},
        parameters=(
            Parameter(name="most", default=1.2, at_least=1, doc="bound of the ratio"),
            Parameter(name="pull", default=0.1, at_least=0, at_most=1, doc="weight of r^2"),
        ),
        kernel=None,
    )
    return replace(record, **changes)


def geometric_term(c: TermInputs) -> Tensor:
    """Coupled: -A exp(mean over the sequence of r)."""
    c.note("geometric/ratio", c.ratio)
    return -c.advantages * c.segments.spread(c.segments.mean(c.log_ratio, c.mask)).exp()


def geometric() -> Loss:
    return hinge(
        name="geometric", term=geometric_term, couples="sequence", beside_advantage=None, parameters=(),
        metrics={"geometric/ratio": "sequences"},
    )  # fmt: skip


def plain_loss(case: Case, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss through full logits, by hand, in float64, and its gradients."""
    exact = case.double()
    leaves = exact.leaves()
    log_p = torch.log_softmax(leaves["hidden"] @ leaves["weight"].T, -1)
    r = log_p.gather(-1, case.targets[:, None])[:, 0] - exact.old_logprobs
    assert case.cu_seqlens is not None
    bounds, total = case.cu_seqlens.tolist(), torch.zeros(())
    for index, (begin, end) in enumerate(pairwise(bounds)):
        kept = torch.arange(begin, end)[case.loss_mask[begin:end]]
        if len(kept):
            A, own = exact.advantages[index], r[kept]
            ratio = own.exp()
            term = -A * ratio.clamp(max=1.3) + 0.05 * own**2
            total = total + (term if name == "hinge" else -A * own.mean().exp().expand_as(own)).mean()
    loss = total / (len(bounds) - 1)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def check_registered(backend: str, case: Case, plans: tuple[str, ...]) -> None:
    """Both losses, in plans that serve them, against the same through full logits."""
    server = "torch" if case.weight.dtype == torch.float64 else backend
    workspace = workspace_for(server, case.weight.shape[0], case.weight.dtype, case.weight.device)  # 16 rows
    own = {"hinge": {"most": 1.3, "pull": 0.05}, "geometric": {}}
    for record in (hinge(), geometric()):
        config = LossConfig(loss_type=register_loss(record), parameters=own[record.name])
        expected, gradients = plain_loss(case, record.name)
        for plan in plans:
            if plan == "single_pass" and record.couples != "nothing":
                continue
            leaves = case.leaves()
            out = grpo_loss(
                leaves["hidden"], leaves["weight"], case.targets, case.advantages, config=config, plan=plan,
                backend=backend, workspace_bytes=workspace, **case.policy_inputs(config),
            )  # fmt: skip
            out.loss.backward()
            assert_close(f"{record.name} {plan} loss", out.loss, expected)
            for name, gradient in gradients.items():
                assert_close(f"{record.name} {plan} grad {name}", leaves[name].grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_registered_loss_is_what_autograd_says(backend: str, dtype: torch.dtype) -> None:
    case = make_case(5, dtype=dtype, zero_advantages=0.3)
    check_registered(backend, case, ("single_pass", "resident", "recompute", "lean", "auto"))


def test_a_registered_loss_may_have_a_device_term() -> None:
    """sapo's term with another weight, served by sapo's kernel; and the same without."""
    case = make_case(6)
    both = []
    for name, kernel in (("with_kernel", "sapo"), ("without", None)):
        record = replace(LOSSES["sapo"], name=name, aggregation="sequence_sum", kernel=kernel)
        config, leaves = LossConfig(loss_type=register_loss(record), sapo_temperature_pos=2.0), case.leaves()
        out = grpo_loss(
            leaves["hidden"], leaves["weight"], case.targets, case.advantages, config=config,
            **case.policy_inputs(config),
        )  # fmt: skip
        out.loss.backward()
        both.append((out.loss, leaves["weight"].grad))
    assert_close("loss", both[0][0], both[1][0])
    assert_close("grad weight", both[0][1], both[1][1])


def test_metrics_of_a_registered_loss() -> None:
    """Of computed tokens, or of sequences after their tokens; micro-batches together are the whole batch."""
    case = make_case(8, masked_sequence=False)
    assert case.cu_seqlens is not None
    w = (case.logprobs - case.old_logprobs).double().exp()
    sequences = [w[begin:end][case.loss_mask[begin:end]] for begin, end in pairwise(case.cu_seqlens.tolist())]
    expected = {
        "hinge/capped": (w > 1.2)[case.loss_mask].double().mean().item(),
        "geometric/ratio": torch.stack([part.mean() for part in sequences if len(part)]).mean().item(),
    }
    for record, (name, value) in zip((hinge(), geometric()), expected.items(), strict=True):
        config = LossConfig(loss_type=register_loss(record))
        parts = []
        for first, last in ((0, 5), (5, 12)):
            begin, end = case.cu_seqlens[first], case.cu_seqlens[last]
            out = policy_loss(
                case.logprobs[begin:end], case.advantages[first:last], config=config,
                cu_seqlens=case.cu_seqlens[first : last + 1] - begin, loss_mask=case.loss_mask[begin:end],
                old_logprobs=case.old_logprobs[begin:end],
            )  # fmt: skip
            parts.append(out.metrics)
        assert Metrics.merge(parts).as_dict()[name] == pytest.approx(value, rel=1e-5)
        assert parts[0].as_dict()[name] != pytest.approx(value, rel=1e-3)


def test_a_compiled_caller_takes_a_registered_loss() -> None:
    case, config = make_case(9), LossConfig(loss_type=register_loss(hinge()), parameters={"most": 1.1})

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return grpo_loss(
            hidden, weight, case.targets, case.advantages, config=config, **case.policy_inputs(config)
        ).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close("loss", compiled(case.hidden, case.weight), step(case.hidden, case.weight))


@dataclass(frozen=True, kw_only=True)
class Noted(LossConfig):
    note: str = ""


def test_copies_of_a_subclass_are_of_it() -> None:
    config = Noted(beta=0.1, note="mine")
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (type(again), again) == (Noted, config)


def test_parameters() -> None:
    name = register_loss(hinge())
    config = LossConfig(loss_type=name, parameters={"pull": 0.5})
    assert list(config.parameters.items()) == [("most", 1.2), ("pull", 0.5)]
    assert config.parameter("pull") == 0.5
    assert config.parameter("epsilon") == 0.2
    same = LossConfig(loss_type=name, parameters={"pull": 0.5, "most": 1.2})
    assert (config, hash(config), config.key) == (same, hash(same), same.key)
    assert config != LossConfig(loss_type=name)
    for again in (LossConfig.from_key(config.key), pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert again == config
        assert again.key == config.key
    assert replace(config, epsilon=0.1).parameters == config.parameters
    assert (repr(LossConfig()), eval(repr(config))) == ("LossConfig()", config)
    for change in (
        lambda p: p.update(most=2.0),
        lambda p: p.__setitem__("most", 2.0),
        lambda p: p.pop("most"),
        lambda p: p.clear(),
    ):
        with pytest.raises(TypeError, match="cannot change"):
            change(config.parameters)
    with pytest.raises(ValueError, match=r"^parameters: expected those of hinge \(most, pull\); got {'tau': 1.0}"):
        LossConfig(loss_type=name, parameters={"tau": 1.0})
    with pytest.raises(ValueError, match=r"^parameters.pull: expected a finite number >= 0 and <= 1; got 2"):
        LossConfig(loss_type=name, parameters={"pull": 2})
    with pytest.raises(ValueError, match=r"^loss_type: expected one of grpo, .*, hinge; got 'hing'"):
        LossConfig(loss_type="hing")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "dapo"}, "name: expected one that is not taken (grpo, "),
        ({"name": "ratio", "metrics": {"ratio/min": "tokens"}}, "name: expected one that is not taken (grpo, "),
        ({"name": ["hinge"]}, "name: expected an identifier that stands for one thing; got ['hinge']"),
        ({"name": "my loss"}, "name: expected an identifier that stands for one thing; got 'my loss'"),
        ({"name": 3}, "name: expected an identifier that stands for one thing; got 3"),
        ({"term": "-A p"}, "term: expected a function of TermInputs; got '-A p'"),
        ({"formula": ""}, "formula: expected one line of text; got ''"),
        ({"when": "a\nb"}, "when: expected one line of text; got"),
        ({"paper": None}, "paper: expected one line of text; got None"),
        ({"aggregation": "mean"}, "aggregation: expected one of token_mean, sequence_mean, "),
        ({"aggregation": "constant_length"}, "requires: expected max_completion_length, as constant_length divides"),
        ({"reads": "importance"}, "reads: expected a tuple; got 'importance'"),
        ({"metrics": ("hinge/capped",)}, "metrics: expected a Mapping; got ('hinge/capped',)"),
        ({"parameters": ("most",)}, "parameters: expected a tuple of Parameter; got 'most' in it"),
        ({"reads": ("entropy",)}, "reads: expected one of sampling_logprobs, importance; got 'entropy'"),
        ({"couples": "all"}, "couples: expected one of nothing, sequence, clamped_sequence; got 'all'"),
        ({"beside_advantage": "tau"}, "beside_advantage: expected one of most, pull; got 'tau'"),
        (
            {"requires": {"delta": "needs {tau}"}},
            "requires: expected texts in which options stand in braces",
        ),
        ({"requires": {"delta": None}}, "requires: expected texts in which options stand in braces; got None"),
        (
            {"parameters": (Parameter(name="t", default=1, doc=""),) * 2},
            "name: expected an identifier that stands for one",
        ),
        ({"requires": {"epsilon_higher": "?"}}, "requires: expected one of loss_type, "),
        ({"importance_sampling_modes": ("token",)}, "importance_sampling_modes: expected one of token_truncate, "),
        ({"clip": "both"}, "clip: expected one of none, two_sided, upper; got 'both'"),
        ({"metrics": {"hinge/x": "rows"}}, "metrics: expected one of tokens, sequences; got 'rows'"),
        ({"metrics": {"loss": "tokens"}}, "metrics: expected names that begin with hinge/; got 'loss'"),
        ({"kernel": "hinge"}, "kernel: expected one of clipped, cispo, "),
        ({"metrics": {3: "tokens"}}, "metrics: expected names that begin with hinge/; got 3"),
        ({"kernel": "sapo", "reads": ("importance",)}, "kernel: expected None, as device terms see one token"),
        ({"kernel": "sapo", "couples": "sequence"}, "kernel: expected None, as device terms see one token"),
        (
            {"parameters": (Parameter(name="epsilon", default=0.1, doc=""),)},
            "parameters: expected names that are no options of LossConfig; got 'epsilon'",
        ),
        (
            {"parameters": (Parameter(name="t-1", default=0.1, doc=""),)},
            "name: expected an identifier that stands for",
        ),
        (
            {"parameters": (Parameter(name="t", default=-1, above=0, doc=""),)},
            "t: expected a finite number > 0",
        ),
    ],
)
def test_what_may_not_be_registered(changes: dict[str, Any], message: str) -> None:
    before = dict(LOSSES)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        register_loss(hinge(**changes))
    assert before == LOSSES
    with pytest.raises(ValueError, match="loss: expected a Loss; got function"):
        register_loss(hinge_term)  # type: ignore[arg-type]


def noting(c: TermInputs) -> Tensor:
    c.note("hinge/capped", c.ratio)
    return c.ratio


@pytest.mark.parametrize(
    ("term", "got"),
    [
        (lambda c: -c.advantages * c.logprobs, "torch.float32 [9] and []"),
        (lambda c: noting(c).sum(), "torch.float32 [] and ['hinge/capped']"),
        (lambda c: noting(c).double(), "torch.float64 [9] and ['hinge/capped']"),
        (lambda c: None, "NoneType and []"),
        (lambda c: c.note("hinge/cap", c.ratio) or c.logprobs, "torch.float32 [9] and ['hinge/cap']"),
    ],
)
def test_terms_that_do_not_keep_to_their_record(term: Any, got: str) -> None:
    config = LossConfig(loss_type=register_loss(hinge(term=term)))
    message = f"hinge: expected a term torch.float32 [9] that notes ['hinge/capped']; got {got}"
    with pytest.raises(ValueError, match=re.escape(message)):
        slopes(config, NEAR)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            lambda c: noting(c).detach(),
            "hinge: expected a term that depends on the log-probabilities; got one detached",
        ),
        (lambda c: c.note("hinge/capped", c.ratio[:, None]), "hinge/capped: expected values [9]; got [9, 1]"),
        (lambda c: c.note("hinge/capped", 1.0), "hinge/capped: expected values [9]; got 1.0"),
    ],
)
def test_terms_without_gradient_and_wrong_notes(term: Any, message: str) -> None:
    config = LossConfig(loss_type=register_loss(hinge(term=term)))
    with pytest.raises(ValueError, match=re.escape(message)):
        slopes(config, NEAR)


def test_no_loss_is_named_as_metrics_are() -> None:
    """What has a slash begins with a group that is taken, or with its loss."""
    case = make_case(3)
    for name in LOSS_TYPES:
        config = config_of(name, importance_sampling_mode="token_truncate", beta=0.1)
        out = policy_loss(case.logprobs, case.advantages, config=config, **case.policy_inputs(config))
        groups = {metric.partition("/")[0] for metric in out.metrics.as_dict() if "/" in metric}
        assert groups <= {name, *METRIC_GROUPS}


# -- the worked example -----------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    page = (DOCS / "adding-a-loss.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_the_worked_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(code, names)
    loss, slope = map(float, capsys.readouterr().out.split())
    assert loss == names["out"].loss.item()
    assert 0 < slope < 1
    assert "## soft_clip\n" in documentation()
    assert "| tau | 2 | > 0 | how fast a token's pull fades |" in documentation()
    with pytest.raises(ValueError, match=r"expected one of grpo, .*, soft_clip; got 'soft_clop'"):
        LossConfig(loss_type="soft_clop")  # type: ignore[arg-type]


def test_the_worked_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the page's recipe, a file beside it, and the trainer; options of the loss are overridden as any other."""
    pytest.importorskip("transformers")
    yaml = pytest.importorskip("yaml")
    from grpo_fast.trainer.loop import train
    from grpo_fast.trainer.recipe import as_dict, config_from_dict
    from tests import tiny

    monkeypatch.chdir(tmp_path)
    Path("soft_clip.py").write_text(blocks("python")[0])
    (text,) = blocks("yaml")
    values = tiny.recipe(tmp_path, max_steps=12, steps_per_generation=2, prompts_per_step=2, learning_rate=1e-2)
    config = config_from_dict(values | yaml.safe_load(text))
    assert config.loss.parameters == {"tau": 4.0}
    assert config_from_dict(as_dict(config)) == config
    train(config)
    done = tiny.rows(tmp_path / "run")
    assert done[0]["soft_clip/slope"] == 1.0  # the first step's ratios are 1
    assert 0 < done[1]["soft_clip/slope"] < 1
    rewards = [row["reward"] for row in done if "reward" in row]
    assert rewards[-1] > rewards[0]
    assert config_from_dict(values | yaml.safe_load(text), ["loss.parameters.tau=1"]).loss.parameter("tau") == 1.0


def test_plugins_that_do_not_run(tmp_path: Path) -> None:
    pytest.importorskip("omegaconf")
    from grpo_fast.trainer.errors import ConfigError
    from grpo_fast.trainer.recipe import config_from_dict

    values = {"output_dir": "o", "data": {"task": "t"}, "rewards": [{"function": "f"}]}
    (tmp_path / "broken.py").write_text("1 / 0")
    for plugin, message in (("gone.py", "no such file: gone.py"), (f"{tmp_path}/broken.py", "ZeroDivisionError")):
        with pytest.raises(ConfigError, match=f"^plugins: .*{message}"):
            config_from_dict(values | {"plugins": [plugin]})
    for wrong in ("soft_clip.py", 3, [3], [["soft_clip.py"]], {"a": "b"}):
        with pytest.raises(ConfigError, match=r"^plugins: expected a list of files and modules; got "):
            config_from_dict(values | {"plugins": wrong})
    register_loss(hinge())
    loss = {"loss_type": "hinge", "parameters": {"pull": 2}}
    with pytest.raises(ConfigError, match=r"^loss.parameters.pull: expected a finite number >= 0 and <= 1; got 2"):
        config_from_dict(values | {"loss": loss})
    with pytest.raises(ConfigError, match=r"^loss.loss_type: expected one of grpo, .*; got 'soft_clip'"):
        config_from_dict(values | {"loss": {"loss_type": "soft_clip"}})


def test_public_names() -> None:
    assert {"Loss", "Parameter", "TermInputs", "register_loss"} <= set(grpo_fast.__all__)
    assert grpo_fast.register_loss is register_loss


def test_a_registered_loss_is_replaced_on_request() -> None:
    """A cell that runs again: configs made afterwards have the new term, also by their key and in a kernel."""
    case, first = make_case(3), replace(LOSSES["reinforce"], name="again", kernel=None)
    second = replace(first, term=lambda c: -2 * c.advantages * c.logprobs)
    config = LossConfig(loss_type=register_loss(first))
    with pytest.raises(ValueError, match="name: expected one that is not taken"):
        register_loss(second)
    register_loss(second, replace=True)
    assert LossConfig(loss_type="again").record is LossConfig.from_key(config.key).record is second  # type: ignore[arg-type]
    losses = [run(case, LossConfig(loss_type=name))[0].loss for name in ("reinforce", "again")]  # type: ignore[arg-type]
    assert losses[1].item() == pytest.approx(2 * losses[0].item(), rel=1e-5)
    for name in ("dapo", "again"):
        with pytest.raises(ValueError, match=r"name: expected one that is not taken \(grpo, "):
            register_loss(replace(first, name=name), replace=name == "dapo")
