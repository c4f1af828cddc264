"""Tests on fake CUDA tensors, in a process that tests/test_fake_cuda.py makes believe that there are two cards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


class NoCards(pytest.File):
    """Stands for a test file in a process without the made-up cards."""

    def collect(self):
        pytest.skip("run by tests/test_fake_cuda.py", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if "GRPO_FAST_FAKE_CARDS" in os.environ:
        return None  # the usual module
    return NoCards.from_parent(parent, path=module_path)
