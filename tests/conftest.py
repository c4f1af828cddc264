"""Poison: memory that torch.empty hands out holds NaN, so reading what nobody wrote fails a test.

With TRITON_INTERPRET=1 "auto" is the triton backend, so that the tests of the losses judge its kernels too.
"""

from __future__ import annotations

import pytest
import torch

from grpo_fast.backends import base as backend
from tests.cases import INTERPRETED

torch.utils.deterministic.fill_uninitialized_memory = True
if INTERPRETED:
    backend._AUTO["cpu"] = ("triton",)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("random", "random configurations (tests/test_random.py)")
    group.addoption("--random-cases", type=int, default=None, metavar="N", help="how many, instead of CI's number")
    group.addoption("--random-seed", type=int, default=0, metavar="SEED", help="which ones")
    group.addoption("--random-case", type=int, action="append", default=[], metavar="NUMBER", help="this one alone")
    group.addoption("--random-device", default=None, metavar="NAMES", help="cpu, stand-in or both: what they run on")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill uninitialised tensors with NaN: `fill_uninitialized_memory` acts in deterministic mode (CPU and CUDA)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
