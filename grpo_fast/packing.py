"""Packed sequences: `[T]` tokens of `S` sequences one after another, delimited by `cu_seqlens` `[S+1]`.

Legend: T packed tokens, S sequences, L tokens of a padded row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


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
    lengths = keep.sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return PackedBatch({name: tensor[keep] for name, tensor in tensors.items()}, cu_seqlens, keep)


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
