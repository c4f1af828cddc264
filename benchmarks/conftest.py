"""Options and marks of the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# `pytest benchmarks/` must find `benchmarks.cases` too; last, so that nothing installed is hidden by the repository.
ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.append(ROOT)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--contenders", help="comma-separated names of benchmarks/baselines; default: a test's own")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the CPU selection of `make bench`")


@pytest.fixture
def contenders(request: pytest.FixtureRequest) -> list[str] | None:
    """The names given on the command line, or None."""
    names = request.config.getoption("--contenders")
    return None if names is None else [name.strip() for name in names.split(",")]
