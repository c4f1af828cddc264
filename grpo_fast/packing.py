"""Packed sequences: `[T]` tokens of `S` sequences one after another, delimited by `cu_seqlens` `[S+1]`; and the tokens
that a sampler could have chosen at each of them.

Legend: T packed tokens, S sequences, L tokens of a padded row, V vocabulary, N token ids of all supports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_fast.devices import checks_values


@dataclass(frozen=True)
class PackedBatch:
    """Completions packed one after another, as `grpo_loss` takes them.

    Attributes:
        values: the packed tensors by name, each `[T, ...]`.
        cu_seqlens: `[S+1]` int64.
        mask: `[S, L]` bool, which padded positions the tokens came from (what `unpack` needs).
    """

    values: dict[str, Tensor]
    cu_seqlens: Tensor
    mask: Tensor = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(next(iter(self.values.values())).shape[0])


def pack_padded(mask: Tensor, **tensors: Tensor) -> PackedBatch:
    """Remove the padding of `[S, L, ...]` tensors.

    Args:
        mask: `[S, L]`, nonzero at the tokens to keep; rows are sequences, padding may stand anywhere.
        tensors: `[S, L, ...]` each.

    Returns:
        The packed tensors, `cu_seqlens`, and the mask to undo it with `unpack`.

    Raises:
        ValueError: a tensor's first two dimensions are not the mask's, or no tensor was given.

    Example:
        >>> batch = pack_padded(torch.tensor([[1, 1, 0], [1, 0, 0]]), ids=torch.tensor([[5, 6, 0], [7, 0, 0]]))
        >>> batch["ids"].tolist(), batch.cu_seqlens.tolist()
        ([5, 6, 7], [0, 2, 3])
    """
    if mask.dim() != 2:
        raise ValueError(f"mask: expected shape [sequences, length]; got {list(mask.shape)}")
    if not tensors:
        raise ValueError("tensors: expected at least one tensor to pack; got none")
    keep = mask.bool()
    for name, tensor in tensors.items():
        if tensor.shape[:2] != mask.shape:
            raise ValueError(f"{name}: expected leading dimensions {list(mask.shape)}; got {list(tensor.shape)}")
    return PackedBatch({name: tensor[keep] for name, tensor in tensors.items()}, offsets_of(keep.sum(1)), keep)


def unpack(values: Tensor, batch: PackedBatch, *, fill: float = 0.0) -> Tensor:
    """Put packed `[T, ...]` values back into the padded `[S, L, ...]` layout, `fill` elsewhere.

    Raises:
        ValueError: `values` does not have one row per packed token.
    """
    if values.shape[:1] != (batch.num_tokens,):
        raise ValueError(f"values: expected {batch.num_tokens} rows, one a packed token; got {list(values.shape)}")
    padded = values.new_full((*batch.mask.shape, *values.shape[1:]), fill)
    padded[batch.mask] = values
    return padded


@dataclass(frozen=True, eq=False)
class Support:
    """The tokens that could have been sampled at each position, row by row (compressed sparse rows).

    What top-k, top-p or min-p left of the vocabulary. The policy's distribution lives on them, and with it
    log-probabilities, entropy, KL and gradients:

        logprob_t = z_t[y_t] - log sum_{v in K_t} exp z_tv        K_t = token_ids[offsets[t] : offsets[t + 1]]

    Attributes:
        token_ids: `[N]` int32 or int64, row after row; those of a row are distinct, in any order.
        offsets: `[T+1]` int32 or int64. An empty row stands for the whole vocabulary.

    Raises:
        ValueError: malformed tensors, or a token twice in a row (values are looked at on the CPU, elsewhere with
            GRPO_FAST_DEBUG=1).

    Example:
        >>> support = Support(torch.tensor([7, 3, 9]), torch.tensor([0, 2, 2, 3]))
        >>> support.num_rows, support.sizes.tolist(), support[2:].token_ids.tolist()
        (3, [2, 0, 1], [9])
    """

    token_ids: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("token_ids", self.token_ids), ("offsets", self.offsets)):
            if not isinstance(tensor, Tensor) or tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"{name}: expected a tensor of one dimension, int32 or int64; got {_described(tensor)}"
                )
        if self.offsets.numel() < 1 or self.offsets.device != self.token_ids.device:
            raise ValueError(
                f"offsets: expected [T+1] on {self.token_ids.device}, the device of token_ids; got "
                f"{_described(self.offsets)} on {self.offsets.device}"
            )
        if not checks_values(self.token_ids):
            return
        num_ids, sizes = self.token_ids.numel(), self.sizes
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        if first != 0 or last != num_ids or bool((sizes < 0).any()):
            raise ValueError(
                f"offsets: expected 0 = offsets[0] <= offsets[1] <= ... <= offsets[T] = N = {num_ids}; got "
                f"{first} first, {last} last" + (", and a step down" if bool((sizes < 0).any()) else "")
            )
        if bool((self.token_ids < 0).any()):
            raise ValueError(f"token_ids: expected ids >= 0; got {int(self.token_ids.min())}")
        keys = (self.rows_of_ids().long() << 32 | self.token_ids.long()).sort().values
        twice = (keys[1:] == keys[:-1]).nonzero()
        if twice.numel():
            row, token = divmod(int(keys[twice[0, 0]]), 2**32)
            raise ValueError(f"token_ids: expected distinct ids in a row; got {token} twice in row {row}")

    # -- made of what samplers have --

    @staticmethod
    def from_mask(mask: Tensor) -> Support:
        """Of `[..., V]` bool, True where a token is kept; leading dimensions are flattened.

        A row without any True stands for the whole vocabulary, as a row that is all True does.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() < 2:
            raise ValueError(f"mask: expected a bool tensor [..., V]; got {_described(mask)}")
        mask = mask.reshape(-1, mask.shape[-1])
        num_rows, vocab = mask.shape
        # One index of the whole mask: of a row and a column nonzero takes four times as long.
        kept = mask.reshape(-1).nonzero()[:, 0]
        rows = kept // max(vocab, 1)
        sizes = rows.bincount(minlength=num_rows)
        cut = sizes < vocab
        return Support.trusted((kept - rows * vocab)[cut[rows]].int(), offsets_of(sizes * cut))

    @staticmethod
    def from_padded(ids: Tensor, pad: int = -1) -> Support:
        """Of `[..., K]` integers, `pad` where a row has fewer than K; leading dimensions are flattened.

        Raises:
            ValueError: not such a tensor, a negative id that is not `pad`, or a token twice in a row.
        """
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64) or ids.dim() < 2:
            raise ValueError(f"ids: expected an int32 or int64 tensor [..., K]; got {_described(ids)}")
        ids = ids.reshape(-1, ids.shape[-1])
        kept = ids != pad
        return Support(ids[kept], offsets_of(kept.sum(1)))

    @staticmethod
    def whole(num_rows: int) -> Support:
        """Rows of which nothing was cut, on the CPU."""
        return Support.trusted(torch.empty(0, dtype=torch.int32), torch.zeros(num_rows + 1, dtype=torch.int64))

    @staticmethod
    def cat(parts: Sequence[Support]) -> Support:
        """The rows of all parts, one after another."""
        if not parts:
            raise ValueError("parts: expected at least one Support; got none")
        return Support.trusted(
            torch.cat([part.token_ids for part in parts]), offsets_of(torch.cat([p.sizes for p in parts]))
        )

    @staticmethod
    def trusted(token_ids: Tensor, offsets: Tensor) -> Support:
        """Of what is known to be right."""
        made = object.__new__(Support)
        object.__setattr__(made, "token_ids", token_ids)
        object.__setattr__(made, "offsets", offsets)
        return made

    # -- looked at --

    @property
    def num_rows(self) -> int:
        """T."""
        return self.offsets.numel() - 1

    @property
    def sizes(self) -> Tensor:
        """`[T]` tokens of each row; 0 stands for the whole vocabulary."""
        return self.offsets.diff()

    def sizes_in(self, vocab: int) -> Tensor:
        """`[T]` tokens of each row, V where nothing was cut."""
        sizes = self.sizes
        return sizes.masked_fill(sizes == 0, vocab)

    @property
    def nbytes(self) -> int:
        """Memory of both tensors."""
        return self.token_ids.nbytes + self.offsets.nbytes

    def rows_of_ids(self) -> Tensor:
        """`[N]` int64, the row of each id."""
        rows = torch.arange(self.num_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.sizes, output_size=self.token_ids.numel())

    def __getitem__(self, rows: slice | Tensor) -> Support:
        """Some of the rows: a slice, indices `[n]`, or a mask `[T]` bool. (On a GPU indices wait for it once.)"""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.num_rows)
            if step == 1:
                offsets = self.offsets[start : max(stop, start) + 1]
                return Support.trusted(self.token_ids[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])
            rows = torch.arange(start, stop, step, device=self.offsets.device)
        elif rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        return self.taken(rows, int(self.sizes[rows].sum()))

    def taken(self, rows: Tensor, num_ids: int) -> Support:
        """The rows `[n]` int64, of which the host knows how many ids they have: nobody waits."""
        offsets = offsets_of(self.sizes[rows])
        entries = torch.arange(num_ids, device=rows.device)
        shifts = self.offsets[:-1][rows] - offsets[:-1]
        entries += shifts.repeat_interleave(offsets.diff(), output_size=num_ids)
        return Support.trusted(self.token_ids[entries], offsets)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Support:
        """On another device."""
        moved = [tensor.to(device, non_blocking=non_blocking) for tensor in (self.token_ids, self.offsets)]
        return Support.trusted(*moved)


def check_support(support: object, targets: Tensor, mask: Tensor | None) -> None:
    """A Support of the rows of `targets`, with the targets of unmasked rows in it."""
    if not isinstance(support, Support):
        raise ValueError(f"support: expected a Support or None; got {_described(support)}")
    flat, device = targets.reshape(-1), support.token_ids.device
    if support.num_rows != flat.numel() or device != flat.device:
        raise ValueError(
            f"support: expected {flat.numel()} rows on {flat.device}, one a target; got {support.num_rows} on {device}"
        )
    if not checks_values(flat):
        return
    missing = (support.sizes > 0) & (target_places(support, flat) < 0)
    missing = missing if mask is None else missing & mask
    if bool(missing.any()):
        row = int(missing.nonzero()[0])
        place = [int(i) for i in torch.unravel_index(torch.tensor(row), targets.shape)]
        raise ValueError(
            f"support: expected the target of each unmasked row among the row's tokens; got target {int(flat[row])} at "
            f"{place}, which is none of its {int(support.sizes[row])} tokens"
        )


def target_places(support: Support, targets: Tensor) -> Tensor:
    """`[T]` int64: where among the ids of each row its target `[T]` is; -1 where it is not."""
    num_rows, rows = support.num_rows, support.rows_of_ids()
    places = torch.arange(rows.numel(), device=rows.device) - support.offsets[rows]
    hits = support.token_ids == targets[rows]
    # What is no hit goes to a row beyond the last.
    found = places.new_full((num_rows + 1,), -1).scatter_(0, torch.where(hits, rows, num_rows), places)
    return found[:num_rows]


def size_metrics(sizes: Tensor) -> dict[str, float]:
    """For logs, of supports' sizes `[T]`, T > 0: support/mean, support/median (of an even number the lower),
    support/max, and support/singleton_fraction, the share of tokens that could be nothing else."""
    return {
        "support/mean": float(sizes.double().mean()),
        "support/median": float(sizes.median()),
        "support/max": float(sizes.max()),
        "support/singleton_fraction": float((sizes == 1).double().mean()),
    }


def offsets_of(sizes: Tensor) -> Tensor:
    """`[n+1]` int64: where parts of these sizes `[n]` begin, and where the last ends."""
    return torch.cat([sizes.new_zeros(1, dtype=torch.int64), sizes.cumsum(0)])


def _described(value: object) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
