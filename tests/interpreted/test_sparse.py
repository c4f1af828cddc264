"""Rows on supports with the triton backend: against float64, and against each other bit for bit.

Legend: R rows, V vocabulary, H hidden size, N tokens of all supports.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.backends.base import (
    Backend,
    ObjectiveResults,
    RowChunk,
    RowIds,
    RowObjective,
    RowSlopes,
    RowStatistics,
    Transform,
    get_backend,
)
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.kernels import sparse_rows, sparse_weight
from grpo_fast.kernels.launch_table import SPARSE_ROWS, SPARSE_WEIGHT
from grpo_fast.losses import Segments
from grpo_fast.objectives import Tokens
from tests.cases import rel_rms
from tests.stand_in import stand_in
from tests.traffic import ELSEWHERE, count_traffic

TRITON, PLAIN = get_backend("triton"), get_backend("torch")
V = 300
SIZES = (2, 1, 37, V, 8)
WIDTHS = (1, 17, 64, 100)
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of what is rounded to the dtype


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


@dataclass(frozen=True)
class Problem:
    """Rows with supports of `sizes`; all else is drawn."""

    hidden: Tensor
    weight: Tensor
    of: RowIds
    places: Tensor
    transform: Transform

    @property
    def logits(self) -> Tensor:
        """Where raw products go."""
        return nan(self.of.ids.numel(), dtype=torch.promote_types(self.hidden.dtype, torch.float32))

    def chunk(self, logits: Tensor) -> RowChunk:
        return RowChunk(logits, self.places, self.transform, offsets=self.of.offsets, longest=self.longest)

    @property
    def sizes(self) -> Tensor:
        return self.of.offsets.diff()

    @cached_property
    def longest(self) -> int:
        return int(self.sizes.max())

    def double(self) -> Problem:
        """The same numbers in float64."""

        def wide(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) else value

        transform = replace(
            self.transform, bias=wide(self.transform.bias), temperature=wide(self.transform.temperature)
        )
        return replace(self, hidden=self.hidden.double(), weight=self.weight.double(), transform=transform)

    def rows(self, order: Tensor) -> Problem:
        """Some of the rows, in another order."""
        entries = torch.cat([torch.arange(self.of.offsets[t], self.of.offsets[t + 1]) for t in order.tolist()])
        transform = self.transform.rows(order)
        if transform.bias is not None:
            transform = replace(transform, bias=transform.bias[entries])
        of = row_ids(self.of.ids[entries], self.sizes[order])
        return Problem(self.hidden[order], self.weight, of, self.places[order], transform)

    def products(self) -> Tensor:
        """Raw products in float64, row by row, from dense ones."""
        dense = self.hidden.double() @ self.weight.double().t()
        return dense[self.of.rows, self.of.ids.long()]


def row_ids(ids: Tensor, sizes: Tensor) -> RowIds:
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return RowIds(ids, offsets, torch.arange(sizes.numel()).repeat_interleave(sizes))


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias, soft cap": {"softcap": 2.0, "bias": True, "temperature": 0.7},
    "negative scale, row temperatures": {"logit_scale": -1.3, "temperature": "rows"},
    "all": {"softcap": 1.5, "logit_scale": -0.8, "bias": True, "temperature": "rows"},
}


def problem(
    head: str = "plain", *, width: int = 64, dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES
) -> Problem:
    generator = torch.Generator().manual_seed(width)
    options = dict(HEADS[head])
    num_rows, num_ids = len(sizes), sum(sizes)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.cat([torch.randperm(V, generator=generator)[:size] for size in sizes]).int()
    places = torch.tensor([size // 2 for size in sizes])
    bias = drawn(num_ids).to(dtype) if options.pop("bias", False) else None
    temperature = options.pop("temperature", 1.0)
    if temperature == "rows":
        temperature = 0.5 + torch.rand(num_rows, generator=generator)
    transform = Transform(HeadConfig(**options), bias, temperature)
    hidden, weight = drawn(num_rows, width).to(dtype), (1.5 * drawn(V, width) / width**0.5).to(dtype)
    return Problem(hidden, weight, row_ids(ids, torch.tensor(sizes)), places, transform)


# -- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", [*WIDTHS, 520])
def test_products(width: int, dtype: torch.dtype) -> None:
    """Ragged widths, one longer than a block; operands of 16 bits are read exactly: x is as good as float32's."""
    case = problem(width=width, dtype=dtype)
    assert SPARSE_ROWS.columns < 520
    out = case.logits
    TRITON.sparse_logits(case.hidden, case.weight, case.of, out)
    assert rel_rms(out, case.products()) <= 1e-6


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", [*WIDTHS, 520])
def test_grad_hidden(width: int, dtype: torch.dtype) -> None:
    case = problem(width=width, dtype=dtype)
    dx = torch.randn(case.of.ids.numel(), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(len(SIZES), width, dtype=torch.float64)
    expected.index_add_(0, case.of.rows, dx[:, None].double() * case.weight[case.of.ids].double())
    for out_dtype in {dtype, torch.float32}:
        guarded = nan(len(SIZES), width + 3, dtype=out_dtype)
        TRITON.sparse_grad_hidden(dx, case.weight, case.of, guarded[:, :width])
        assert rel_rms(guarded[:, :width], expected) <= BOUNDS[out_dtype]
        assert guarded[:, width:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [*WIDTHS, 260])
def test_grad_weight(width: int, dtype: torch.dtype) -> None:
    """Added to what is there at the ids that occur, rounded once; one id is in every row. The rest is not touched."""
    assert SPARSE_WEIGHT.columns < 260
    generator = torch.Generator().manual_seed(1)
    num_rows = 2 * SPARSE_WEIGHT.entries + 3
    ids = torch.stack([torch.randperm(40, generator=generator)[:4] + 20 for _ in range(num_rows)]).int()
    ids[:, 2] = 7
    of = row_ids(ids.flatten(), torch.full((num_rows,), 4))
    dx, hidden = torch.randn(4 * num_rows, generator=generator), torch.randn(num_rows, width, generator=generator)
    hidden = hidden.to(dtype)
    for out_dtype in {dtype, torch.float32}:
        before = torch.randn(V, width, generator=generator).to(out_dtype)
        expected = before.double()
        expected.index_add_(0, of.ids.long(), dx[:, None].double() * hidden[of.rows].double())
        out = before.clone()
        TRITON.sparse_grad_weight(dx, hidden, of, out)
        occur = torch.zeros(V, dtype=torch.bool)
        occur[of.ids.long()] = True
        assert rel_rms(out[occur], expected[occur]) <= BOUNDS[out_dtype]
        assert torch.equal(out[~occur], before[~occur])
        again = before.clone()
        TRITON.sparse_grad_weight(dx, hidden, of, again)
        assert torch.equal(again, out)
        if out_dtype != torch.float32:
            # Once: a float32 gradient, rounded at the end.
            wide = before.float()
            TRITON.sparse_grad_weight(dx, hidden, of, wide)
            assert torch.equal(wide.to(out_dtype), out)


@pytest.mark.parametrize(
    "ids", [[3], [5, 5, 5], [0, 1, 2, 3], [1, 1, 2, 9, 9, 9, 299], [0, 4, 4], [4, 4, 7], [1, 2, 2, 3]]
)
def test_where_ids_begin(ids: list[int]) -> None:
    starts, count = sparse_weight.id_starts(torch.tensor(ids, dtype=torch.int32))
    distinct = sorted(set(ids))
    assert count.tolist() == [len(distinct)]
    assert starts[: len(distinct) + 1].tolist() == [ids.index(each) for each in distinct] + [len(ids)]


def test_a_biass_gradient_is_a_column() -> None:
    """What the head asks for: hidden states of one column, and an `out` whose rows are one element apart."""
    case, out = problem(), torch.ones(V)
    dx = torch.randn(case.of.ids.numel())
    TRITON.sparse_grad_weight(dx, torch.ones(len(SIZES), 1), case.of, out[:, None])
    expected = torch.ones(V).index_add_(0, case.of.ids.long(), dx)
    torch.testing.assert_close(out, expected)


def test_nothing() -> None:
    of = row_ids(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64))
    none, weight = torch.empty(0), torch.randn(V, 8)
    before = weight.clone()
    TRITON.sparse_logits(weight[:0], weight, of, none)
    TRITON.sparse_grad_hidden(none, weight, of, weight[:0])
    TRITON.sparse_grad_weight(none, weight[:0], of, weight)
    assert torch.equal(weight, before)


def test_columns_must_be_contiguous() -> None:
    """For kernels; the backend gives what has gaps to torch, where the kernels' callers would copy a whole weight."""
    case = problem()
    turned, out = torch.randn(64, V).t(), case.logits
    with pytest.raises(ValueError, match=r"weight: expected \[., H\] with contiguous columns; got shape \[300, 64\]"):
        sparse_rows.sparse_logits(case.hidden, turned, case.of.ids, case.of.offsets, out)
    with pytest.raises(ValueError, match="out: expected"):
        sparse_weight.sparse_grad_weight(out, case.hidden, *case.of.by_id, turned)
    with pytest.raises(ValueError, match="grad_hidden: expected"):
        sparse_rows.sparse_grad_hidden(out, case.weight, case.of.ids, case.of.offsets, torch.empty(64, 5).t())


def turned(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


@pytest.mark.parametrize("which", ["weight", "hidden", "both"])
def test_matrices_with_gaps(which: str) -> None:
    case = problem(dtype=torch.float16)
    names = ["weight", "hidden"] if which == "both" else [which]
    other = replace(case, **{name: turned(getattr(case, name)) for name in names})
    expected, found = run(case, objective_of(len(SIZES))), run(other, objective_of(len(SIZES)))
    assert rel_rms(found.dx, expected.dx) <= 1e-6
    assert rel_rms(found.grad_hidden, expected.grad_hidden) <= 1e-6
    products = case.logits
    TRITON.sparse_logits(other.hidden, other.weight, other.of, products)
    assert rel_rms(products, case.products()) <= 1e-6
    for form in (turned, torch.clone):
        for given in (case.hidden, other.hidden):
            out = form(torch.ones(V, 64))
            TRITON.sparse_grad_weight(expected.dx, given, case.of, out)
            into = form(nan(len(SIZES), 64))
            TRITON.sparse_grad_hidden(expected.dx, other.weight, case.of, into)
            sums = torch.ones(V, 64).index_add_(0, case.of.ids.long(), expected.dx[:, None] * case.hidden[case.of.rows])
            assert rel_rms(out, sums) <= 1e-6
            assert rel_rms(into, expected.grad_hidden) <= 1e-6


def test_hidden_states_may_lie_anywhere() -> None:
    """A product is summed in the same way wherever its operands are: the kernel is given aligned, contiguous rows."""
    case = problem(width=17)
    expected, out = case.logits, case.logits
    TRITON.sparse_logits(case.hidden, case.weight, case.of, expected)
    buffer, shifted = nan(len(SIZES), 40), torch.empty(5 * 17 + 1)[1:].view(5, 17)
    turned = torch.empty(17, 5).t()
    for hidden in (buffer[:, :17], buffer[:, 3:20], shifted, turned):
        hidden.copy_(case.hidden)
        given = sparse_rows._operands(hidden, case.weight, case.of.ids, case.of.offsets)
        assert (given["hidden"].data_ptr() % 16, given["hidden_stride"]) == (0, 17)
        TRITON.sparse_logits(hidden, case.weight, case.of, out.fill_(torch.nan))
        assert torch.equal(out, expected)


# -- row functions ----------------------------------------------------------------------------------------------------


def statistics(case: Problem, logits: Tensor) -> RowStatistics:
    found = RowStatistics(*(nan(case.places.numel()) for _ in range(3)))
    TRITON.statistics(case.chunk(logits), found)
    return found


def exact(case: Problem, logits: Tensor, g: Tensor, e: Tensor) -> tuple[RowStatistics, Tensor]:
    """Statistics and dx in float64, by autograd, row by row."""
    x = logits.double().clone().requires_grad_()
    head, of = case.transform.head, case.of
    z = (x if case.transform.bias is None else x + case.transform.bias.double()) * head.logit_scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    temperature = case.transform.temperature
    z = z / (temperature.double()[of.rows] if isinstance(temperature, Tensor) else temperature)
    rows = [torch.log_softmax(row, 0) for row in z.split(case.sizes.tolist())]
    logprobs = torch.stack([row[place] for row, place in zip(rows, case.places, strict=True)])
    entropy = torch.stack([-(row.exp() * row).sum() for row in rows])
    lse = torch.stack([row.logsumexp(0) for row in z.split(case.sizes.tolist())])
    (g.double() * logprobs + e.double() * entropy).sum().backward()
    return RowStatistics(logprobs.detach(), entropy.detach(), lse.detach()), x.grad


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sizes", [SIZES, (600, 513, 1024)])
def test_statistics_and_gradient(head: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of rows as long as masked ones are."""
    monkeypatch.setattr("tests.interpreted.test_sparse.V", max(sizes))
    case = problem(head, sizes=sizes)
    logits = case.products().float()
    g = torch.tensor([0.3, -1.0, 0.0, 2.0, 0.7])[: len(sizes)]
    e = torch.tensor([0.0, 0.1, 0.0, -0.2, 0.3])[: len(sizes)]
    expected, expected_dx = exact(case, logits, g, e)
    kept = logits.clone()
    found = statistics(case, logits)
    assert torch.equal(logits, kept)
    for name, one, other in zip(RowStatistics._fields, found, expected, strict=True):
        assert (one - other).abs().max() <= 5e-6, name
    for size, logprob, entropy in zip(sizes, found.logprobs, found.entropy, strict=True):
        assert size > 1 or (logprob == 0 and entropy == 0)
    dx = TRITON.gradient(case.chunk(logits), RowSlopes(found.lse, found.entropy, g, e), dtype=torch.float16)
    assert (dx.dtype, dx.data_ptr()) == (torch.float32, logits.data_ptr())
    assert rel_rms(dx, expected_dx) <= 3e-6
    assert not dx[case.of.rows == 2].any()


def test_a_block_of_the_vocabulary() -> None:
    """Rows of which nothing is in the block are empty there; a target that is elsewhere has place -1."""
    case, g = problem(sizes=(3, 1, 2)), torch.tensor([1.0, 2.0, -1.0])
    logits = torch.randn(6)
    whole = statistics(case, logits)
    slopes = RowSlopes(whole.lse, whole.entropy, g, None)
    expected = TRITON.gradient(case.chunk(logits.clone()), slopes, dtype=torch.float32)
    of = row_ids(case.of.ids[2:4], torch.tensor([1, 1, 0]))
    part = replace(case, of=of, places=torch.tensor([-1, 0, -1]))
    dx = TRITON.gradient(part.chunk(logits[2:4].clone()), slopes, dtype=torch.float32)
    assert torch.equal(dx, expected[2:4])


def test_places_outside_have_no_logprob() -> None:
    """NaN, which the loss counts; entropy and lse are the row's, other rows are not touched."""
    case = problem()
    logits = case.products().float()
    sound = statistics(case, logits)
    places = case.places.clone()
    places[0], places[2] = -1, 37
    lost = replace(case, places=places)
    found = statistics(lost, logits)
    assert found.logprobs.isnan().tolist() == [True, False, True, False, False]
    assert torch.equal(found.logprobs[[1, 3, 4]], sound.logprobs[[1, 3, 4]])
    assert torch.equal(found.entropy, sound.entropy)
    outcome = run(lost, objective_of(len(SIZES)))
    assert torch.equal(outcome.results.logprobs.isnan(), found.logprobs.isnan())
    assert torch.equal(outcome.dx.isnan(), torch.isin(case.of.rows, torch.tensor([0, 2])))
    assert outcome.grad_hidden.isnan().all(1).tolist() == found.logprobs.isnan().tolist()


# -- everything in one visit ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    results: ObjectiveResults
    dx: Tensor
    grad_hidden: Tensor


def objective_of(
    num_rows: int,
    *,
    absent: tuple[str, ...] = (),
    importance: bool = False,
    dtype: torch.dtype = torch.float32,
    grad_scale: float | None = None,
    **options: Any,
) -> RowObjective:
    """A loss of rows, one sequence; the third carries none."""
    generator = torch.Generator().manual_seed(2)
    config = LossConfig(**options)

    def drawn(scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (scale * torch.randn(num_rows, generator=generator) + shift).to(dtype)

    given = {"old_logprobs": drawn(0.5, -3.0), "ref_logprobs": drawn(0.5, -3.0), "sampling_logprobs": drawn(0.5, -3.0)}
    given["sampling_logprobs"][1] = torch.nan
    tokens = Tokens(
        advantages=drawn(),
        mask=torch.ones(num_rows, dtype=torch.bool),
        segments=Segments(torch.tensor([0, num_rows]), num_rows),
        bonus_count=torch.tensor(float(num_rows), dtype=dtype),
        importance=drawn().abs() if importance else None,
        **{name: None if name in absent else value for name, value in given.items()},
    )
    weights = torch.rand(num_rows, generator=generator).to(dtype)
    if num_rows > 2:
        weights[2] = 0
    return RowObjective(tokens, weights, config, None if grad_scale is None else torch.tensor(grad_scale, dtype=dtype))


def run(case: Problem, objective: RowObjective, backend: Backend = TRITON, *, composed: bool = False) -> Outcome:
    num_rows, wide = case.places.numel(), case.logits.dtype
    results = ObjectiveResults(
        nan(num_rows, dtype=wide), nan(num_rows, dtype=wide), torch.zeros(num_rows, dtype=torch.bool)
    )
    grad_hidden = nan(*case.hidden.shape, dtype=wide)
    arguments = (case.hidden, case.weight, case.of, case.chunk(case.logits), objective, results, grad_hidden)
    dx = Backend.sparse_objective(backend, *arguments) if composed else backend.sparse_objective(*arguments)
    return Outcome(results, dx, grad_hidden)


def assert_same(one: Outcome, other: Outcome) -> None:
    for name, a, b in zip(ObjectiveResults._fields, one.results, other.results, strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(one.dx, other.dx)
    assert torch.equal(one.grad_hidden, other.grad_hidden)


POLICIES = ("dapo", "cispo", "sapo", "dppo", "ppo_dual", "reinforce")
KLS = (
    {},
    {"beta": 0.3, "kl_estimator": "k1"},
    {"beta": 0.3, "kl_estimator": "k2"},
    {"beta": 0.3, "kl_estimator": "k3"},
)
CORRECTIONS = ("none", "weight", "token_truncate", "token_mask")


@pytest.mark.parametrize("policy", POLICIES)
def test_every_objective_is_the_composition(policy: str) -> None:
    """In one kernel: the bits of three, and float64's numbers."""
    case = problem("all", width=17, sizes=(2, 9))
    for turn, (kl, correction) in enumerate(product(KLS, CORRECTIONS)):
        options: dict[str, Any] = {
            "loss_type": policy,
            "epsilon_high": 0.3,
            **kl,
            "entropy_coef": 0.2 if turn == 5 else 0.0,
        }
        options["use_bias_correction_kl"] = bool(kl) and turn % 2 == 1
        absent = ["ref_logprobs"] if not kl else []
        absent += ["sampling_logprobs"] if correction in ("none", "weight") else []
        options |= {
            "absent": tuple(absent),
            "importance": correction == "weight",
            "grad_scale": 3.0 if turn == 6 else None,
        }
        if correction.startswith("token"):
            options["importance_sampling_mode"] = correction
        objective = objective_of(2, **options)
        kernel = objective.kernel
        assert kernel is not None
        assert (kernel.kl, kernel.correction) == (kl.get("kl_estimator", "none"), correction)
        found = run(case, objective)
        assert_same(found, run(case, objective, composed=True))
        expected = run(case.double(), objective_of(2, dtype=torch.float64, **options), PLAIN)
        assert (found.results.logprobs - expected.results.logprobs).abs().max() <= 3e-6
        assert torch.equal(found.results.live, expected.results.live)
        assert rel_rms(found.dx, expected.dx) <= 5e-6
        assert rel_rms(found.grad_hidden, expected.grad_hidden) <= 5e-6


@pytest.mark.parametrize(
    ("head", "dtype"), [*((head, torch.float32) for head in HEADS), ("all", torch.float16), ("all", torch.bfloat16)]
)
def test_objective(head: str, dtype: torch.dtype) -> None:
    """Of every size, and a logprob that is the forward pass's to the bit: the first step's ratio is 1."""
    case = problem(head, width=100, dtype=dtype)
    objective = objective_of(len(SIZES), beta=0.1)
    found = run(case, objective)
    logits = case.logits
    TRITON.sparse_logits(case.hidden, case.weight, case.of, logits)
    forward = statistics(case, logits)
    assert torch.equal(found.results.logprobs, forward.logprobs)
    assert torch.equal(found.results.entropy, forward.entropy)
    assert found.results.live.tolist() == [True, True, False, True, True]
    assert not found.dx[case.of.rows == 2].any()
    assert not found.grad_hidden[2].any()
    expected = run(case.double(), objective_of(len(SIZES), beta=0.1, dtype=torch.float64), PLAIN)
    assert rel_rms(found.dx, expected.dx) <= 3e-6
    assert rel_rms(found.grad_hidden, expected.grad_hidden) <= 3e-6


def test_rows_with_nothing_but_an_entropy_bonus() -> None:
    """g = 0 does not make a row dead where e is not: its dHidden is summed."""
    case, options = problem(width=100), {"entropy_coef": 0.3}
    objective, exact = objective_of(len(SIZES), **options), objective_of(len(SIZES), dtype=torch.float64, **options)
    for each in (objective, exact):
        each.tokens.advantages.zero_()
    found, expected = run(case, objective), run(case.double(), exact, PLAIN)
    assert found.results.live.all()
    rows = torch.tensor(SIZES) > 1
    assert found.grad_hidden[rows].abs().amax(1).gt(0).all()
    assert rel_rms(found.grad_hidden, expected.grad_hidden) <= 5e-6


def test_rows_do_not_see_each_other() -> None:
    """The same bits whatever a row's place and its neighbours, also alone."""
    case, objective = problem("all"), objective_of(len(SIZES))
    whole = run(case, objective)
    for order in (torch.tensor([4, 2, 0, 3, 1]), torch.tensor([3]), torch.tensor([2, 0])):
        tokens = objective.tokens.rows(order, None)
        part = run(case.rows(order), replace(objective, tokens=tokens, weights=objective.weights[order]))
        assert torch.equal(part.results.logprobs, whole.results.logprobs[order])
        assert torch.equal(part.grad_hidden, whole.grad_hidden[order])
        assert torch.equal(part.dx, torch.cat([whole.dx[case.of.rows == t] for t in order.tolist()]))


def test_the_gradient_of_hidden_states_may_be_unwanted() -> None:
    case, objective = problem(), objective_of(len(SIZES))
    results = ObjectiveResults(nan(5), nan(5), torch.zeros(5, dtype=torch.bool))
    dx = TRITON.sparse_objective(case.hidden, case.weight, case.of, case.chunk(case.logits), objective, results, None)
    assert torch.equal(dx, run(case, objective).dx)


def test_objectives_without_a_kernel_are_composed() -> None:
    case, objective = problem(), objective_of(len(SIZES), loss_type="vespo")
    assert objective.kernel is None
    expected = run(case.double(), objective_of(len(SIZES), loss_type="vespo", dtype=torch.float64), PLAIN)
    assert rel_rms(run(case, objective).dx, expected.dx) <= 3e-6


def test_the_host_never_waits() -> None:
    """Five functions on supports, seven launches, nothing read back."""
    case, objective = problem("all"), objective_of(len(SIZES), beta=0.1)
    out = torch.zeros(V, 64)
    assert case.longest == V
    with stand_in() as device:
        outcome = run(case, objective)
        TRITON.sparse_grad_weight(outcome.dx, case.hidden, case.of, out)
        run(case, objective, composed=True)
        found = statistics(case, outcome.dx)
        TRITON.gradient(case.chunk(outcome.dx), RowSlopes(*found[2:0:-1], found.lse, None), dtype=torch.float32)
    assert device.waits == []
    assert device.launches == [
        "_sparse_objective_kernel",
        "_sparse_weight_kernel",
        "_sparse_logits_kernel",
        "_row_objective_kernel",
        "_sparse_grad_hidden_kernel",
        "_row_statistics_kernel",
        "_row_gradient_kernel",
    ]


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 1030])
def test_traffic(width: int) -> None:
    """Of rows of the weight, as many bytes as their module says; nothing that depends on V or on the longest row."""
    case = problem(width=width, dtype=torch.float16, sizes=(2, 1, 37, 8))
    num_ids, num_rows, element = 48, 4, 2
    logits, out = case.logits, nan(4, width)
    blocks = -(-width // SPARSE_ROWS.width(width))
    with count_traffic({"weight": case.weight, "x": logits, "ids": case.of.ids, "hidden": case.hidden}) as moved:
        TRITON.sparse_logits(case.hidden, case.weight, case.of, logits)
    assert (moved["weight"].loads, moved["x"].stores, moved["x"].loads) == (element * width * num_ids, 4 * num_ids, 0)
    assert moved["ids"].loads == 4 * num_ids
    assert moved["hidden"].loads == element * width * sum(-(-size // SPARSE_ROWS.entries) for size in (2, 1, 37, 8))
    assert moved[ELSEWHERE].loads == 16 * num_rows
    with count_traffic({"weight": case.weight, "x": logits, "ids": case.of.ids, "out": out}) as moved:
        TRITON.sparse_grad_hidden(logits, case.weight, case.of, out)
    assert moved["weight"].loads == element * width * num_ids
    assert moved["x"].loads == moved["ids"].loads == 4 * num_ids * blocks
    assert moved["out"].stores == 4 * width * num_rows


def test_traffic_of_the_objective() -> None:
    """Two visits to a row of the weight; one where a row has no gradient. dx is over x."""
    case, objective = problem(width=100, dtype=torch.float16, sizes=(2, 1, 37, 8)), objective_of(4)
    logits, out = case.logits, nan(4, 100)
    results = ObjectiveResults(nan(4), nan(4), torch.zeros(4, dtype=torch.bool))
    with count_traffic({"weight": case.weight, "x": logits, "out": out}) as moved:
        TRITON.sparse_objective(case.hidden, case.weight, case.of, case.chunk(logits), objective, results, out)
    assert results.live.tolist() == [True, True, False, True]
    assert moved["weight"].loads == 2 * 100 * (48 + 11)
    assert moved["out"].stores == 4 * 100 * 4
    # Products, dx and the target's once more; statistics and its own x, then on the way back the same and dx.
    assert moved["x"].stores == 4 * (48 + 48 + 3)
    assert moved["x"].loads == 4 * (48 + 4 + 11 + 3 + 11)


def test_traffic_of_the_weights_gradient() -> None:
    """Rows of hidden states once an entry, rows of the gradient twice an id."""
    case, out = problem(width=260, dtype=torch.float16, sizes=(2, 1, 37, 8)), torch.zeros(V, 260)
    dx, distinct = torch.randn(48), case.of.ids.unique().numel()
    with count_traffic({"hidden": case.hidden, "out": out, "dx": dx}) as moved:
        TRITON.sparse_grad_weight(dx, case.hidden, case.of, out)
    assert moved["hidden"].loads == 2 * 260 * 48
    assert moved["out"].loads == moved["out"].stores == 4 * 260 * distinct
    assert moved["dx"].loads == 4 * 48 * 2  # for each of two blocks of columns


def test_the_limit_is_a_share_of_the_vocabulary() -> None:
    device = torch.device("cpu")
    assert TRITON.sparse_limit(151936, torch.bfloat16, device) == 151936 // 192
    assert TRITON.sparse_limit(151936, torch.float32, device) == 151936 // 32
    assert TRITON.sparse_limit(100, torch.bfloat16, device) == 1
