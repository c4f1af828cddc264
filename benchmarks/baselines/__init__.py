"""Who is measured: this library and its competitors (`CONTENDERS`), and where each of them can take part.

To add one, write a function in `implementations.py` and a row of `CONTENDERS`. A competitor that is not installed is
listed with the reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch

from benchmarks.baselines import implementations
from benchmarks.baselines.implementations import VERL_TORCH, Outcome
from benchmarks.cases import Batch, Case, Scenario
from grpo_fast.backends.base import resolve_backend

__all__ = ["CONTENDERS", "FEW", "MASKED", "ON_SUPPORTS", "SPARSE", "Contender", "Outcome"]

FEW = ("grpo-fast", "TRL eager", "TRL eager bf16")
"""Who is timed where everyone would take too long."""

ON_SUPPORTS = ("grpo-fast", "grpo-fast dense", "grpo-fast torch", "plain log-softmax")
"""Who is timed where rows have supports: `plain` masks full logits, as other trainers do, and "dense" has none."""


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        run: does a scenario's work on a batch.
        logit_bytes: bytes per logit of the `[T, V]` tensors alive at its peak; 0 where it works by blocks of logits.
        block: (rows, columns, bytes a logit) of such a block.
        module: what must import, and `package` the distribution that it comes from.
        padded: takes `[S, L]` batches.
        entropy, softcap: whether it offers entropies and soft-capped logits.
        compiles: calls torch.compile, so its first run says nothing about the others.
        devices: where it runs.
        support: what it makes of cases with supports. "none": it takes no part. "takes": it computes on them. "only":
            that, and takes no part in other cases. "ignores": it does the same tokens' step over the whole vocabulary,
            against which it is checked, and takes no part in other cases.
    """

    name: str
    run: Callable[[Batch], Outcome]
    logit_bytes: float = 0.0
    block: tuple[int, int, int] = (0, 0, 0)
    module: str = "torch"
    package: str = "torch"
    padded: bool = False
    entropy: bool = True
    softcap: bool = True
    compiles: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    support: Literal["none", "takes", "only", "ignores"] = "none"

    def why_missing(self) -> str | None:
        """Why it cannot be imported, or None."""
        return _why_not_importable(self.module)

    @property
    def needs_support(self) -> bool:
        """Whether it takes part in cases with supports only."""
        return self.support in ("only", "ignores")

    def view(self, packed: Batch) -> Batch:
        """A packed batch as it takes it."""
        if self.support == "ignores":
            return packed.dense() if packed.support is not None else packed
        return packed.padded() if self.padded else packed

    def judged_on(self, scenario: Scenario) -> Scenario:
        """The scenario whose results it has to give."""
        return replace(scenario, support=None) if self.support == "ignores" else scenario

    def why_not_offered(self, case: Case, device: str) -> str | None:
        """Why it does not do this case on this device, or None."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if case.scenario.support is not None and self.support == "none":
            return "takes no supports"
        if case.scenario.support is None and self.needs_support:
            return "is for cases with supports"
        if not self.entropy and (not case.scenario.gradient or case.scenario.config.entropy_coef != 0):
            return "has no entropy"
        if not self.softcap and case.model.softcap is not None:
            return "has no soft cap"
        if self.name == "grpo-fast torch" and resolve_backend("auto", torch.device(device)) == "torch":
            return "the same as grpo-fast: torch is the fastest backend present"
        return None

    def peak_bytes(self, case: Case) -> int:
        """A generous estimate of its memory beyond the inputs, for cases that might not fit."""
        rows = case.padded_tokens if self.padded else case.tokens
        block = min(self.block[0], rows) * min(self.block[1], case.model.vocab) * self.block[2]
        head = case.model.vocab * case.model.hidden
        return int(rows * case.model.vocab * self.logit_bytes) + block + 10 * head + 2**29

    def version(self) -> str | None:
        """The installed version of its package."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


@cache
def _why_not_importable(module: str) -> str | None:
    try:
        implementations.load_verl_torch() if module == VERL_TORCH else importlib.import_module(module)
    except Exception as error:  # a competitor's import may fail in any way; the reason is shown in the table
        return f"{type(error).__name__}: {error}"
    return None


# -- the table --------------------------------------------------------------------------------------------------------

SPARSE, MASKED = "grpo-fast (forced sparse)", "grpo-fast (forced masked)"

_OWN: dict[str, Any] = {"package": "grpo-fast", "module": "grpo_fast"}
_TRL: dict[str, Any] = {"module": "trl.trainer.utils", "package": "trl", "padded": True}
_LIGER: dict[str, Any] = {"package": "liger-kernel", "padded": True, "entropy": False, "softcap": False}
_LIGER_FUSED: dict[str, Any] = {**_LIGER, "module": "liger_kernel.chunked_loss", "block": (2048, 4096, 24)}
_CUT: dict[str, Any] = {
    "logit_bytes": 6,
    "module": "cut_cross_entropy",
    "package": "cut-cross-entropy",
    "entropy": False,
    "compiles": True,
}
_CE: dict[str, Any] = {"entropy": False, "softcap": False}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("grpo-fast", lambda b: implementations.own(b, "auto"), support="takes", **_OWN),
        Contender("grpo-fast dense", lambda b: implementations.own(b, "auto"), support="ignores", **_OWN),
        Contender(SPARSE, lambda b: implementations.forced(b, sparse=True), support="only", **_OWN),
        Contender(MASKED, lambda b: implementations.forced(b, sparse=False), support="only", **_OWN),
        Contender("grpo-fast torch", lambda b: implementations.own(b, "torch"), support="takes", **_OWN),
        Contender("plain log-softmax", implementations.plain, logit_bytes=18, support="takes"),
        Contender("TRL eager", lambda b: implementations.trl_eager(b, float32=True), logit_bytes=20, **_TRL),
        Contender("TRL eager bf16", lambda b: implementations.trl_eager(b, float32=False), logit_bytes=11, **_TRL),
        Contender("TRL chunked", implementations.trl_chunked, block=(4096, 32768, 32), **_TRL),
        Contender(
            "Liger fused (compiled)",
            lambda b: implementations.liger_fused(b, whole=False, compiled=True),
            compiles=True,
            **_LIGER_FUSED,
        ),
        Contender(
            "Liger fused (not compiled)",
            lambda b: implementations.liger_fused(b, whole=False, compiled=False),
            **_LIGER_FUSED,
        ),
        Contender(
            "Liger fused (one chunk, not compiled)",
            lambda b: implementations.liger_fused(b, whole=True, compiled=False),
            **_LIGER_FUSED,
        ),
        Contender(
            "Liger Triton",
            implementations.liger_triton,
            logit_bytes=6,
            module="liger_kernel.transformers.grpo_loss",
            devices=("cuda",),
            **_LIGER,
        ),
        Contender(
            "torch linear_cross_entropy",
            implementations.torch_lce,
            module="torch.nn.modules.linear_cross_entropy",
            **_CE,
        ),
        Contender("cut-cross-entropy", implementations.cut_cross_entropy, devices=("cuda",), **_CUT),
        Contender("cut-cross-entropy (torch.compile)", implementations.cut_cross_entropy, devices=("cpu",), **_CUT),
        Contender(
            "QuACK",
            implementations.quack,
            logit_bytes=6,
            module="quack.linear_cross_entropy",
            package="quack-kernels",
            devices=("cuda",),
            **_CE,
        ),
        Contender(
            "verl torch",
            implementations.verl_torch,
            block=(512, 2**20, 24),
            module=VERL_TORCH,
            package="verl",
            softcap=False,
        ),
        Contender(
            "verl Triton",
            implementations.verl_triton,
            module="verl.utils.kernel.linear_cross_entropy",
            package="verl",
            softcap=False,
            devices=("cuda",),
        ),
    )
}
