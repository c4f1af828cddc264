"""How fast and how large: seconds, tokens a second, model FLOPs utilisation, peak memory."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Mapping

import torch

_MEMORY = r"(?: \d+GB?)?(?: HBM\d\w?)?"
# Dense bfloat16 tensor-core peaks with float32 accumulation, in TFLOP/s, by the whole of the name that CUDA gives after
# "NVIDIA". From NVIDIA's data sheets, halved where they print only the number with 2:4 sparsity; GeForce cards from the
# architecture white papers (GA102 v2, Ada v2, RTX Blackwell v1).
_PEAK_TFLOPS = {
    rf"GB200{_MEMORY}": 2500.0,  # GB200 NVL72: 360 PFLOP/s sparse over 72
    rf"B200{_MEMORY}": 2250.0,  # HGX B200: 36 PFLOP/s sparse over 8
    rf"GH200{_MEMORY}": 989.5,
    rf"H200{_MEMORY}": 989.5,  # SXM
    rf"H200 NVL{_MEMORY}": 835.5,
    r"H100(?: \d+GB)? HBM3|H100 SXM5.*": 989.5,
    rf"H100 NVL{_MEMORY}": 835.5,
    r"H100 PCIe.*": 756.5,
    r"H800(?: \d+GB)?(?: HBM3)?": 989.5,
    r"H800 PCIe.*": 756.5,
    rf"H20{_MEMORY}": 148.0,
    r"A100[- ].*|A800[- ].*": 312.0,  # SXM4 and PCIe alike
    r"A40": 149.7,
    r"A30": 165.0,
    r"A10": 125.0,
    r"A10G": 70.0,
    r"L40S": 362.05,
    r"L40": 181.05,
    r"L4": 121.0,
    r"RTX 6000 Ada Generation": 364.2,
    r"RTX A6000": 154.8,
    r"GeForce RTX 5090": 209.5,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 3090 Ti": 80.0,
    r"GeForce RTX 3090": 71.0,
}


def is_measured(name: str) -> bool:
    """Whether a metric depends on the machine, so that it differs between two runs that are otherwise equal."""
    return name in ("step_time", "tokens_per_second", "mfu", "peak_memory_gib") or name.startswith("time/")


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s; None for devices that are not known, and for parts of one (MIG)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    if " MIG " in name:
        return None
    return next((tflops * 1e12 for product, tflops in _PEAK_TFLOPS.items() if re.fullmatch(product, name)), None)


def finish(device: torch.device) -> None:
    """Wait for what was launched on the device, so that a clock read next has seen it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def throughput_metrics(
    device: torch.device, *, seconds: Mapping[str, float], step_time: float, num_tokens: int, flops: float
) -> dict[str, float]:
    """Metrics of one step.

    Args:
        seconds: of its parts, logged as `time/<part>`; `update` must be there: logprobs, gradients, clipping and AdamW.
        step_time: seconds of all of it.
        num_tokens: completion tokens that it trained on.
        flops: of the model in its update, AdamW's and the logprobs' own not counted; `mfu` is them over the update's
            whole time.
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
