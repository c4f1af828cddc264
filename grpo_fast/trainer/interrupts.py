"""Ctrl-C and SIGTERM at any moment, except where state is being changed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupts:
    """Raises KeyboardInterrupt on SIGINT and SIGTERM; inside `shield()` only once that is left.

    Example:
        >>> with Interrupts() as interrupts:
        ...     compute()  # may be cut off anywhere
        ...     with interrupts.shield():
        ...         commit()  # done as a whole
    """

    def __init__(self) -> None:
        self._depth = 0
        self._pending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Run the body as a whole; a signal meanwhile takes effect after it."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._pending and self._depth == 0:
            self._pending = False
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._depth:
            self._pending = True
        else:
            raise KeyboardInterrupt
