"""How fast and how large: seconds, tokens a second, model FLOPs utilisation, peak memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping

import torch

# Dense bfloat16 tensor-core peaks, in TFLOP/s, by a part of the name that CUDA gives. The longer name goes first.
_PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def is_measured(name: str) -> bool:
    """Whether a metric depends on the machine, so that it differs between two runs that are otherwise equal."""
    return name in ("step_time", "tokens_per_second", "mfu", "peak_memory_gib") or name.startswith("time/")


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s; None for devices that are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS if part in name), None)


def throughput_metrics(
    device: torch.device, *, seconds: Mapping[str, float], step_time: float, num_tokens: int, flops: float
) -> dict[str, float]:
    """Metrics of one step.

    Args:
        seconds: of its parts, logged as `time/<part>`; `update` must be there.
        step_time: seconds of all of it.
        num_tokens: completion tokens that it trained on.
        flops: floating-point operations of its update; the utilisation is that of the update alone.
    """
    metrics = {f"time/{name}": value for name, value in seconds.items()}
    metrics |= {"step_time": step_time, "tokens_per_second": num_tokens / step_time}
    metrics["peak_memory_gib"] = peak_memory_gib(device)
    peak = peak_flops(device)
    if peak is not None:
        metrics["mfu"] = flops / (seconds["update"] * peak)
    return metrics


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far, in GiB: what torch allocated on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
