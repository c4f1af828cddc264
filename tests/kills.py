"""What a kill leaves on the disk, at every moment that it could come."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_OPERATIONS = ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir")


class Killed(BaseException):
    """Nothing that handles errors sees it."""


def killed_everywhere(
    parent: Path, prepare: Callable[[Path], object], action: Callable[[Path], object]
) -> Iterator[Path]:
    """Folders as they are when the process died before the n-th operation of `action` on the file system, every n."""
    for number in itertools.count():
        folder = parent / f"killed-{number}"
        folder.mkdir()
        prepare(folder)
        with pytest.MonkeyPatch.context() as patch:
            left = [number]
            for name in _OPERATIONS:
                patch.setattr(os, name, _dying(getattr(os, name), left))
            try:
                action(folder)
            except Killed:
                pass
            else:
                assert number > 0, "nothing was done"
                return
        yield folder


def _dying(operation: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    """`operation`, until none is left: then it and all after it die (no cleaning up either)."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if left[0] <= 0:
            raise Killed
        left[0] -= 1
        return operation(*args, **kwargs)

    return run
