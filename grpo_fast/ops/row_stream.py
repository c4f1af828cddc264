"""A second stream of a GPU for row functions, beside the products of the caller's.

With two buffers of logits the row functions of one piece run beside the logits product of the next. Events order the
two, the host never waits; what a row function allocates belongs to its stream, and everything has come back to the
caller's stream when the chunk is done, so that the caching allocator and graph capture see one stream forking and
joining. Off unless `call.row_stream_wanted`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

from grpo_fast.devices import TRAITS


@cache
def _side_stream(streams: Any, device: torch.device) -> Any:
    """One stream a device: each has a pool of the allocator's memory to itself. Whoever shares it waits by events."""
    return streams.Stream(device)


class RowStream:
    """See the module. A piece is `before_product`, its product, `after_product` around its row functions, `leave`."""

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        self.streams = TRAITS[device.type].streams
        self.caller = self.streams.current_stream(device)
        self.stream = _side_stream(self.streams, device)
        self.free: list[Any] = [None] * num_buffers

    def before_product(self, buffer: int) -> None:
        """The caller's stream waits until the row functions have left a buffer of logits."""
        event = self.free[buffer]
        if event is not None:
            self.caller.wait_event(event)

    def after_product(self) -> AbstractContextManager[Any]:
        """A context in which kernels run on the second stream, after all that the caller's has been given by now."""
        self.stream.wait_event(self.caller.record_event())
        context: AbstractContextManager[Any] = self.streams.stream(self.stream)
        return context

    def leave(self, buffer: int) -> None:
        """The row functions of a buffer have all been given."""
        self.free[buffer] = self.stream.record_event()

    def join(self) -> None:
        """The caller's stream goes on when the second one is done."""
        self.caller.wait_stream(self.stream)
