"""Which rows are computed from gathered rows of the weight, and which in tiles of logits, where supports are given.

Legend: T tokens, V vocabulary, n rows that are computed, k some of them, N the ids of some rows.

    a support of          the row is
    1 token               not computed: logprob and entropy 0, no gradient
    2 .. sparse_limit     sparse: dot products with the rows of the weight that it names, no matter how large V is
    more                  masked: a row of a tile of logits, of which the support's entries are gathered
    all (0 or V)          whole: a row of a tile of logits

Sparse and masked rows go through the same row functions, on rows of their own lengths. Which of these a row is depends
on its own support and on the weight, not on other rows or the plan: old, current and reference passes agree bit for bit
on any mixture. What is held of supports is O(N), besides the workspace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_fast.backends.base import RowChunk, RowIds, Transform
from grpo_fast.packing import Support, offsets_of, target_places


@dataclass(frozen=True)
class Supported:
    """Rows with their supports.

    Attributes:
        of: their ids. places: `[k]` int64, where in its support a row's target is; -1: nowhere.
        longest: of the rows.
        limits: `of.offsets`, on the host, where parts will be asked for.
    """

    of: RowIds
    places: Tensor
    longest: int
    limits: list[int] | None = None

    @staticmethod
    def taken(support: Support, places: Tensor, rows: Tensor, num_ids: int, longest: int, *, cut: bool) -> Supported:
        """The `rows` `[k]`, increasing, of a support; `num_ids` theirs. `cut`: whether parts will be asked for."""
        part = support if rows.numel() == support.num_rows else support.taken(rows, num_ids)
        of = RowIds(part.token_ids.int(), part.offsets.long(), part.rows_of_ids())
        return Supported(of, places[rows], longest, of.offsets.tolist() if cut else None)

    def part(self, start: int, stop: int) -> Supported:
        """Rows `start:stop`."""
        assert self.limits is not None
        first, last = self.limits[start], self.limits[stop]
        offsets, rows = self.of.offsets[start : stop + 1] - first, self.of.rows[first:last] - start
        return Supported(RowIds(self.of.ids[first:last], offsets, rows), self.places[start:stop], self.longest)

    def block(self, start: int, stop: int, targets: Tensor) -> Supported:
        """What of the rows' supports is in the vocabulary `start:stop`, ids counted from there; of targets `[k]`."""
        inside = ((self.of.ids >= start) & (self.of.ids < stop)).nonzero()[:, 0]
        rows = self.of.rows[inside]
        of = RowIds(self.of.ids[inside] - start, offsets_of(rows.bincount(minlength=targets.numel())), rows)
        return Supported(of, target_places(Support.trusted(of.ids, of.offsets), targets - start), self.longest)

    def chunk(self, logits: Tensor, transform: Transform) -> RowChunk:
        """Raw products `[N]` of these rows, as row functions take them."""
        if transform.bias is not None:
            transform = replace(transform, bias=transform.bias[self.of.ids])
        return RowChunk(logits, self.places, transform, offsets=self.of.offsets, longest=self.longest)


@dataclass(frozen=True)
class Split:
    """The computed rows by kind.

    Attributes:
        dense: `[d]` int64, whole rows and then masked ones. num_whole: of them.
        masked: those that are masked; or None. sparse_rows: `[m]`. sparse: those rows; or None.
    """

    dense: Tensor
    num_whole: int
    masked: Supported | None
    sparse_rows: Tensor
    sparse: Supported | None


def split_rows(support: Support, rows: Tensor | None, targets: Tensor, vocab: int, limit: int) -> Split:
    """By kind. A GPU is waited for once, twice where rows are masked; then offsets and ids are looked at as well.

    Args:
        support: of T tokens. rows: `[n]` int64, which are computed; None: all. targets: `[T]`.
        limit: `Backend.sparse_limit`.

    Raises:
        ValueError: malformed offsets (on a GPU nobody has looked at them yet), or an id that is not in [0, V): the
            weight's rows are gathered by it, on a GPU without anybody looking.
    """
    places = target_places(support, targets)
    rows = torch.arange(support.num_rows, device=targets.device) if rows is None else rows
    sizes = support.sizes[rows]
    whole = (sizes == 0) | (sizes >= vocab)
    masked = ~whole & (sizes > limit)
    # Where the one token is not the target its logprob is NaN, as for any support that lacks it.
    sparse = ~whole & ~masked & ~((sizes == 1) & (places[rows] == 0))
    found = [kind.sum() for kind in (whole, masked, sparse)]
    found += [torch.where(kind, sizes, 0).sum() for kind in (masked, sparse)]
    found += [torch.where(kind, sizes, 0).amax() if rows.numel() else sizes.sum() for kind in (masked, sparse)]
    ids = support.token_ids if support.token_ids.numel() else places.new_zeros(1)
    found += [ids.amin().long(), ids.amax().long()]
    *counts, least, most, first, last, smallest = torch.cat([torch.stack(found), support.extremes()]).tolist()
    num_whole, num_masked, num_sparse, masked_ids, sparse_ids, masked_longest, sparse_longest = counts
    if (wrong := support.offsets_error(first, last, smallest)) is not None:
        raise ValueError(f"support.{wrong}")
    if least < 0 or most >= vocab:
        raise ValueError(f"support: expected token ids in [0, {vocab}); got {least if least < 0 else most}")
    listed = [
        rows[torch.nonzero_static(kind, size=size)[:, 0]]
        for kind, size in ((whole, num_whole), (masked, num_masked), (sparse, num_sparse))
    ]
    return Split(
        torch.cat(listed[:2]),
        num_whole,
        Supported.taken(support, places, listed[1], masked_ids, masked_longest, cut=True) if num_masked else None,
        listed[2],
        Supported.taken(support, places, listed[2], sparse_ids, sparse_longest, cut=False) if num_sparse else None,
    )
