"""Watch what is allocated: the largest storage and the peak of all that live at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_fast.ops import operators

OPERATORS = {
    op._opoverload: op._init_fn for op in (operators.forward_op, operators.backward_op, operators.objective_op)
}


class AllocationSpy(TorchDispatchMode):
    """Counts the bytes of every storage that a tensor operation makes, in forward and backward.

    Attributes:
        largest: bytes of the largest one, and `largest_shape` of the tensor it came with.
        peak: the most bytes alive at once.
        elements: the most elements of any tensor made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = self.live = self.elements = 0
        self.largest_shape: tuple[int, ...] = ()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATORS:  # look inside our own operators
            with self:
                return OPERATORS[func](*args, **(kwargs or {}))
        given = {id(a.untyped_storage()) for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.seen or size == 0:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.elements = max(self.elements, tensor.numel())
        if size > self.largest:
            self.largest, self.largest_shape = size, tuple(tensor.shape)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size
