"""Which releases of a framework an integration was written for; anything else is refused with what to do."""

from __future__ import annotations

import importlib.metadata
import re


def require(package: str, *, at_least: str, below: str) -> str:
    """The installed version of `package`.

    Raises:
        ImportError: it is not installed, or its version is not in [at_least, below).
    """
    wanted = f"pip install '{package}>={at_least},<{below}'"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not release(at_least) <= release(found) < release(below):
        state = "it is not installed" if found is None else f"found {found}"
        raise ImportError(f"{package}: expected a version from {at_least} to before {below}; {state}. {wanted}")
    return found


def release(version: str) -> tuple[int, ...]:
    """The numbers a version starts with: "1.16.0.dev1" gives (1, 16, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in numbers.group().split(".")) if numbers else ()
