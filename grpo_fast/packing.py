"""Packed sequences: `[T]` tokens of `S` sequences one after another, delimited by `cu_seqlens` `[S+1]`.

Legend: T packed tokens, S sequences, B x L the padded layout. Sequence-level quantities are segment reductions over
`cu_seqlens`; nothing is ever padded to the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


class Segments:
    """Which sequence each packed token belongs to, with the reductions that need to know.

    Args:
        cu_seqlens: `[S+1]` integers on the tokens' device; sequence s is tokens `cu_seqlens[s]:cu_seqlens[s+1]`.
        num_tokens: T.

    Attributes:
        lengths: tokens per sequence, `[S]` int64.
        index: the sequence of each token, `[T]` int64. Both are computed when first asked for.
    """

    def __init__(self, cu_seqlens: Tensor, num_tokens: int) -> None:
        self.cu_seqlens = cu_seqlens.to(torch.int64)
        self.num_tokens = num_tokens
        self.num_sequences = cu_seqlens.numel() - 1
        self._lengths: Tensor | None = None
        self._index: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        if self._lengths is None:
            self._lengths = self.cu_seqlens[1:] - self.cu_seqlens[:-1]
        return self._lengths

    @property
    def index(self) -> Tensor:
        if self._index is None:
            numbers = torch.arange(self.num_sequences, device=self.cu_seqlens.device)
            self._index = torch.repeat_interleave(numbers, self.lengths, output_size=self.num_tokens)
        return self._index

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` `[T]` over each sequence, `[S]`; accumulated in float64, 0 for empty sequences."""
        dtype = values.dtype if values.is_floating_point() else torch.int64
        if self.num_sequences == 0:
            return values.to(dtype)  # empty, and still on the graph
        total = torch.segment_reduce(values.double(), "sum", lengths=self.lengths, initial=0.0, unsafe=True)
        return total.to(dtype)

    def spread(self, values: Tensor) -> Tensor:
        """Give each token its sequence's value: `[S]` to `[T]`."""
        return _Spread.apply(values, self.index, self.lengths)  # type: ignore[no-any-return]

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """Mean of `values` `[T]` over the unmasked tokens of each sequence, `[S]`; 0 where there is none."""
        return self.sum(torch.where(mask, values, 0.0)) / self.sum(mask).clamp(min=1)


class _Spread(torch.autograd.Function):
    """`values[index]`, whose backward is a segment sum: an indexed add would be atomic, so not repeatable, on a GPU."""

    @staticmethod
    def forward(ctx, values: Tensor, index: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(lengths)
        return values[index]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (lengths,) = ctx.saved_tensors
        total = torch.segment_reduce(grad.double(), "sum", lengths=lengths, initial=0.0, unsafe=True)
        return total.to(grad.dtype), None, None


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
