"""Supports for the tests' cases: mixtures of every kind of row, the same for the same arguments.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grpo_fast.backends.base import get_backend
from grpo_fast.packing import Support
from grpo_fast.reference import reference_logprobs
from tests.cases import Case, to_padded

SHARE = 4
"""V over the largest sparse support, in tests: small vocabularies have rows of every kind."""

MIXTURES: dict[str, tuple[float, ...]] = {
    "mixed": (0, 1, 1, 2, 2, 3, 5, 0.3, 0.6, -1, 1.0),
    "sparse": (1, 2, 2, 3, 5),
    "masked": (0.3, 0.6, -1),
    "dense": (0, 0.4, -1, 1.0),
    "singletons": (1,),
    "light": (0, 1, 2, 4),
}
"""Sizes that a row may have: tokens from 1 up, a share of V below 1 (1.0 is all of V), -1 for V - 1, 0 for an empty
row."""


def size_of(size: float, vocab: int) -> int:
    """In tokens."""
    if size == -1:
        return max(vocab - 1, 1)
    share = isinstance(size, float)
    return min(max(round(size * vocab), 1) if share and size > 0 else int(size), vocab)


def draw_support(targets: Tensor, vocab: int, mixture: str, seed: int) -> Support:
    """A row for each target of any shape, with the target in it, in an order of its own; int32 or int64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = MIXTURES[mixture]
    rows = []
    for target in targets.reshape(-1).clamp(0, vocab - 1).tolist():
        size = size_of(sizes[int(torch.randint(len(sizes), (), generator=generator))], vocab)
        ids = torch.randperm(vocab, generator=generator)
        if size:
            ids = torch.cat([torch.tensor([target]), ids[ids != target][: size - 1]])
            ids = ids[torch.randperm(size, generator=generator)]
        rows.append(ids[:size])
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    dtype = (torch.int32, torch.int64)[seed % 2]
    return Support(torch.cat([torch.zeros(0, dtype=torch.int64), *rows]).to(dtype), offsets.to(dtype))


def sizes_cycling(targets: Tensor, vocab: int, sizes: Sequence[int]) -> Support:
    """Row t holds its target and the ids after it, `sizes[t % len(sizes)]` altogether."""
    each = [sizes[t % len(sizes)] for t in range(targets.numel())]
    ids = [(y + k) % vocab for y, n in zip(targets.reshape(-1).tolist(), each, strict=True) for k in range(n)]
    return Support(torch.tensor(ids, dtype=torch.int32), torch.tensor([0, *each]).cumsum(0))


def supported(case: Case, mixture: str = "mixed", seed: int = 0) -> tuple[Case, Support]:
    """A packed case with a support, its old, reference and sampling log-probabilities moved onto it."""
    support = draw_support(case.targets, case.weight.shape[0], mixture, seed)
    return on_support(case, support), support


def on_support(case: Case, support: Support) -> Case:
    """A packed case with log-probabilities as far from the current ones on a support as they were without."""
    exact = case.double()
    logprobs, entropy = reference_logprobs(
        exact.hidden, exact.weight, exact.targets, bias=exact.bias, head=exact.head, temperature=exact.temperature,
        support=support,
    )  # fmt: skip
    moved = {
        name: (getattr(exact, name) + logprobs - exact.logprobs).to(getattr(case, name).dtype)
        for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs")
    }
    side = case.logprobs.dtype
    return replace(case, logprobs=logprobs.to(side), entropy=entropy.to(side), **moved)


def padded_support(support: Support, cu_seqlens: Tensor) -> Support:
    """Rows of `[S, L]` targets as `cases.padded` lays them out; those of the padding take turns of one id and none."""
    num_rows = support.num_rows
    fill = Support(torch.tensor([3], dtype=support.token_ids.dtype), torch.tensor([0, 1, 1]))
    index = to_padded(torch.arange(num_rows), cu_seqlens, fill=-1).reshape(-1)
    turns = num_rows + torch.arange(index.numel()) % 2
    return Support.cat([support, fill])[torch.where(index < 0, turns, index)]


def outside(support: Support, logits: Tensor) -> Tensor:
    """`[..., V]` bool: which logits do not count."""
    out = (support.sizes > 0)[:, None].repeat(1, logits.shape[-1])
    out[support.rows_of_ids(), support.token_ids.long()] = False
    return out.reshape(logits.shape)


@contextmanager
def sparse_share(share: int, *backends: str) -> Iterator[None]:
    """`V // share` is the largest sparse support of the backends: 1 makes every row sparse, a large one none."""
    patch = pytest.MonkeyPatch()
    for name in backends:
        patch.setattr(type(get_backend(name)), "sparse_share", lambda *_: share)
    try:
        yield
    finally:
        patch.undo()


def as_support(rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.int64) -> Support:
    """From lists of ids."""
    sizes = torch.tensor([0, *(len(row) for row in rows)])
    return Support(torch.tensor([v for row in rows for v in row], dtype=dtype), sizes.cumsum(0))
