"""Poison: memory that torch.empty hands out holds NaN, so reading what nobody wrote fails a test."""

from __future__ import annotations

import pytest
import torch

torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill uninitialised tensors with NaN: `fill_uninitialized_memory` acts in deterministic mode (CPU and CUDA)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
