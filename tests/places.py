"""Where tests of a GPU run: on one, with each backend there, or on its stand-in (tests/stand_in.py), which CI has.

    @pytest.fixture... place      "cuda-triton", "cuda-cuda", "cuda-torch", "stand-in"
    with place.on(tile_rows=16): out = grpo_loss(..., backend=place.backend)

`pytest -m gpu` selects those on a GPU; without one they are skipped, and say so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from grpo_fast.backends.base import get_backend
from grpo_fast.ops.call import tuning
from tests.cases import INTERPRETED
from tests.stand_in import stand_in

TILE = 16


@dataclass(frozen=True)
class Place:
    """A backend on a device. `stand_in`: the device is a model on the CPU."""

    device: torch.device
    backend: str
    stand_in: bool

    @contextmanager
    def on(self, *, tile_rows: int | None = None, row_stream: bool | None = None) -> Iterator[Waits]:
        """What is inside runs on the device; yields who waited there. Arguments: of `call.tuning`."""
        waits = Waits([])
        if self.stand_in:
            with stand_in(tile_rows=tile_rows, row_stream=bool(row_stream)) as device:
                yield waits
            waits.names.extend(device.waits)
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with (
                tuning(tile_rows=tile_rows, row_stream=row_stream),
                warnings.catch_warnings(record=True) as seen,
            ):
                warnings.simplefilter("always")
                yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
        for warning in seen:
            if "called a synchronizing" in str(warning.message):
                waits.names.append(str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def workspace(self, vocab: int, dtype: torch.dtype, *, rows: int) -> int:
        """Bytes for a tile of `TILE` rows of logits and `rows` of dx beside it, or for `rows` of both in one place."""
        engine = get_backend(self.backend)
        pitch = engine.row_pitch(vocab)
        with self.on():
            scratch = engine.scratch_bytes(vocab, dtype, self.device)
        beside = TILE * pitch * 4 + rows * pitch * dtype.itemsize
        return scratch + (beside if engine.stages_dx else rows * pitch * 4)


@dataclass
class Waits:
    """Names of what made the host wait for the device."""

    names: list[str]


def _on_gpu(backend: str) -> Any:
    return pytest.param(("cuda", backend), id=f"cuda-{backend}", marks=pytest.mark.gpu)


GPU_PLACES = [_on_gpu(backend) for backend in ("triton", "cuda", "torch")]
STAND_IN = pytest.param(("cpu", "triton" if INTERPRETED else "torch"), id="stand-in")
PLACES = [*GPU_PLACES, STAND_IN]


def place_of(parameter: tuple[str, str]) -> Place:
    """The place, or a skip that says what is missing."""
    kind, backend = parameter
    if kind == "cpu":
        return Place(torch.device("cpu"), backend, stand_in=True)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    reason = get_backend(backend).why_unavailable(device)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return Place(device, backend, stand_in=False)
