"""A second GPU that does not exist: tensors that say they are on it, their memory the CPU's."""

from __future__ import annotations

import torch
from torch import Tensor

CARD = torch.device("cuda", 1)


class OnCard(Tensor):
    """A tensor that says it is on `cuda:1`; what is made of it says so too. Addresses and alignment are real."""

    device = property(lambda self: CARD)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def card(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """Zeros on the card, `offset` elements into their storage."""
    size = torch.Size(shape).numel()
    return torch.zeros(size + offset, dtype=dtype).as_subclass(OnCard)[offset:].view(shape)
