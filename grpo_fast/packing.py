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
        token_ids: `[N]` int32 or int64, below 2^31, row after row; those of a row are distinct, in any order.
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
        if (wrong := self.offsets_error(*self.extremes().tolist())) is not None:
            raise ValueError(wrong)
        outside = (self.token_ids < 0) | (self.token_ids.long() >= 2**31)
        if outside.any():
            raise ValueError(f"token_ids: expected ids in [0, 2^31); got {int(self.token_ids[outside][0])}")
        keys = (self.rows_of_ids().long() << 32 | self.token_ids.long()).sort().values
        twice = (keys[1:] == keys[:-1]).nonzero()
        if twice.numel():
            row, token = divmod(int(keys[twice[0, 0]]), 2**32)
            raise ValueError(f"token_ids: expected distinct ids in a row; got {token} twice in row {row}")

    # -- made of what samplers have --

    @staticmethod
    def from_mask(mask: Tensor) -> Support:
        """Of `[..., V]` bool, True where a token is kept; leading dimensions are flattened.

        A row without any True stands for the whole vocabulary, as a row that is all True does: give as many columns
        as the head's weight has rows (False where it is padded), or such a row will be of more tokens than there were.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() < 2:
            raise ValueError(f"mask: expected a bool tensor [..., V]; got {_described(mask)}")
        mask = mask.flatten(0, -2)
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
        ids = ids.flatten(0, -2)
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
        for part in parts:
            require_support("parts", part)
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

    def extremes(self) -> Tensor:
        """`[3]` int64: the first of the offsets, the last, and the smallest size (0 of no rows)."""
        offsets = self.offsets.long()
        return torch.stack([offsets[0], offsets[-1], offsets.diff().amin() if self.num_rows else 0 * offsets[0]])

    def offsets_error(self, first: int, last: int, smallest: int) -> str | None:
        """What is wrong with offsets of these `extremes`, or None."""
        num_ids = self.token_ids.numel()
        if first == 0 and last == num_ids and smallest >= 0:
            return None
        return (
            f"offsets: expected 0 = offsets[0] <= offsets[1] <= ... <= offsets[T] = N = {num_ids}; got {first} first, "
            f"{last} last" + (", and a step down" if smallest < 0 else "")
        )

    def rows_of_ids(self) -> Tensor:
        """`[N]` int64, the row of each id."""
        # How many rows have begun, counted: whatever the offsets are, these are rows of this support.
        begun = self.offsets.new_zeros(self.token_ids.numel() + 1, dtype=torch.int64)
        starts = self.offsets[1:-1].long().clamp(0, self.token_ids.numel())
        return begun.scatter_add_(0, starts, torch.ones_like(starts)).cumsum_(0)[:-1]

    def __getitem__(self, rows: slice | Tensor) -> Support:
        """Some of the rows: a slice, indices `[n]`, or a mask `[T]` bool. (On a GPU indices wait for it once.)

        Raises:
            ValueError: anything else.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.num_rows)
            if step == 1:
                offsets = self.offsets[start : max(stop, start) + 1]
                return Support.trusted(self.token_ids[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])
            rows = torch.arange(start, stop, step, device=self.offsets.device)
        elif not isinstance(rows, Tensor) or rows.dim() != 1 or rows.is_floating_point():
            raise ValueError(f"rows: expected a slice, indices [n] or a mask [T] bool; got {_described(rows)}")
        elif rows.dtype == torch.bool:
            if rows.numel() != self.num_rows:
                raise ValueError(f"rows: expected a mask of {self.num_rows} rows; got {rows.numel()}")
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

    def on_host(self) -> Support:
        """As it is kept until it is trained on: on the CPU, ids int32.

        Raises:
            ValueError: malformed, where that could not be seen on the device that it comes from.
        """
        moved = self if self.offsets.device.type == "cpu" else Support(self.token_ids.cpu(), self.offsets.cpu())
        return Support.trusted(moved.token_ids.int(), moved.offsets)


def require_support(name: str, value: object) -> Support:
    """Or an error with its name."""
    if not isinstance(value, Support):
        raise ValueError(f"{name}: expected a Support; got {_described(value)}")
    return value


def check_support(support: object, targets: Tensor, mask: Tensor | None) -> None:
    """A Support of the rows of `targets`, with the targets of unmasked rows in it."""
    support = require_support("support", support)
    flat, device = targets.reshape(-1), support.token_ids.device
    if support.num_rows != flat.numel() or device != flat.device:
        raise ValueError(
            f"support: expected {flat.numel()} rows on {flat.device}, one a target; got {support.num_rows} on {device}"
        )
    if not checks_values(flat):
        return
    # They may have changed since the support was made.
    if (wrong := support.offsets_error(*support.extremes().tolist())) is not None:
        raise ValueError(f"support.{wrong}")
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
