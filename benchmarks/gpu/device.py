"""What the harness asks of a GPU, in one place: time, memory, facts. `CudaDevice` asks torch, `StandIn` a model of one.

Nothing else in this folder names `torch.cuda`, so that everything else runs on a machine without a GPU.
"""

from __future__ import annotations

import re
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import PeakMemory
from grpo_fast.backends import base as backends

Action = Callable[[], Any]
SMI_FIELDS = (
    "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu", "clocks_throttle_reasons.active",
)  # fmt: skip
# Cycles of an idle kernel that keeps the GPU busy while the host enqueues what is timed: about 2 ms, five launches
# of a Triton kernel from Python and more.
HEAD_START_CYCLES = 4_000_000


class Device(ABC):
    """A device to measure. Times are seconds, memory is bytes.

    Attributes:
        torch: where tensors live. stand_in: whether the numbers mean nothing.
        slow: backends that take seconds a step here, and are only shown to run.
    """

    torch: torch.device
    stand_in: bool
    slow: frozenset[str] = frozenset()

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Name, driver, multiprocessors, L2 and memory; the same for every run on this device."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Clocks, temperature, power and throttling, now."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for the device; raises if something on it went wrong."""

    @abstractmethod
    def timed(self, action: Action, *, queued: bool = False) -> float:
        """Seconds of an action on the device.

        Args:
            queued: the action's kernels wait behind others, so that what the host does in between is not counted: for
                kernels. Otherwise the device is idle before: for whole steps, as far as their launches keep up or not.
        """

    @abstractmethod
    def peak(self, action: Action) -> tuple[Any, int | None]:
        """(result, most bytes held during an action beyond those before it)."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that could be allocated."""

    @abstractmethod
    def clear_cache(self) -> None:
        """Overwrite the L2 cache, and what the allocator keeps stays where it is."""

    @abstractmethod
    def release(self) -> None:
        """Give memory that nothing uses back to the device."""

    @abstractmethod
    def environment(self) -> AbstractContextManager[Any]:
        """A context in which the library takes `torch` for a GPU."""

    def backends(self) -> dict[str, str | None]:
        """Name: why it does not run here, or None; the one that "auto" takes first."""
        first = backends.resolve_backend("auto", self.torch)
        names = dict.fromkeys((first, "triton", "cuda", "torch"))
        return {name: backends.get_backend(name).why_unavailable(self.torch) for name in names}

    @property
    def slug(self) -> str:
        """The device's name as a folder's."""
        return re.sub(r"[^a-z0-9]+", "-", str(self.facts()["gpu"]).lower()).strip("-")


class CudaDevice(Device):
    """The current GPU: events, the allocator's statistics, nvidia-smi."""

    stand_in = False

    def __init__(self, index: int = 0) -> None:
        self.torch = torch.device("cuda", index)
        torch.cuda.set_device(self.torch)
        self._flush: Tensor | None = None

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.torch)
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "memory_bytes": properties.total_memory,
            "gpus": torch.cuda.device_count(),
            "driver": self._ask("driver_version"),
            "cuda": torch.version.cuda,
        }

    def state(self) -> dict[str, Any]:
        answer = self._ask(",".join(SMI_FIELDS))
        return {} if answer is None else dict(zip(SMI_FIELDS, answer.split(", "), strict=False))

    def _ask(self, fields: str) -> str | None:
        """What nvidia-smi says of this GPU, or None where it cannot be asked. It only reads."""
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={self._smi_id()}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None

    def _smi_id(self) -> str:
        """torch numbers the visible GPUs, nvidia-smi all of them."""
        uuid = getattr(torch.cuda.get_device_properties(self.torch), "uuid", None)
        return str(self.torch.index) if uuid is None else f"GPU-{uuid}"

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch)

    def timed(self, action: Action, *, queued: bool = False) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        if queued:
            torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        action()
        end.record()
        self.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def peak(self, action: Action) -> tuple[Any, int | None]:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.torch)
        before = torch.cuda.memory_allocated(self.torch)
        result = action()
        self.synchronize()
        return result, torch.cuda.max_memory_allocated(self.torch) - before

    def free_bytes(self) -> int:
        free = torch.cuda.mem_get_info(self.torch)[0]
        return free + torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)

    def clear_cache(self) -> None:
        if self._flush is None:
            size = 4 * (self.facts()["l2_bytes"] or 2**26)
            self._flush = torch.empty(size, dtype=torch.int8, device=self.torch)
        self._flush.zero_()

    def release(self) -> None:
        torch.cuda.empty_cache()

    def environment(self) -> AbstractContextManager[Any]:
        return nullcontext()


class StandIn(Device):
    """The CPU in a GPU's place (tests/stand_in.py): the library takes a GPU's branches, the times mean nothing."""

    stand_in = True
    slow = frozenset({"triton"})  # the interpreter

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        self.memory = PeakMemory()

    def facts(self) -> dict[str, Any]:
        return {
            "gpu": "stand-in",
            "capability": "9.0",
            "multiprocessors": 132,
            "l2_bytes": 2**20,
            "memory_bytes": 2**34,
            "gpus": 1,
            "driver": None,
            "cuda": None,
        }

    def state(self) -> dict[str, Any]:
        return {}

    def synchronize(self) -> None:
        pass

    def timed(self, action: Action, *, queued: bool = False) -> float:
        start = time.perf_counter()
        action()
        return max(time.perf_counter() - start, 1e-9)

    def peak(self, action: Action) -> tuple[Any, int | None]:
        self.memory.start()
        return action(), self.memory.stop()

    def free_bytes(self) -> int:
        return 2**30

    def clear_cache(self) -> None:
        pass

    def release(self) -> None:
        pass

    def environment(self) -> AbstractContextManager[Any]:
        from tests.stand_in import stand_in

        return stand_in()

    def backends(self) -> dict[str, str | None]:
        """`cpu` is no GPU's; with TRITON_INTERPRET=1 the Triton kernels run."""
        names = ("triton", "cuda", "torch")
        return {name: backends.get_backend(name).why_unavailable(self.torch) for name in names}


def the_device(*, stand_in: bool) -> Device:
    """The GPU, or its stand-in.

    Raises:
        SystemExit: there is no GPU, with the reason.
    """
    if stand_in:
        return StandIn()
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "sees no driver or GPU"
        raise SystemExit(
            f"make gpu: needs a CUDA device; torch {torch.__version__} {why}. --stand-in runs without one."
        )
    return CudaDevice()
