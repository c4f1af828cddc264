"""The row kernels by themselves: odd strides, dx in place and apart, every dtype, edge rows, the bytes they move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grpo_fast.kernels import row_gradient, row_objective, row_statistics
from grpo_fast.kernels.launch_table import ROW_LAUNCHES
from grpo_fast.kernels.objective import PARAMETERS, objective_parameters
from grpo_fast.kernels.rows import Rows, dx_over
from tests.cases import rel_rms

PLAIN = dict.fromkeys(PARAMETERS, 0.2) | {"clip_low": 0.8, "clip_high": 1.2, "delta": math.inf}
VOCABS = [1, 7, 97, 512, 1000, 4099]


def make_rows(num_rows: int, vocab: int, *, pitch: int | None = None, dtype: torch.dtype = torch.float32) -> Rows:
    generator = torch.Generator().manual_seed(vocab)
    buffer = torch.full((num_rows, pitch or vocab), torch.nan, dtype=dtype)
    buffer[:, :vocab] = 3 * torch.randn(num_rows, vocab, generator=generator)
    return Rows(buffer[:, :vocab], torch.randint(0, vocab, (num_rows,), generator=generator))


def exact(logits: Tensor, targets: Tensor, g: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, lse, dx) in float64, by autograd."""
    z = logits.double().clone().requires_grad_()
    log_p = torch.log_softmax(z, -1)
    logprobs, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (g.double() * logprobs + e.double() * entropy).sum().backward()
    return logprobs.detach(), entropy.detach(), z.detach().logsumexp(-1), z.grad


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", ["apart", "in place", "narrow logits"])
def test_gradient(vocab: int, dtype: torch.dtype, place: str) -> None:
    """dx where it goes: also over the logits, from which it must be read before it is written."""
    rows = make_rows(5, vocab, pitch=vocab + 3, dtype=dtype if place == "narrow logits" else torch.float32)
    g, e = torch.tensor([0.3, -1.0, 0.0, 2.0, 0.0]), torch.tensor([0.0, 0.1, 0.0, -0.2, 0.3])
    logprobs, entropy, lse, expected = exact(rows.logits, rows.targets, g, e)
    actual = row_statistics.row_statistics_of(rows)
    for name, one, other in zip(("logprobs", "entropy", "lse"), actual, (logprobs, entropy, lse), strict=True):
        assert (one - other).abs().max() <= 3e-6, name
    dx = dx_over(rows.logits, dtype) if place != "apart" else torch.full((5, vocab), torch.nan, dtype=dtype)
    row_gradient.row_gradient_of(rows, actual[2], actual[1], g, e, dx)
    bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert rel_rms(dx, expected) <= bound
    assert not dx[2].any()


@pytest.mark.parametrize("vocab", [8, 100, 1004, 1007])
def test_dx_over_the_logits_is_aligned(vocab: int) -> None:
    """To 16 bytes, where the rows are: else accesses of 8 numbers become four."""
    rows = make_rows(3, vocab, pitch=1024)
    dx = dx_over(rows.logits, torch.bfloat16)
    assert (dx.data_ptr() - rows.logits.data_ptr()) % 16 == 0
    assert dx[-1, -1].data_ptr() - rows.logits[-1].data_ptr() < 4 * vocab


@pytest.mark.parametrize("arch", ROW_LAUNCHES)
@pytest.mark.parametrize("vocab", [3000, 5001, 66000])
def test_every_launch(vocab: int, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of the launch table computes the same."""
    monkeypatch.setattr("grpo_fast.kernels.rows.architecture", lambda device: arch)
    rows = make_rows(2, vocab)
    g = torch.tensor([0.3, -1.0])
    logprobs, entropy, _, expected = exact(rows.logits, rows.targets, g, torch.zeros(2))
    actual = row_statistics.row_statistics_of(rows)
    assert (actual[0] - logprobs).abs().max() <= 3e-6
    assert (actual[1] - entropy).abs().max() <= 3e-6
    dx = dx_over(rows.logits, torch.bfloat16)
    row_gradient.row_gradient_of(rows, actual[2], actual[1], g, None, dx)
    assert rel_rms(dx, expected) <= 4e-3


def test_edge_rows() -> None:
    """Rows of -inf, NaN, huge and equal logits say what log_softmax in float64 says."""
    logits = torch.randn(7, 100)
    logits[0] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 3] = 1.0
    logits[2] = 1e4
    logits[3, 50] = torch.nan
    logits[4, 50:] = -torch.inf
    logits[5, 3] = 1e4
    logits[6] *= 1e4
    targets = torch.full((7,), 3)
    z = logits.double()
    log_p = torch.log_softmax(z, -1)
    expected_logprobs = log_p[:, 3]
    expected_entropy = -(log_p.exp() * log_p.nan_to_num(nan=torch.nan, neginf=-1e300)).sum(-1)
    logprobs, entropy, _ = row_statistics.row_statistics_of(Rows(logits, targets))
    torch.testing.assert_close(logprobs.double(), expected_logprobs, equal_nan=True, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, equal_nan=True, rtol=1e-6, atol=3e-6)


def test_rows_do_not_see_each_other() -> None:
    """The same bits whatever a row's place, its neighbours and the stride."""
    rows = make_rows(9, 1000)
    whole = row_statistics.row_statistics_of(rows)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    padded = torch.full((9, 1024), torch.nan)
    padded[:, :1000] = rows.logits[order]
    other = row_statistics.row_statistics_of(Rows(padded[:, :1000], rows.targets[order]))
    assert all(torch.equal(a[order], b) for a, b in zip(whole, other, strict=True))


def objective_rows(
    rows: Rows, dx: Tensor, *, results: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    ones = torch.ones(rows.num_rows)
    tokens = {"weights": ones, "advantages": ones, "old_logprobs": None, "ref_logprobs": None}
    objective = row_objective.Objective("clipped", "none", True, "none", objective_parameters(PLAIN, dx.device))
    return row_objective.row_objective_of(
        rows,
        objective,
        tokens | {"sampling_logprobs": None, "importance": None},
        dx,
        entropy_gradient=None,
        grad_scale=None,
        results=results,
    )


def test_objective_agrees_with_statistics_bit_for_bit() -> None:
    """What makes the ratio of the first step exactly 1."""
    rows = make_rows(6, 5000)
    expected = row_statistics.row_statistics_of(rows)
    logprobs, entropy, live = objective_rows(rows, torch.empty(6, 5000, dtype=torch.bfloat16))
    assert torch.equal(logprobs, expected[0])
    assert torch.equal(entropy, expected[1])
    assert live.all()


def test_targets_outside_the_vocabulary_have_no_logprob() -> None:
    """NaN, which the loss counts; entropy and lse are the row's, other rows are not touched, nor is other memory."""
    rows = make_rows(5, 97)
    sound = row_statistics.row_statistics_of(rows)
    targets = torch.tensor([-1, int(rows.targets[1]), 97, -(2**40), 2**32])
    guarded = torch.full((7, 100), 7.0, dtype=torch.float16)
    logprobs, entropy, lse = row_statistics.row_statistics_of(Rows(rows.logits, targets))
    assert logprobs.isnan().tolist() == [True, False, True, True, True]
    assert torch.equal(logprobs[1], sound[0][1])
    assert torch.equal(entropy, sound[1])
    assert torch.equal(lse, sound[2])
    again, _, live = objective_rows(Rows(rows.logits, targets), guarded[1:6, :97])
    assert torch.equal(again.isnan(), logprobs.isnan())
    assert live.all()
    assert guarded[1:6, :97].isnan().all(1).tolist() == [True, False, True, True, True]
    row_gradient.row_gradient_of(Rows(rows.logits, targets), lse, entropy, torch.ones(5), None, guarded[1:6, :97])
    assert guarded[1:6, :97].isfinite().all()  # a block of the vocabulary, whose targets are elsewhere
    guarded[1:6, :97] = 7.0
    assert (guarded == 7.0).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_target_of_another_block(softcap: float | None) -> None:
    """Blocks of the vocabulary make up the row: the target's own gradient is in one of them, in the others just p."""
    rows = replace(make_rows(3, 97), softcap=softcap)
    _, entropy, lse = row_statistics.row_statistics_of(rows)
    whole = torch.empty(3, 97)
    g, e = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, 0.0, 0.3])
    row_gradient.row_gradient_of(rows, lse, entropy, g, e, whole)
    parts = []
    for start, stop in ((0, 40), (40, 41), (41, 97)):
        block = torch.full((3, stop - start), torch.nan)
        part = replace(rows, logits=rows.logits[:, start:stop])
        row_gradient.row_gradient_of(part, lse, entropy, g, e, block, vocab_start=start)
        parts.append(block)
    assert torch.equal(torch.cat(parts, 1), whole)


# policy, epsilon, delta, dual clip, advantage, d term / d logprob at ratio 1: csrc/tests/test_objective.cpp's corners.
BOUNDS = {
    "on both clip bounds": ("clipped", 0.0, math.inf, 3.0, 2.0, -2.0),
    "on delta": ("clipped", 0.2, 1.0, 3.0, 2.0, -2.0),
    "delta below the ratio": ("clipped", 0.2, 0.5, 3.0, 2.0, 0.0),
    "delta below the ratio, A < 0": ("clipped", 0.2, 0.5, 3.0, -2.0, 2.0),
    "on the dual bound": ("ppo_dual", 0.2, math.inf, 1.0, -2.0, 1.0),
}


@pytest.mark.parametrize("corner", BOUNDS)
def test_a_clamp_passes_its_slope_on_its_bounds(corner: str) -> None:
    policy, epsilon, delta, dual_clip, advantage, slope = BOUNDS[corner]
    numbers = PLAIN | {"clip_low": 1 - epsilon, "clip_high": 1 + epsilon, "delta": delta, "dual_clip": dual_clip}
    objective = row_objective.Objective(
        policy, "none", True, "none", objective_parameters(numbers, torch.device("cpu"))
    )
    rows = Rows(torch.zeros(1, 4), torch.tensor([2]))
    tokens = {"weights": torch.ones(1), "advantages": torch.tensor([advantage]), "old_logprobs": None}
    tokens |= dict.fromkeys(("ref_logprobs", "sampling_logprobs", "importance"))
    dx = torch.full((1, 4), torch.nan)
    row_objective.row_objective_of(rows, objective, tokens, dx, entropy_gradient=None, grad_scale=None)
    assert dx[0].tolist() == pytest.approx([-slope / 4, -slope / 4, 3 * slope / 4, -slope / 4])


def test_results_go_where_they_are_wanted() -> None:
    """Slices of a call's buffers, at any element."""
    rows = make_rows(5, 97)
    expected = row_statistics.row_statistics_of(rows)
    buffers = [torch.full((11,), 7.0) for _ in range(3)]
    out = tuple(buffer[3:8] for buffer in buffers)
    given = row_statistics.row_statistics_of(rows, out)
    for found, buffer, wanted in zip(given, buffers, expected, strict=True):
        assert torch.equal(buffer[3:8], wanted)
        assert found.data_ptr() == buffer[3:].data_ptr()
        assert (buffer[:3] == 7).all()
        assert (buffer[8:] == 7).all()
    live = torch.zeros(11, dtype=torch.bool)
    dx = torch.empty(5, 97)
    results = (*out[:2], live[1:6])
    found = objective_rows(rows, dx, results=results)
    assert torch.equal(found[0], expected[0])
    assert found[2].data_ptr() == live[1:].data_ptr()
    assert live.tolist() == [False] + 5 * [True] + 5 * [False]
    for wrong in ((*out[:2], live[:4]), (*out[:2], live[1:6].to(torch.uint8)), (*out[:2], live[1:11:2])):
        with pytest.raises(ValueError, match="results: expected contiguous logprobs, entropy, live"):
            objective_rows(rows, dx, results=wrong)
    with pytest.raises(ValueError, match="results: expected contiguous logprobs, entropy, lse"):
        row_statistics.row_statistics_of(rows, out[:2])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"logits: expected \[R, V\] with contiguous columns"):
        Rows(torch.zeros(4, 6).t(), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="dtype: expected at most 2 bytes over the logits"):
        dx_over(torch.zeros(4, 6).half(), torch.float32)
    with pytest.raises(ValueError, match=r"policy: expected one of clipped.*got 'ppo'"):
        row_objective.Objective("ppo", "none", True, "none", torch.zeros(12))
    with pytest.raises(ValueError, match="values: expected clip_low"):
        objective_parameters({"clip_low": 0.8}, torch.device("cpu"))
