"""Random whole configurations against the float64 oracle: loss, gradients, log-probabilities, entropies, metrics.

    pytest tests/test_random.py                                           300 cases
    pytest tests/test_random.py --random-cases 5000 --random-seed 7       other and more ones
    pytest tests/test_random.py --random-case 1234567                     one again; a failure prints this line

Legend: T packed tokens, S sequences, B x L the padded layout, H hidden size, V vocabulary, g and e the loss's gradients
in a token's log-probability and entropy.
"""

from __future__ import annotations

import math
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.loss import Metrics, grpo_loss, policy_loss, token_logprobs
from grpo_fast.losses import LOSSES
from grpo_fast.ops.passes import boundaries
from grpo_fast.reference import reference_logprobs, reference_loss, reference_policy_loss
from tests.cases import BACKENDS, INTERPRETED, TOLERANCES, rel_rms
from tests.random_cases import (
    IGNORED,
    NARROW,
    Problem,
    Settings,
    build,
    draw_settings,
    expected_plan,
    strided,
)
from tests.reference_metrics import computed_tokens, couples_tokens, reference_metrics

NUM_CASES = 40 if INTERPRETED else 300
SEED_STRIDE = 1_000_000
DEVICES = "cpu,cpu,cpu,stand-in"
"""What a case runs on, if no option says otherwise: a quarter of them take a GPU's branches."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_number" in metafunc.fixturenames:
        option = metafunc.config.getoption
        numbers = option("--random-case")
        if not numbers:
            count = option("--random-cases")
            first = SEED_STRIDE * option("--random-seed")
            numbers = range(first, first + (NUM_CASES if count is None else count))
        metafunc.parametrize("case_number", numbers)


def test_random_case(case_number: int, pytestconfig: pytest.Config) -> None:
    devices = (pytestconfig.getoption("--random-device") or DEVICES).split(",")
    settings = draw_settings(case_number, BACKENDS, devices)
    try:
        with device_of(settings):
            CHECKS[settings.call](build(settings))
    except Exception as error:
        line = f"{'TRITON_INTERPRET=1 ' * INTERPRETED}pytest tests/test_random.py --random-case {case_number}"
        line += "" if pytestconfig.getoption("--random-device") is None else f" --random-device {settings.device}"
        raise AssertionError(f"{error}\n{settings}\nrepeat: {line}") from error


def device_of(settings: Settings) -> AbstractContextManager[Any]:
    if settings.device == "cpu":
        return nullcontext()
    from tests.stand_in import stand_in

    return stand_in()


# -- tolerances -------------------------------------------------------------------------------------------------------


def assert_near(
    name: str, actual: Tensor, expected: Tensor, settings: Settings, plain: Any = None, scale: float = 0.0
) -> None:
    """Relative RMS error within the case's dtype's, or twice that of `plain()`s, which are asked where it is above.

    Args:
        scale: of what cancels in `expected`.
    """
    bound = TOLERANCES[settings.dtype].floor
    if settings.vocab - settings.forbidden == 1 and name.startswith("grad"):
        # With one token to choose, p - 1 and log p are 0 up to the rounding of an exponential.
        assert ((actual - expected).abs() <= 1e3 * bound * max(1.0, abs(settings.upstream))).all(), name
        return
    if scale and ((actual - expected).abs() <= bound * scale).all():
        return
    if actual.dtype in NARROW and actual.numel() < 8:  # the floor is an average's; one result may round the worst way
        bound += torch.finfo(actual.dtype).eps / 2
    error = rel_rms(actual, expected)
    if not error <= bound and plain is not None:
        bound = max([bound, *(2 * rel_rms(other, expected) for other in plain())])
    assert error <= bound, f"{name}: relative RMS error {error:.3e} > {bound:.3e}"


def assert_statistics(name: str, actual: Tensor, expected: Tensor, settings: Settings) -> None:
    """RMS error in nats; products are float32 whatever the operands, so float32's bound holds for narrow ones."""
    if actual.numel():
        dtype = torch.float64 if settings.dtype == torch.float64 else torch.float32
        error = (actual.double() - expected).square().mean().sqrt()
        assert error <= TOLERANCES[dtype].logprob_nats, f"{name}: RMS error {error:.3e} nats"


def assert_metrics(actual: dict[str, float], expected: dict[str, float], settings: Settings, what: str) -> None:
    assert actual.keys() - {"bad_rows"} == expected.keys(), what
    # What cancels (KL estimates) is as exact as the exponentials in it.
    relative = 1e-9 if settings.dtype == torch.float64 else 2e-5
    absolute = relative * 0.1 * max(1.0, expected["ratio/max"], 1 / (expected["ratio/min"] or 1))
    for name, value in expected.items():
        if name == "loss":
            continue  # compared with its own tolerance
        assert actual[name] == pytest.approx(value, rel=relative, abs=absolute), f"{what}: {name}"


# -- the oracle -------------------------------------------------------------------------------------------------------


@dataclass
class Exact:
    """float64 results: `gradients` of upstream times the loss; `g`, `e` of the loss itself, in the shape of targets."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    gradients: dict[str, Tensor]
    g: Tensor
    e: Tensor

    @property
    def scale(self) -> float:
        """Of a loss's error, if every log-probability and entropy has a relative one."""
        sizes = self.g.abs() * self.logprobs.abs().clamp(min=1) + self.e.abs() * self.entropy.abs()
        return float(sizes.sum())


def leaves_of(problem: Problem, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The head's operands as the oracle takes them: no forbidden columns."""
    s = problem.settings
    allowed = s.vocab - s.forbidden
    given = {"hidden": problem.hidden, "weight": problem.weight[:allowed]}
    if problem.bias is not None:
        given["bias"] = problem.bias[:allowed]
    return {name: v.detach().to(dtype).clone().requires_grad_() for name, v in given.items()}


def oracle(problem: Problem, dtype: torch.dtype = torch.float64) -> Exact:
    """`reference_loss` of the same rounded inputs, computed in `dtype`."""
    s, leaves = problem.settings, leaves_of(problem, dtype=dtype)
    given = {k: None if v is None else v.to(dtype) for k, v in problem.token_logprobs_given().items()}
    out = reference_loss(
        leaves["hidden"],
        leaves["weight"],
        problem.targets,
        problem.oracle_advantages.to(dtype),
        bias=leaves.get("bias"),
        head=s.head,
        config=s.config,
        cu_seqlens=problem.cu_seqlens,
        loss_mask=problem.mask,
        temperature=problem.temperature.to(dtype) if s.row_temperature else None,
        support=problem.support,
        **given,
        **problem.normalizers(),
    )
    slopes = torch.autograd.grad(
        out.loss, [out.logprobs, out.entropy], retain_graph=True, allow_unused=True, materialize_grads=True
    )
    gradients = torch.autograd.grad(
        s.upstream * out.loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    named = dict(zip(leaves, gradients, strict=True))
    return Exact(out.loss.detach(), out.logprobs.detach(), out.entropy.detach(), whole(named, s), *slopes)


def whole(gradients: dict[str, Tensor], s: Settings) -> dict[str, Tensor]:
    """Zeros for the forbidden columns."""
    return {
        name: torch.cat([g, g.new_zeros(s.forbidden, *g.shape[1:])]) if name in ("weight", "bias") else g
        for name, g in gradients.items()
    }


# -- the call ---------------------------------------------------------------------------------------------------------


class Arguments:
    """The call's tensors as the case wants them: strided, with junk where masked, leaves where gradients are asked."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.s = problem, problem.settings
        self.kinds = dict(self.s.views)
        self.leaves: dict[str, tuple[Tensor, Any]] = {}
        self.random = random.Random(self.s.number + 1)

    def view(self, name: str, values: Tensor) -> Tensor:
        base, view = values.clone(), lambda base: base
        if name in self.kinds:
            base, view = strided(values, self.kinds[name])
        if name in self.s.grads:
            self.leaves[name] = base.requires_grad_(), view
        return view(base)

    def optional(self, name: str, values: Tensor | None) -> Tensor | None:
        return None if values is None else self.view(name, values)

    def junk(self, values: Tensor, *wild: Any) -> Tensor:
        """`values` with anything at masked positions."""
        if not self.s.junk:
            return values
        values = values.clone()
        for index in (~self.problem.mask).nonzero().tolist():
            values[tuple(index)] = self.random.choice(wild)
        return values

    def floats(self, name: str, values: Tensor | None) -> Tensor | None:
        return None if values is None else self.view(name, self.junk(values, math.nan, math.inf, -math.inf, 0.0))

    def targets(self) -> Tensor:
        values = self.junk(self.problem.targets, IGNORED, -1, self.s.vocab, 2**31 - 1)
        if self.s.ignore:
            values = values.masked_fill(self.problem.ignored, self.s.ignore_index)
        dtype = self.random.choice((torch.int64, torch.int32))
        return self.view("targets", values.to(dtype))

    def loss_mask(self) -> Tensor | None:
        s, mask = self.s, self.problem.mask
        if s.mask is None:
            return None
        mask = mask | self.problem.ignored  # the target alone takes these out
        dtype = {"bool": torch.bool, "int64": torch.int64, "uint8": torch.uint8, "float": torch.float32}[s.mask]
        values = mask.to(dtype)
        return self.view("loss_mask", values * 3 if s.mask == "int64" else values)

    def advantages(self) -> Tensor:
        s, values = self.s, self.problem.advantages
        if s.advantages in ("token", "[1, T]"):
            values = self.junk(values, math.nan, math.inf, 1.0)
        if s.advantages == "[1, T]":
            values = values[None]
        return self.view("advantages", values[:, None] if s.advantages == "[S, 1]" else values)

    def cu_seqlens(self) -> Tensor | None:
        cu_seqlens = self.problem.cu_seqlens
        if cu_seqlens is None:
            return None
        return self.view("cu_seqlens", cu_seqlens.to(self.random.choice((torch.int64, torch.int32))))

    def policy(self) -> dict[str, Any]:
        """What `grpo_loss` and `policy_loss` have in common."""
        given = {name: self.floats(name, v) for name, v in self.problem.token_logprobs_given().items()}
        return {
            "cu_seqlens": self.cu_seqlens(),
            "loss_mask": self.loss_mask(),
            "config": self.s.config,
            **given,
            **self.problem.normalizers(),
        }

    def head(self) -> dict[str, Any]:
        """The LM head's, and how it is to run."""
        s, p = self.s, self.problem
        hidden = self.junk(p.hidden, math.nan, math.inf, 1.0)
        return {
            "hidden": self.view("hidden", hidden),
            "weight": self.view("weight", p.weight),
            "targets": self.targets(),
            "ignore_index": s.ignore_index,
            "bias": self.optional("bias", p.bias),
            "head": s.head,
            "support": p.support,
            "backend": s.backend,
            "plan": s.plan,
            "workspace_bytes": s.workspace_bytes,
        }

    def gradients(self) -> dict[str, Tensor]:
        """Of the leaves, in the shape of the arguments; what lies between a view's elements must get none."""
        out = {}
        for name, (base, view) in self.leaves.items():
            gradient = torch.zeros_like(base) if base.grad is None else base.grad
            assert gradient.dtype == base.dtype, name
            out[name] = view(gradient)
            rest = gradient.clone()
            view(rest).zero_()
            assert not rest.any(), f"grad {name}: outside of the view"
        return out


def main_grad_of(problem: Problem, expected: Tensor) -> Tensor | None:
    """A buffer with something in it, of the gradient's own size."""
    if not problem.settings.main_grad:
        return None
    generator = torch.Generator().manual_seed(problem.settings.number)
    size = expected.square().mean().sqrt().clamp(min=1e-30)
    return (size * torch.randn(expected.shape, generator=generator, dtype=torch.float64)).to(problem.side_dtype)


def backward(loss: Tensor, arguments: Arguments, upstream: float) -> dict[str, Tensor]:
    if loss.requires_grad:
        (loss if upstream == 1 else upstream * loss).backward()
    else:
        assert not arguments.leaves or arguments.s.call == "policy_loss"  # a loss may leave the entropies out
    return arguments.gradients()


def with_upstream(problem: Problem, exact: Exact) -> tuple[float, dict[str, Tensor]]:
    """(upstream, gradients): in float16 as a loss scaler would choose it, so that no gradient is too small to say."""
    s = problem.settings
    if s.dtype != torch.float16 or s.main_grad:
        return s.upstream, exact.gradients
    largest = max(
        [float(exact.gradients[name].abs().max()) for name in s.grads if exact.gradients[name].numel()] or [0]
    )
    if largest == 0:
        return s.upstream, exact.gradients
    factor = 2.0 ** -math.floor(math.log2(largest))
    return s.upstream * factor, {name: g * factor for name, g in exact.gradients.items()}


# -- checks -----------------------------------------------------------------------------------------------------------


def check_grpo_loss(problem: Problem) -> None:
    s, exact = problem.settings, oracle(problem)
    upstream, expected = with_upstream(problem, exact)
    arguments = Arguments(problem)
    main_grad = main_grad_of(problem, expected["weight"])
    before = None if main_grad is None else main_grad.clone()
    temperature = arguments.view("temperature", problem.temperature) if s.row_temperature else None
    out = grpo_loss(
        advantages=arguments.advantages(),
        temperature=temperature,
        main_grad=main_grad,
        **arguments.head(),
        **arguments.policy(),
    )
    gradients = backward(out.loss, arguments, upstream)

    data = problem.token_data(exact.logprobs, exact.entropy)
    computed = torch.tensor(computed_tokens(data, s.config), dtype=torch.bool).reshape(s.shape)
    assert torch.equal(out.computed, computed), "computed"
    check_plan(problem, out, computed)
    if s.poison is not None and not check_poison(problem, exact, out, gradients, computed):
        return
    seen = ((exact.g != 0) | (exact.e != 0)) & ~computed
    assert not seen.any(), "rows with a gradient were not computed"
    plain = Plain(problem, upstream)
    assert out.loss.dtype == problem.side_dtype
    assert_near("loss", out.loss, exact.loss, s, plain.losses, scale=exact.scale)
    for name, gradient in gradients.items():
        if name == "weight" and main_grad is not None:
            assert not gradient.any(), "main_grad and grad of weight"
            gradient, expected[name] = main_grad, before.double() + expected[name]
        assert_near(f"grad {name}", gradient, expected[name], s, lambda name=name: plain.gradients(name, before))
    for name, actual, true in (("logprobs", out.logprobs, exact.logprobs), ("entropy", out.entropy, exact.entropy)):
        assert actual.dtype == problem.side_dtype
        assert_statistics(name, actual[computed], true[computed], s)
        assert not actual[~computed].any(), f"{name}: expected 0 where not computed"
    metrics = out.metrics.as_dict()
    assert metrics["bad_rows"] == 0
    summed = torch.tensor(metrics["loss"], dtype=torch.float64)
    assert_near("loss of metrics", summed, exact.loss, s, plain.losses, scale=exact.scale)
    assert_metrics(metrics, reference_metrics(data, s.config, exact.loss.item()), s, "metrics")
    check_merge(problem, out)


def test_chunks_of_whole_sequences_fit() -> None:
    """Cut between sequences, as many rows as fit and no more."""
    d = random.Random(0)
    for _ in range(200):
        counts = [d.randint(0, 16) for _ in range(d.randint(0, 12))]
        limits = list(boundaries(sum(counts), 16, counts))
        assert [row for limit in limits for row in range(*limit)] == list(range(sum(counts)))
        assert all(stop - start <= 16 for start, stop in limits)
        assert {stop for _, stop in limits} <= set(accumulate(counts))
        assert all(last - first > 16 for (first, _), (_, last) in pairwise(limits))


class Plain:
    """Plain float32 arithmetic on the same inputs, where somebody asks: what a loss's own conditioning costs.

    Besides: what float64 makes of inputs a rounding away, as plain arithmetic may be lucky.
    """

    def __init__(self, problem: Problem, upstream: float) -> None:
        self.problem, self.factor = problem, upstream / problem.settings.upstream

    @cached_property
    def results(self) -> list[Exact]:
        problem = self.problem
        if problem.settings.dtype == torch.float64:
            return []
        generator = torch.Generator().manual_seed(problem.settings.number)
        hidden = problem.hidden.double()
        size = torch.finfo(problem.settings.dtype).eps / 2 if problem.settings.dtype in NARROW else 2.0**-22
        noise = size * torch.randn(3, *hidden.shape, generator=generator, dtype=torch.float64)
        weight = problem.weight.double()
        weight = weight * (1 + size * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        nearby = [oracle(replace(problem, hidden=hidden * (1 + share), weight=weight)) for share in noise]
        return [oracle(problem, torch.float32), *nearby]

    def losses(self) -> list[Tensor]:
        return [result.loss for result in self.results]

    def gradients(self, name: str, before: Tensor | None) -> list[Tensor]:
        gradients = [self.factor * result.gradients[name] for result in self.results]
        return [before + g for g in gradients] if name == "weight" and before is not None else gradients


def check_plan(problem: Problem, out: Any, computed: Tensor) -> None:
    s = problem.settings
    assert out.backend == s.served_by
    if s.plan == "auto":
        flat = computed.reshape(-1)
        longest = max((int(flat[begin:end].sum()) for begin, end in s.bounds), default=0)
        assert out.plan == (expected_plan(s, longest) or out.plan)
    else:
        forward = "fused_forward" if s.plan == "fused_forward" else "forward"
        assert out.plan == (s.plan if s.grads else forward)


def check_poison(problem: Problem, exact: Exact, out: Any, gradients: dict[str, Tensor], computed: Tensor) -> bool:
    """Bad rows are those whose value or gradient is not finite; returns whether there is none after all."""
    finite = exact.logprobs.isfinite() & exact.entropy.isfinite() & exact.g.isfinite() & exact.e.isfinite()
    finite &= problem.given_finite()
    bad = computed & ~finite
    counted, least = out.metrics.as_dict()["bad_rows"], bad.sum()
    # Where tokens see each other, the others of a bad token's sequence may be bad in a number that the loss leaves out.
    most = least if not coupled(problem) else sequences_with(bad, problem).logical_and(computed).sum()
    assert least <= counted <= most, (
        f"bad_rows: counted {counted}, expected {least} to {most}: {bad.nonzero().tolist()}"
    )
    if not bad.any():
        return bool(finite.all()) and all(bool(g.isfinite().all()) for g in exact.gradients.values())
    # An off-policy mask may drop a sequence whose drift is NaN, and with it the NaN.
    visible = problem.settings.poison[0] == "hidden" and problem.settings.config.off_policy_mask_threshold is None
    if visible or exact.loss.isfinite():
        assert bool(out.loss.isfinite()) == bool(exact.loss.isfinite()), "finite loss"
    if "hidden" in gradients:  # no other row's gradient is spoilt
        assert gradients["hidden"].isfinite().all(-1)[exact.gradients["hidden"].isfinite().all(-1)].all()
    return False


def coupled(problem: Problem) -> bool:
    return couples_tokens(problem.settings.config, has_old=not problem.settings.on_policy)


def sequences_with(flagged: Tensor, problem: Problem) -> Tensor:
    """Every token of the sequences that hold a flagged one; of all, under an entropy quantile."""
    out = flagged.reshape(-1).clone()
    if problem.settings.config.top_entropy_quantile < 1:
        return torch.full_like(flagged, bool(out.any()))
    for begin, end in problem.settings.bounds:
        out[begin:end] = out[begin:end].any()
    return out.reshape(flagged.shape)


def check_merge(problem: Problem, out: Any) -> None:
    """The metrics of micro-batches merge to the whole batch's, with and without the whole batch's denominators."""
    s = problem.settings
    d = random.Random(s.number + 2)
    num_sequences = len(s.lengths)
    cuts = sorted({0, num_sequences, *(d.randint(0, num_sequences) for _ in range(d.randint(1, 3)))})
    names = set(out.metrics.as_dict())
    if s.config.top_entropy_quantile < 1:
        names -= {"loss"}  # each part has its own quantile
    given = problem.normalizers()
    if d.random() < 0.5:
        given = denominators(problem) | {name: v for name, v in given.items() if v is not None}
    with torch.no_grad():
        parts = [part_metrics(problem, first, last, given) for first, last in pairwise(cuts)]
    if not parts:
        return
    if s.per_token and any(last - first == 1 == length_of(s, first) for first, last in pairwise(cuts)):
        names = {name for name in names if "clip_ratio" not in name}  # there [1, 1] is a sequence's
    whole, merged = out.metrics.as_dict(), Metrics.merge(parts).as_dict()
    exact = s.dtype == torch.float64
    for name in names:
        if name == "loss":
            relative, absolute = (1e-9, 1e-12) if exact else (1e-4, 1e-6 * abs(whole["loss"]) + 1e-7)
        else:
            relative = 1e-9 if exact else 2e-5
            absolute = 0.1 * relative * max(1.0, whole["ratio/max"], 1 / (whole["ratio/min"] or 1))
        assert merged[name] == pytest.approx(whole[name], rel=relative, abs=absolute), f"merged at {cuts}: {name}"


def length_of(s: Settings, sequence: int) -> int:
    begin, end = s.bounds[sequence]
    return end - begin


def denominators(problem: Problem) -> dict[str, float]:
    """What the whole batch divides by."""
    s, count = problem.settings, max(int(problem.mask.sum()), 1)
    kind, sequences = s.config.loss_type, max(len(s.lengths), 1)
    if kind == "dr_grpo":
        sequences *= s.config.max_completion_length
    by_sequence = LOSSES[kind].aggregation != "token_mean"
    given = {"normalizer": float(sequences if by_sequence else count)}
    return given | {"entropy_normalizer": float(count)}


def part_metrics(problem: Problem, first: int, last: int, normalizers: dict[str, Any]) -> Metrics:
    """Of sequences `first:last` alone."""
    s = problem.settings
    if s.padded:
        tokens = sequences = slice(first, last)
        cu_seqlens = None
    else:
        limits = [0, *(end for _, end in s.bounds)]
        tokens, sequences = slice(limits[first], limits[last]), slice(first, last)
        cu_seqlens = torch.tensor(limits[first : last + 1]) - limits[first]
    per_token = s.advantages in ("token", "[1, T]")
    advantages = problem.advantages[tokens if per_token else sequences]
    if not s.padded:  # [T] may be as long as [S]
        advantages = advantages[None] if per_token else advantages[:, None]
    out = grpo_loss(
        problem.hidden[tokens],
        problem.weight,
        problem.targets[tokens],
        advantages,
        cu_seqlens=cu_seqlens,
        loss_mask=problem.mask[tokens],
        bias=problem.bias,
        head=s.head,
        config=s.config,
        backend=s.backend,
        temperature=problem.temperature[tokens] if s.row_temperature else None,
        support=problem.support_of(tokens),
        workspace_bytes=s.workspace_bytes,
        **{name: None if v is None else v[tokens] for name, v in problem.token_logprobs_given().items()},
        **normalizers,
    )
    return out.metrics


def check_token_logprobs(problem: Problem) -> None:
    """Both results and, through both, every gradient."""
    s = problem.settings
    generator = torch.Generator().manual_seed(s.number)
    g, e = (torch.randn(s.shape, generator=generator, dtype=torch.float64).to(problem.side_dtype) for _ in range(2))
    asked = [True, s.entropy_output]
    leaves = leaves_of(problem, dtype=torch.float64)
    mask = problem.mask
    temperature = problem.temperature.double()[mask] if s.row_temperature else s.config.temperature
    exact = reference_logprobs(
        leaves["hidden"][mask], leaves["weight"], problem.targets[mask],
        bias=leaves.get("bias"), head=s.head, temperature=temperature,
        support=None if problem.support is None else problem.support[mask.reshape(-1)],
    )  # fmt: skip
    total = sum((w.double()[mask] * v).sum() for w, v, a in zip((g, e), exact, asked, strict=True) if a)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    expected = whole(dict(zip(leaves, grads, strict=True)), s)

    arguments = Arguments(problem)
    main_grad = main_grad_of(problem, expected["weight"])
    before = None if main_grad is None else main_grad.clone()
    given = arguments.head()
    row_temperature = arguments.view("temperature", problem.temperature) if s.row_temperature else None
    given["loss_mask"] = arguments.loss_mask()
    if row_temperature is not None:
        given["temperature"] = row_temperature
    elif s.number % 2:
        given["config"] = s.config
    else:
        given["temperature"] = s.config.temperature
    if s.prefix:
        given |= {name: given[name][None] for name in ("hidden", "targets")}
        for name in ("loss_mask", "temperature"):
            given[name] = given[name][None] if isinstance(given.get(name), Tensor) else given.get(name)
    out = token_logprobs(**given, entropy=s.entropy_output, main_grad=main_grad)
    results = [out.logprobs, out.entropy]
    assert (out.entropy is not None) == s.entropy_output
    results = [None if v is None else (v[0] if s.prefix else v) for v in results]
    loss = sum((w * v)[mask].sum() for w, v, a in zip((g, e), results, asked, strict=True) if a)
    gradients = backward(loss, arguments, 1.0)
    for name, actual, true in zip(("logprobs", "entropy"), results, exact, strict=True):
        if actual is not None:
            assert actual.dtype == problem.side_dtype
            assert_statistics(name, actual[mask].detach(), true.detach(), s)
            assert not actual[~mask].any(), f"{name}: expected 0 where masked"
    for name, gradient in gradients.items():
        if name == "weight" and main_grad is not None:
            assert not gradient.any(), "main_grad and grad of weight"
            gradient, expected[name] = main_grad, before.double() + expected[name]
        # Of the few words of a support one may have next to all of the probability: 1 - p is rounded as 1 is.
        size = 0.0 if problem.support is None else 0.1 * abs(s.logit_scale) * max([0.0, *g.abs().reshape(-1).tolist()])
        assert_near(f"grad {name}", gradient, expected[name], s, scale=size)


def check_policy_loss(problem: Problem) -> None:
    """The loss of given log-probabilities, its gradients in them and in the entropies, and the metrics."""
    s, mask = problem.settings, problem.mask
    needs_entropy = s.config.entropy_coef != 0 or s.config.top_entropy_quantile < 1
    with_entropy = needs_entropy or s.entropy_output
    given = {"logprobs": problem.logprobs.to(problem.side_dtype)}
    if with_entropy:
        given["entropy"] = problem.entropy.to(problem.side_dtype)
    leaves = {name: v.double().clone().requires_grad_() for name, v in given.items()}
    options = {k: None if v is None else v.double() for k, v in problem.token_logprobs_given().items()}
    loss = reference_policy_loss(
        leaves["logprobs"],
        leaves.get("entropy"),
        problem.oracle_advantages.double(),
        cu_seqlens=problem.cu_seqlens,
        loss_mask=mask,
        config=s.config,
        **options,
        **problem.normalizers(),
    )
    expected = dict(zip(leaves, torch.autograd.grad(
        s.upstream * loss, list(leaves.values()), allow_unused=True, materialize_grads=True), strict=True))  # fmt: skip
    zero = torch.zeros_like(leaves["logprobs"])
    exact = Exact(loss.detach(), leaves["logprobs"].detach(), leaves.get("entropy", zero).detach(), {},
                  expected["logprobs"] / s.upstream, expected.get("entropy", zero) / s.upstream)  # fmt: skip

    arguments = Arguments(problem)
    tensors = {name: arguments.floats(name, v) for name, v in given.items()}
    policy = arguments.policy()
    if s.ignore:
        policy["loss_mask"] = mask  # there are no targets to say it
    out = policy_loss(advantages=arguments.advantages(), **tensors, **policy)
    gradients = backward(out.loss, arguments, s.upstream)
    assert torch.equal(out.computed, mask)
    if s.poison is not None and not check_poison(problem, exact, out, {}, mask):
        return
    assert_near("loss", out.loss, loss, s, scale=exact.scale)
    for name, gradient in gradients.items():
        assert_near(f"grad {name}", gradient[mask], expected[name][mask], s)
        assert not gradient[~mask].any(), f"grad {name}: expected 0 where masked"
    metrics = out.metrics.as_dict()
    assert metrics["bad_rows"] == 0
    data = problem.token_data(exact.logprobs, exact.entropy if with_entropy else None)
    everything = SimpleNamespace(**{**vars(s.config), "all_token_metrics": True, "key": ""})
    assert_metrics(metrics, reference_metrics(data, everything, loss.item()), s, "metrics")


CHECKS = {"grpo_loss": check_grpo_loss, "token_logprobs": check_token_logprobs, "policy_loss": check_policy_loss}
