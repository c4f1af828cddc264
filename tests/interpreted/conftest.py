"""Tests that run Triton kernels on the CPU, in a process of their own: triton reads TRITON_INTERPRET=1 when kernels are
defined. Without the variable each file here is one skipped entry and is not imported.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


class NotInterpreted(pytest.File):
    """Stands for a test file in a process that compiles its kernels."""

    def collect(self):
        pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # the usual module
    return NotInterpreted.from_parent(parent, path=module_path)
