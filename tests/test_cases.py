"""The shared cases against what they claim: consistent, every branch reached, every pair of options met."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from grpo_fast.reference import reference_logprobs
from tests.cases import AXES, OBJECTIVES, assert_close, make_case, objective_rows, padded, rel_rms, to_packed


def test_case_knows_its_logprobs() -> None:
    case = make_case(3, dtype=torch.float64, bias=True, logit_scale=0.5, softcap=8.0, temperature=0.8)
    got = reference_logprobs(
        case.hidden, case.weight, case.targets, bias=case.bias, head=case.head, temperature=case.temperature
    )
    for name, tensor in zip(("logprobs", "entropy"), got, strict=True):
        assert_close(name, tensor, getattr(case, name))
    assert_close("packed", to_packed(padded(case).hidden, case.cu_seqlens), case.hidden)


def test_the_matrix_covers_every_pair() -> None:
    rows, names = objective_rows(), list(AXES)
    assert len(rows) == len(set(rows)) == len(OBJECTIVES)
    for (i, first), (j, second) in itertools.combinations(enumerate(names), 2):
        wanted = set(itertools.product(AXES[first], AXES[second]))
        missing = wanted - {(row[i], row[j]) for row in rows}
        assert all(pair[0] == "vespo" and pair[1] in ("strunc", "smask") for pair in missing), missing


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_case_reaches_every_branch(seed: int) -> None:
    """Bounds are those of the matrix: each is overstepped by some tokens or sequences, and not by others."""
    case = make_case(seed, dtype=torch.float64)
    assert case.cu_seqlens is not None
    sizes = case.cu_seqlens.diff()
    A = case.advantages.repeat_interleave(sizes)
    w = (case.logprobs - case.old_logprobs).exp()
    d = (case.old_logprobs - case.sampling_logprobs).exp()
    gap = case.logprobs.exp() - case.sampling_logprobs.exp()
    tokens = {
        "clipped high": (w > 1.28) & (A > 0),
        "clipped low": (w < 0.8) & (A < 0),
        "delta": (w > 1.5) & (A < 0),
        "token mask high": d > 1.6,
        "token mask low": d < 0.6,
        "dppo high": (gap > 0.2) & (A > 0),
        "dppo low": (gap < -0.2) & (A <= 0),
    }
    for name, hit in tokens.items():
        assert 1 <= int(hit[case.loss_mask].sum()) < 0.5 * int(case.loss_mask.sum()), name
    rows = [
        (slice(b, e), a)
        for (b, e), a in zip(itertools.pairwise(case.cu_seqlens.tolist()), case.advantages, strict=True)
    ]
    rows = [(row, a) for row, a in rows if case.loss_mask[row].any()]
    assert len(rows) < len(sizes), "one sequence should be masked or empty"

    def sequences(values: Tensor, reduction: str) -> Tensor:
        return torch.stack([getattr(values[row][case.loss_mask[row]], reduction)() for row, _ in rows])

    signs = torch.stack([a for _, a in rows])
    mean_w, drift = sequences(w.log(), "mean").exp(), sequences(case.sampling_logprobs - case.logprobs, "mean")
    hits = {
        "sequence clipped high": (mean_w > 1.2) & (signs > 0),
        "sequence clipped low": (mean_w < 0.8) & (signs < 0),
        "sequence mask": sequences(d.log(), "sum").exp() > 3,
        "off-policy": (drift > 0.02) & (signs < 0),
        "not off-policy": (drift <= 0.02) & (signs < 0),
    }
    for name, hit in hits.items():
        assert 0 < int(hit.sum()) < len(rows), name


def test_rel_rms_cannot_be_fooled() -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    assert rel_rms(x, x) == 0
    assert rel_rms(torch.zeros_like(x), x) == 1
    assert rel_rms(x, torch.zeros_like(x)) == math.inf
    assert not rel_rms(x * math.nan, x) <= 1e9
    assert not rel_rms(x * math.nan, torch.zeros_like(x)) <= 1e9
    with pytest.raises(AssertionError, match="shape"):
        rel_rms(x[:2], x)
