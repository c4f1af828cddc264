"""`grpo-fast doctor`: what is installed, which backends work here, why others do not, and whether the former are right.

Right means: loss, logprobs and every gradient of a small head agree with the float64 oracle (`grpo_fast.reference`), in
float32, bfloat16 and float16, in one chunk of rows and in several, whose dWeight products add up.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast import __version__
from grpo_fast.backends import cpu as cpu_backend
from grpo_fast.backends import cuda as cuda_backend
from grpo_fast.backends.base import BackendName, backend_names, get_backend, resolve_backend
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.install import install_command
from grpo_fast.loss import grpo_loss
from grpo_fast.ops.call import workspace_for
from grpo_fast.reference import reference_loss

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative RMS error that a result in this dtype may have: a few roundings. Losses and logprobs are always float32."""
NUM_TOKENS, WIDTH, VOCAB = 48, 64, 1003
CONFIG = LossConfig(beta=0.05, entropy_coef=0.01)
HEAD = HeadConfig(softcap=20.0)


@dataclass(frozen=True)
class Verdict:
    """On one backend and device. `ok` None: it does not run there; `text` says why, how far off, or what went wrong."""

    backend: str
    ok: bool | None
    text: str


def doctor() -> tuple[list[str], bool]:
    """The report's lines, and whether every backend that runs here is right."""
    lines = ["installed", *_indented(_installed()), "devices", *_indented(_devices())]
    sound = True
    for device in _usable_devices():
        chosen = resolve_backend("auto", device)
        lines.append(f"backends on {device}")
        for name in backend_names():
            verdict = examine(name, device)
            sound = sound and verdict.ok is not False
            word = {True: "works", False: "WRONG", None: "no"}[verdict.ok]
            auto = "  <- auto" if name == chosen else ""
            lines.append(f"  {name:<7} {word}: {verdict.text}{auto}")
    return lines, sound


def examine(name: BackendName, device: torch.device) -> Verdict:
    """Run a small loss through the backend and compare it with the oracle."""
    reason = get_backend(name).why_unavailable(device)
    if reason is not None:
        return Verdict(name, None, reason)
    start, worst = time.perf_counter(), []
    for dtype in BOUNDS:
        largest = 0.0
        for several in (False, True):
            where = f"{dtype}, {'several chunks' if several else 'one chunk'}"
            try:
                errors = compare(name, device, dtype, several_chunks=several)
            except Exception as trouble:  # whatever a broken installation throws is what the report is for
                return Verdict(name, False, f"{where}: {type(trouble).__name__}: {trouble}")
            for what, (error, bound) in errors.items():
                if not error <= bound:
                    rounding = f"at most {bound:.0e} is rounding"
                    return Verdict(name, False, f"{where}: {what} is off by {error:.1e} ({rounding})")
            largest = max(largest, *(error for error, _ in errors.values()))
        worst.append(f"{largest:.0e} in {str(dtype).removeprefix('torch.')}")
    return Verdict(name, True, f"off by at most {', '.join(worst)} ({time.perf_counter() - start:.1f} s)")


def compare(
    name: BackendName, device: torch.device, dtype: torch.dtype, *, several_chunks: bool = False
) -> dict[str, tuple[float, float]]:
    """Relative RMS errors of loss, logprobs and gradients against the oracle on the same inputs, with their bounds."""
    given = _inputs(device, dtype)
    ours, exact = (_leaves(given, kind) for kind in (dtype, torch.float64))
    out = grpo_loss(
        ours["hidden"],
        ours["weight"],
        given["targets"],
        given["advantages"],
        bias=ours["bias"],
        head=HEAD,
        config=CONFIG,
        backend=name,
        cu_seqlens=given["cu_seqlens"],
        old_logprobs=given["old_logprobs"],
        ref_logprobs=given["ref_logprobs"],
        # The least: a third of the rows at a time.
        workspace_bytes=workspace_for(name, VOCAB, dtype, device) if several_chunks else None,
    )
    out.loss.backward()
    oracle = reference_loss(
        exact["hidden"],
        exact["weight"],
        given["targets"],
        given["advantages"].double(),
        bias=exact["bias"],
        head=HEAD,
        config=CONFIG,
        cu_seqlens=given["cu_seqlens"],
        old_logprobs=given["old_logprobs"].double(),
        ref_logprobs=given["ref_logprobs"].double(),
    )
    oracle.loss.backward()
    pairs = [("loss", out.loss, oracle.loss), ("logprobs", out.logprobs, oracle.logprobs)]
    pairs += [(f"gradient of {key}", _gradient(ours[key]), _gradient(exact[key])) for key in ours]
    return {key: (_relative_rms(actual, expected), BOUNDS[actual.dtype]) for key, actual, expected in pairs}


def _inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Four sequences of packed tokens, a vocabulary that no vector length divides; the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device)

    logprobs = normal(NUM_TOKENS, scale=0.5) - 9.0  # about what the logits give: some ratios are clipped
    return {
        "hidden": normal(NUM_TOKENS, WIDTH, scale=0.3).to(dtype),
        "weight": normal(VOCAB, WIDTH).to(dtype),
        "bias": normal(VOCAB, scale=0.5).to(dtype),
        "targets": torch.randint(0, VOCAB, (NUM_TOKENS,), generator=generator).to(device),
        "advantages": normal(4),
        "cu_seqlens": torch.tensor([0, 13, 14, 30, NUM_TOKENS], device=device),
        "old_logprobs": logprobs,
        "ref_logprobs": logprobs + normal(NUM_TOKENS, scale=0.1),
    }


def _leaves(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: given[key].to(dtype, copy=True).requires_grad_() for key in ("hidden", "weight", "bias")}


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _relative_rms(actual: Tensor, expected: Tensor) -> float:
    error = (actual.detach().double() - expected.detach()).square().mean().sqrt()
    return float(error / expected.detach().square().mean().sqrt())


# -- what there is ----------------------------------------------------------------------------------------------------


def _usable_devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _installed() -> list[str]:
    versions = [f"grpo-fast {__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    triton = _version("triton")
    versions.append("no triton" if triton is None else f"triton {triton}")
    native: Any = cpu_backend.native()
    lines = [", ".join(versions)]
    if native is None:
        lines.append("grpo_fast._C: not built (the backend's line below says why)")
    else:
        lines.append(f"grpo_fast._C: built, {native.isa()} instructions here")
        lines += _native_products()
    built: Any = cuda_backend.native()
    build = f"GRPO_FAST_CUDA=1 {install_command()}"
    lines.append(
        f"grpo_fast._cuda: not built; with NVIDIA's nvcc, {build} builds it or shows why not"
        if built is None
        else f"grpo_fast._cuda: built for {built.ARCHITECTURES}"
    )
    return [*lines, *_extras()]


def _native_products() -> list[str]:
    """A line for each narrow dtype: who multiplies it on this CPU."""
    lines = []
    for dtype in (torch.bfloat16, torch.float16):
        obstacle = cpu_backend.gemm_obstacle(dtype)
        who = "the micro-kernel in torch's CPU library" if obstacle is None else f"torch, slower: {obstacle}"
        lines.append(f"cpu products of {str(dtype).removeprefix('torch.')}: {who}")
    return lines


def _extras() -> list[str]:
    """A line for each extra of the package: complete, or what it lacks."""
    try:
        required = importlib.metadata.requires("grpo-fast") or []
    except importlib.metadata.PackageNotFoundError:
        return ["grpo-fast is run from its sources, not installed: its extras are not known"]
    lacking: dict[str, list[str]] = {}
    for requirement in required:
        extra, name = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement), re.match(r"[\w.-]+", requirement)
        if extra and name:
            missing = lacking.setdefault(extra[1], [])
            if _version(name[0]) is None:
                missing.append(name[0])
    return [
        f"extra {extra}: " + (f"lacks {', '.join(names)}; {install_command(extra)}" if names else "complete")
        for extra, names in lacking.items()
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    lines = [f"cpu: {model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i}: {facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
    if len(lines) == 1:
        cuda = torch.version.cuda
        why = (
            "torch is built without CUDA"
            if cuda is None
            else f"torch is built for CUDA {cuda} and sees no driver or GPU"
        )
        lines.append(f"no GPU: {why}")
    return lines


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
