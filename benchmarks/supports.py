"""Supports of the benchmarks' cases: how many tokens rows keep, and which.

Legend: T tokens, V vocabulary, K tokens of a support.

    kind                  sizes
    "mean 8"              long-tailed with this mean: 40 % are 1, the others log-normal with sigma 1.5, at least 2 (the
                          median of "mean 8" is 2, its largest of 1024 about 300); evenly spaced quantiles, no draws
    "recorded trained"    quantiles of a histogram in support_sizes.json, which `support_sizes.py` recorded
    "constant 64"         the same in every row, at most V / 2: at V it would be no support

All are cut to V and shuffled. Ids are drawn without replacement, with weights 1 / (3 + rank) (Zipf) over a random order
of the vocabulary: frequent words are in many rows, and their rows of the weight lie anywhere.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from grpo_fast.packing import Support, offsets_of

RECORDED = Path(__file__).resolve().parent / "support_sizes.json"
SINGLE_SHARE, SIGMA = 0.4, 1.5
BLOCK = 128  # rows whose ids are drawn at once


def support_sizes(kind: str, rows: int, vocab: int) -> Tensor:
    """`[rows]` int64 sizes of a kind, each at most `vocab`, in an order that depends on nothing else.

    Raises:
        ValueError: an unknown kind.
    """
    word, _, value = kind.partition(" ")
    levels = [(row + 0.5) / rows for row in range(rows)]
    if word == "mean":
        sizes = _long_tailed(float(value), levels)
    elif word == "recorded":
        sizes = _quantiles(_recorded(value), levels)
    elif word == "constant":
        sizes = torch.full((rows,), min(int(value), vocab // 2))
    else:
        raise ValueError(f"support: expected 'mean', 'recorded' or 'constant' and a value; got {kind!r}")
    return sizes.clamp(max=vocab)[torch.randperm(rows, generator=torch.Generator().manual_seed(11))]


def _long_tailed(mean: float, levels: list[float]) -> Tensor:
    """Sizes at some quantiles, scaled until their own mean is the one asked for."""
    tail = [NormalDist().inv_cdf((u - SINGLE_SHARE) / (1 - SINGLE_SHARE)) for u in levels if u > SINGLE_SHARE]
    shape = (SIGMA * torch.tensor(tail, dtype=torch.float64)).exp()
    singles = torch.ones(len(levels) - len(tail), dtype=torch.int64)

    def sizes(scale: float) -> Tensor:
        return torch.cat([singles, (scale * shape).round().clamp(min=2).long()])

    low, high = 0.0, mean * len(levels)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(sizes(middle).double().mean()) < mean else (low, middle)
    return sizes(high)


@cache
def _recorded(name: str) -> dict[int, int]:
    """{size: how often} of a model in support_sizes.json."""
    models = json.loads(RECORDED.read_text())["models"]
    return {int(size): count for size, count in models[name]["sizes"].items()}


def _quantiles(histogram: dict[int, int], levels: list[float]) -> Tensor:
    values = torch.tensor(sorted(histogram))
    counts = torch.tensor([histogram[size] for size in sorted(histogram)])
    ends = counts.cumsum(0) / counts.sum()
    return values[torch.searchsorted(ends, torch.tensor(levels)).clamp(max=len(values) - 1)]


def draw_support(kind: str, rows: int, vocab: int, device: torch.device, generator: torch.Generator) -> Support:
    """Supports of a kind for T = `rows` tokens."""
    sizes = support_sizes(kind, rows, vocab).to(device)
    ranks = torch.randperm(vocab, generator=generator, device=device)
    log_weights = -(ranks + 3.0).log()
    ids = []
    for part in sizes.split(BLOCK):
        # The K largest of log w + Gumbel noise are K draws without replacement.
        noise = torch.rand(len(part), vocab, generator=generator, device=device).clamp_(min=1e-30)
        chosen = noise.log_().neg_().log_().neg_().add_(log_weights).topk(int(part.max()), dim=1).indices
        ids.append(chosen[torch.arange(chosen.shape[1], device=device) < part[:, None]].int())
    return Support(torch.cat(ids), offsets_of(sizes))


def mask_of(support: Support, vocab: int) -> Tensor:
    """`[T, V]` bool: the tokens of each row; all of them where a row is empty."""
    mask = torch.zeros(support.num_rows, vocab, dtype=torch.bool, device=support.token_ids.device)
    mask[support.rows_of_ids(), support.token_ids.long()] = True
    return mask | (support.sizes == 0)[:, None]


def facts(support: Support, kind: str, vocab: int, limit: int) -> dict[str, Any]:
    """What a record says of the supports; `limit`: tokens of the largest one that is computed from gathered rows."""
    sizes = support.sizes
    whole = (sizes == 0) | (sizes >= vocab)
    shares = {
        "single": sizes == 1,
        "sparse": (sizes > 1) & (sizes <= limit) & ~whole,
        "masked": (sizes > limit) & (sizes > 1) & ~whole,
        "whole": whole,
    }
    return {
        "kind": kind,
        "mean": float(sizes.double().mean()),
        "median": float(sizes.double().quantile(0.5)),
        "max": int(sizes.max()),
        "token_ids": support.token_ids.numel(),
        "distinct_ids": support.token_ids.unique().numel(),
        "sparse_limit": limit,
        "shares": {name: float(rows.double().mean()) for name, rows in shares.items()},
    }
