"""Rows on their supports in C++: every function of the `cpu` backend against float64, and bits that must agree.

csrc/tests/test_sparse.cpp does the same for each instruction set, and under sanitizers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.backends import cpu as cpu_backend
from grpo_fast.backends.base import (
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
from grpo_fast.losses import Segments
from grpo_fast.objectives import Tokens, slope_scope
from tests.allocations import AllocationSpy
from tests.cases import OBJECTIVES, rel_rms

pytestmark = pytest.mark.skipif(cpu_backend.native() is None, reason="grpo_fast._C is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
VOCAB = 400
SIZES = (1, 2, 300, VOCAB, 3, 1, 17, 5, 64)
HEADS = [
    Transform(HeadConfig(), None, 1.0),
    Transform(HeadConfig(logit_scale=-0.7), torch.ones(VOCAB), 0.8),
    Transform(HeadConfig(logit_scale=1.5, softcap=6.0), torch.ones(VOCAB), torch.ones(len(SIZES))),
    Transform(HeadConfig(softcap=15.0), None, 1.2),
]


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dataclass
class Case:
    """Rows with supports of `sizes`; the target's place in each, -1 for row `lost`."""

    hidden: Tensor
    weight: Tensor
    of: RowIds
    places: Tensor
    transform: Transform
    objective: RowObjective

    @property
    def cpu(self) -> Any:
        return get_backend("cpu")

    @property
    def num_rows(self) -> int:
        return self.places.numel()

    def chunk(self, logits: Tensor) -> RowChunk:
        bias, offsets = self.transform.bias, self.of.offsets
        transform = replace(self.transform, bias=None if bias is None else bias[self.of.ids])
        return RowChunk(logits, self.places, transform, offsets=offsets, longest=int(offsets.diff().max()))

    def logits(self) -> Tensor:
        out = torch.full(self.of.ids.shape, torch.nan)
        self.cpu.sparse_logits(self.hidden, self.weight, self.of, out)
        return out

    def statistics(self) -> RowStatistics:
        out = RowStatistics(*(torch.full((self.num_rows,), torch.nan) for _ in range(3)))
        self.cpu.statistics(self.chunk(self.logits()), out)
        return out

    def results(self) -> ObjectiveResults:
        blank = torch.full((self.num_rows,), torch.nan)
        return ObjectiveResults(blank, blank.clone(), blank.bool())

    def fused(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ObjectiveResults, Tensor]:
        """(dx, results, dHidden)."""
        results, grad_hidden = self.results(), torch.full(self.hidden.shape, torch.nan, dtype=dtype)
        rows = self.chunk(torch.full(self.of.ids.shape, torch.nan))
        dx = self.cpu.sparse_objective(self.hidden, self.weight, self.of, rows, self.objective, results, grad_hidden)
        return dx, results, grad_hidden

    def part(self, rows: slice) -> Case:
        """Some of the rows, as a call of their own."""
        first, last = self.of.offsets[rows.start], self.of.offsets[rows.stop]
        of = RowIds(
            self.of.ids[first:last],
            self.of.offsets[rows.start : rows.stop + 1] - first,
            self.of.rows[first:last] - rows.start,
        )
        tokens, weights = self.objective.tokens, self.objective.weights[rows]
        own = replace(
            tokens, advantages=tokens.advantages[rows], mask=tokens.mask[rows], **tokens.optional(lambda t: t[rows])
        )
        objective = replace(self.objective, tokens=own, weights=weights)
        return Case(self.hidden[rows], self.weight, of, self.places[rows], self.transform.rows(rows), objective)


def make(
    dtype: torch.dtype = torch.float32,
    width: int = 33,
    sizes: tuple[int, ...] = SIZES,
    transform: Transform = HEADS[0],
    *,
    lost: int | None = None,
    vocab: int = VOCAB,
    config: LossConfig | None = None,
) -> Case:
    gen = torch.Generator().manual_seed(width + len(sizes))
    lengths = torch.tensor(sizes)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    # In order where it is all of the vocabulary.
    ids = [torch.randperm(vocab, generator=gen)[:n] if n < vocab else torch.arange(vocab) for n in sizes]
    of = RowIds(torch.cat(ids).int(), offsets, torch.arange(len(sizes)).repeat_interleave(lengths))
    places = (torch.rand(len(sizes), generator=gen) * lengths).long()
    if lost is not None:
        places[lost] = -1
    if transform.bias is not None:
        transform = replace(transform, bias=torch.randn(vocab, generator=gen).to(dtype))
    if isinstance(transform.temperature, Tensor):
        transform = replace(transform, temperature=0.5 + torch.rand(len(sizes), generator=gen))
    n = len(sizes)
    numbers = [torch.randn(n, generator=gen) for _ in range(4)]
    old, ref, sampling = (0.3 * values - 1.5 for values in numbers[1:])
    tokens = Tokens(
        numbers[0],
        torch.ones(n, dtype=torch.bool),
        Segments(torch.tensor([0, n]), n),
        torch.tensor(float(n)),
        old,
        ref,
        sampling,
    )
    objective = RowObjective(tokens, torch.rand(n, generator=gen), config or LossConfig(beta=0.1, entropy_coef=0.02))
    hidden, weight = (torch.randn(rows, width, generator=gen).to(dtype) for rows in (n, vocab))
    return Case(hidden, weight, of, places, transform, objective)


# -- float64 ----------------------------------------------------------------------------------------------------------


def dense_entries(case: Case, values: Tensor) -> Tensor:
    """`[R, V]` float64 of `[N]`, zero where a row has no entry."""
    out = torch.zeros(case.num_rows, case.weight.shape[0], dtype=torch.float64)
    out[case.of.rows, case.of.ids.long()] = values.double()
    return out


def exact_statistics(case: Case, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, lse) `[R]` of raw products `[R, V]` float64, differentiable."""
    transform, inside = case.transform, dense_entries(case, torch.ones(case.of.ids.shape)) > 0
    z = x if transform.bias is None else x + transform.bias.double()
    z = z * transform.head.logit_scale
    if transform.head.softcap is not None:
        z = transform.head.softcap * torch.tanh(z / transform.head.softcap)
    temperature = transform.temperature
    z = z / (temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(z.masked_fill(~inside, -torch.inf), -1)
    log_p = log_p.masked_fill(~inside, 0.0)
    targets = case.of.ids[(case.of.offsets[:-1] + case.places).clamp(min=0)].long()
    logprobs = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p * inside).sum(-1)
    return torch.where(case.places >= 0, logprobs, torch.nan), entropy, z.masked_fill(~inside, -torch.inf).logsumexp(-1)


def exact_gradient(case: Case, x: Tensor, g: Tensor, e: Tensor) -> Tensor:
    """dx `[N]` float64 of `[N]` raw products."""
    whole = dense_entries(case, x).requires_grad_()
    logprobs, entropy, _ = exact_statistics(case, whole)
    (g.double() * logprobs + e.double() * entropy).sum().backward()
    assert whole.grad is not None
    return whole.grad[case.of.rows, case.of.ids.long()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 33, 1025])
def test_products_are_exact(width: int, dtype: torch.dtype) -> None:
    case = make(dtype, width)
    h, w = case.hidden.double(), case.weight.double()
    dx = torch.randn(case.of.ids.shape, generator=torch.Generator().manual_seed(1))
    assert rel_rms(case.logits(), (h @ w.T)[case.of.rows, case.of.ids.long()]) <= 1e-6
    exact = dense_entries(case, dx)
    for out_dtype in DTYPES:
        out = torch.full(h.shape, torch.nan, dtype=out_dtype)
        case.cpu.sparse_grad_hidden(dx, case.weight, case.of, out)
        assert rel_rms(out, exact @ w) <= ROUNDING[out_dtype]
        base = torch.randn(w.shape, generator=torch.Generator().manual_seed(2)).to(out_dtype)
        added = base.clone()
        case.cpu.sparse_grad_weight(dx, case.hidden, case.of, added)
        assert rel_rms(added, base.double() + exact.T @ h) <= ROUNDING[out_dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_ids_that_occur_are_touched(dtype: torch.dtype) -> None:
    case = make(dtype, sizes=(2, 1, 7, 3))
    occurs = torch.zeros(VOCAB, dtype=torch.bool)
    occurs[case.of.ids.long()] = True
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    out = torch.full((VOCAB, 33), -3, dtype=integer).view(dtype)  # NaN
    out[occurs] = 0
    case.cpu.sparse_grad_weight(torch.ones(case.of.ids.shape), case.hidden, case.of, out)
    assert out.view(integer)[~occurs].eq(-3).all()
    assert out[occurs].abs().amax(1).gt(0).all()


@pytest.mark.parametrize("vocab", [2, 2048, 2049, 70001])
def test_ids_are_sorted_digit_by_digit(vocab: int, threads: Any) -> None:
    """All entries of an id side by side: its sum is rounded once, so a narrow gradient is the wide one, rounded."""
    case = make(sizes=(min(vocab, 3000), vocab), vocab=vocab)
    dx = torch.randn(case.of.ids.shape)
    for count in (1, 3):
        threads(count)
        wide, narrow = torch.zeros(vocab, 33), torch.zeros(vocab, 33, dtype=torch.bfloat16)
        for out in (wide, narrow):
            case.cpu.sparse_grad_weight(dx, case.hidden, case.of, out)
        assert rel_rms(wide, dense_entries(case, dx).T @ case.hidden.double()) <= 1e-6
        assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("width", [33, 128, 300])
@pytest.mark.parametrize("count", [511, 512, 513])
def test_an_id_of_many_rows(count: int, width: int, threads: Any) -> None:
    """Threads share the columns of an id with 512 entries or more; each entry counts once, on every thread."""
    case = make(torch.bfloat16, width, sizes=(1,) * 600)
    case.of.ids[:count], case.of.ids[count:] = 7, 8  # beside each other in memory
    dx, found = torch.randn(600), []
    for number in (1, 2, 3):
        threads(number)
        out = torch.ones(VOCAB, width)
        case.cpu.sparse_grad_weight(dx, case.hidden, case.of, out)
        found.append(out)
    assert rel_rms(found[0], 1 + dense_entries(case, dx).T @ case.hidden.double()) <= 1e-6
    assert all(torch.equal(out, found[0]) for out in found)


@pytest.mark.parametrize("transform", HEADS)
def test_rows_match_float64(transform: Transform) -> None:
    case = make(transform=transform, lost=4)
    x, found = case.logits(), case.statistics()
    exact = exact_statistics(case, dense_entries(case, x))
    kept = case.places >= 0
    assert found.logprobs[~kept].isnan().all()
    for got, expected in zip(found, exact, strict=True):
        assert (got - expected)[kept].abs().max() <= 2e-5
        assert rel_rms(got[kept], expected[kept]) <= 1e-6
    case = make(transform=transform)
    gen = torch.Generator().manual_seed(3)
    g, e = (torch.randn(case.num_rows, generator=gen) for _ in range(2))
    found = case.statistics()
    for bonus in (None, e):
        dx = case.cpu.gradient(
            case.chunk(x.clone()), RowSlopes(found.lse, found.entropy, g, bonus), dtype=torch.bfloat16
        )
        assert dx.dtype == torch.float32
        assert rel_rms(dx, exact_gradient(case, x, g, torch.zeros(()) if bonus is None else bonus)) <= 3e-6
    own, out = case.chunk(x.clone()), torch.full_like(x, torch.nan)
    assert case.cpu.gradient(own, RowSlopes(found.lse, found.entropy, g, e), dtype=torch.float32, out=out) is out
    assert torch.equal(out, dx)


@pytest.mark.parametrize("transform", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_visit_is_several(dtype: torch.dtype, transform: Transform) -> None:
    """The fused function against float64, and bit for bit against the functions it fuses."""
    case = make(dtype, transform=transform)
    dx, results, grad_hidden = case.fused(dtype)
    x, found = case.logits(), case.statistics()
    assert torch.equal(results.logprobs, found.logprobs)
    assert torch.equal(results.entropy, found.entropy)
    g, e = case.objective.slopes(found.logprobs, found.entropy)
    assert e is not None
    assert rel_rms(dx, exact_gradient(case, x, g, e)) <= 5e-6
    apart, again = case.results(), x.clone()
    assert torch.equal(dx, case.cpu.objective_rows(case.chunk(again), case.objective, apart, dtype=dtype))
    assert all(torch.equal(one, other) for one, other in zip(results, apart, strict=True))
    summed = torch.full_like(grad_hidden, torch.nan)
    case.cpu.sparse_grad_hidden(dx, case.weight, case.of, summed)
    assert torch.equal(grad_hidden, summed)
    assert rel_rms(grad_hidden, dense_entries(case, dx) @ case.weight.double()) <= ROUNDING[dtype]
    scaled = replace(case, objective=replace(case.objective, grad_scale=torch.tensor(4.0)))
    assert torch.equal(scaled.fused()[0], 4 * dx)


@pytest.mark.parametrize("kwargs", OBJECTIVES)
def test_objectives(kwargs: dict[str, Any]) -> None:
    """Against the torch backend: those with a kernel, and those that are composed."""
    config = LossConfig(**kwargs)
    case = make(torch.bfloat16, config=config)
    case.hidden.mul_(0.1)  # policies that are near each other
    if (config.importance_sampling_mode or "").startswith("sequence"):  # known before the rows are
        tokens = replace(case.objective.tokens, importance=torch.linspace(0.5, 1.5, case.num_rows))
        case = replace(case, objective=replace(case.objective, tokens=tokens))
    if slope_scope(config, has_old=True) != "row":
        assert case.objective.kernel is None
    dx, results, grad_hidden = case.fused()
    rows, plain, expected = case.chunk(torch.empty(case.of.ids.shape)), case.results(), torch.empty(case.hidden.shape)
    reference = get_backend("torch").sparse_objective(
        case.hidden, case.weight, case.of, rows, case.objective, plain, expected
    )
    assert rel_rms(dx, reference) <= 5e-6
    assert rel_rms(grad_hidden, expected) <= 5e-6
    assert rel_rms(results.logprobs, plain.logprobs) <= 1e-6


# -- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_other_rows_matter(dtype: torch.dtype, threads: Any) -> None:
    case = make(dtype, 150, sizes=(VOCAB, *(3,) * 700), vocab=VOCAB)
    found = []
    for number in (1, 2, 3, 1):
        threads(number)
        dx, results, grad_hidden = case.fused(dtype)
        grad_weight = torch.ones(case.weight.shape, dtype=dtype)
        case.cpu.sparse_grad_weight(dx, case.hidden, case.of, grad_weight)
        found.append((dx, *results, grad_hidden, grad_weight, case.logits(), *case.statistics()))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    for rows in (slice(0, 1), slice(1, 2), slice(17, 100), slice(700, 701)):
        part = case.part(rows)
        if part.objective.config.entropy_coef:  # the bonus is a mean over the whole call
            part.objective.tokens.bonus_count.fill_(case.num_rows)
        dx, results, grad_hidden = part.fused(dtype)
        entries = slice(int(case.of.offsets[rows.start]), int(case.of.offsets[rows.stop]))
        assert torch.equal(dx, found[0][0][entries])
        assert torch.equal(results.logprobs, found[0][1][rows])
        assert torch.equal(grad_hidden, found[0][4][rows])


@pytest.mark.parametrize("transform", HEADS)
def test_a_support_of_everything_is_a_dense_row(transform: Transform) -> None:
    vocab = 2500
    case = make(transform=transform, sizes=(vocab,) * len(SIZES), vocab=vocab)
    x, found = case.logits(), case.statistics()
    dense = RowChunk(x.clone().view(case.num_rows, vocab), case.places, case.transform)
    whole = RowStatistics(*(torch.empty(case.num_rows) for _ in range(3)))
    case.cpu.statistics(dense, whole)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))
    slopes = RowSlopes(found.lse, found.entropy, torch.ones(case.num_rows), torch.full((case.num_rows,), 0.1))
    sparse_dx = case.cpu.gradient(case.chunk(x), slopes, dtype=torch.float32)
    assert torch.equal(sparse_dx, case.cpu.gradient(dense, slopes, dtype=torch.float32).flatten())


@pytest.mark.parametrize("transform", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sure_token_has_no_gradient(dtype: torch.dtype, transform: Transform) -> None:
    case = make(dtype, sizes=(1,) * len(SIZES), transform=transform)
    dx, results, grad_hidden = case.fused(dtype)
    for values in (dx, results.logprobs, results.entropy, grad_hidden):
        assert values.eq(0).all()
    found = case.statistics()
    ones = torch.ones(case.num_rows)
    again = case.cpu.gradient(case.chunk(case.logits()), RowSlopes(found.lse, found.entropy, ones, ones), dtype=dtype)
    assert again.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(dtype: torch.dtype) -> None:
    """Up to +-1e4: certainty, not overflow."""
    case = make(dtype, 16)
    case.weight.mul_(2000)
    x, found = case.logits(), case.statistics()
    assert x.abs().max() > 1e4
    exact = exact_statistics(case, dense_entries(case, x))
    for got, expected in zip(found, exact, strict=True):
        assert got.isfinite().all()
        assert (got - expected).abs().max() <= 4e-3  # three roundings of 2e4
    dx, _, grad_hidden = case.fused()
    assert dx.isfinite().all()
    assert grad_hidden.isfinite().all()


def test_a_lost_target_spoils_its_row_only() -> None:
    sound, lost = make(), make(lost=4)
    for one, other in zip((*sound.fused()[1], sound.fused()[2]), (*lost.fused()[1], lost.fused()[2]), strict=True):
        others = torch.arange(sound.num_rows) != 4
        assert torch.equal(one[others], other[others])
    dx, results, grad_hidden = lost.fused()
    assert results.logprobs[4].isnan()
    assert grad_hidden[4].isnan().all()
    assert dx.isnan().sum() == SIZES[4]


def test_rows_without_a_gradient_say_so() -> None:
    case = make(torch.bfloat16, config=LossConfig(loss_type="reinforce"))
    case.objective.tokens.advantages[::2] = 0.0
    dx, results, grad_hidden = case.fused(torch.bfloat16)
    assert results.live.tolist() == [t % 2 == 1 for t in range(case.num_rows)]
    assert grad_hidden[::2].eq(0).all()
    assert dx[case.of.rows % 2 == 0].eq(0).all()
    assert grad_hidden[1::2].abs().amax(1)[[0, 1, 3]].gt(0).all()  # the other is a row of one


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_does_not_depend_on_the_vocabulary() -> None:
    peaks = []
    for vocab in (1000, 30000):
        case = make(torch.bfloat16, sizes=(8,) * 50, vocab=vocab)
        rows, results, grad_hidden = case.chunk(torch.empty(case.of.ids.shape)), case.results(), torch.empty(50, 33)
        out = torch.zeros(vocab, 33)
        with AllocationSpy() as spy:
            dx = case.cpu.sparse_objective(
                case.hidden, case.weight, case.of, rows, case.objective, results, grad_hidden
            )
            case.cpu.sparse_grad_weight(dx, case.hidden, case.of, out)
        peaks.append(spy.peak)
    assert 16 * 400 <= peaks[0] == peaks[1] <= 24 * 400


def test_matrices_with_gaps() -> None:
    case = make(torch.bfloat16)
    dx, results, grad_hidden = case.fused(torch.bfloat16)
    added = torch.ones(VOCAB, 33)
    case.cpu.sparse_grad_weight(dx, case.hidden, case.of, added)

    def spread(matrix: Tensor) -> Tensor:
        return torch.full((*matrix.shape, 2), torch.nan, dtype=matrix.dtype)[..., 0].copy_(matrix)

    for gaps in ("hidden", "weight"):  # of hidden states there is a copy, and C++ goes on
        one = replace(case, **{gaps: spread(getattr(case, gaps))})
        assert torch.equal(one.logits(), case.logits()) == (gaps == "hidden")
        assert rel_rms(one.fused(torch.bfloat16)[2], grad_hidden) <= 2.0**-8
        out = torch.ones(VOCAB, 33)
        case.cpu.sparse_grad_weight(dx, one.hidden, case.of, out)
        assert torch.equal(out, added)
    other = replace(case, hidden=spread(case.hidden), weight=spread(case.weight))
    assert rel_rms(other.logits(), case.logits()) <= 1e-6
    assert rel_rms(other.fused(torch.bfloat16)[0], dx) <= 1e-5
    rows, place = case.chunk(torch.empty(case.of.ids.shape)), spread(torch.full_like(grad_hidden, torch.nan))
    case.cpu.sparse_objective(case.hidden, case.weight, case.of, rows, case.objective, results, place)
    assert rel_rms(place, grad_hidden) <= 2.0**-8
    apart = spread(torch.ones(VOCAB, 33))
    case.cpu.sparse_grad_weight(dx, case.hidden, case.of, apart)
    assert rel_rms(apart, added) <= 1e-6
