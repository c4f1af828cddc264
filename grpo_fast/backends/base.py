"""What a backend supplies: two GEMM shapes and two row functions on a chunk of logits; and the table of backends.

Legend: R rows of a chunk, V vocabulary (or a block of it), H hidden size. For row t with raw product x_t = h_t W^T:

    z_t = softcap(logit_scale (x_t + bias)) / temperature_t
    lse_t = log sum_v exp z_tv         logprob_t = z_t[y_t] - lse_t        entropy_t = lse_t - sum_v p_tv z_tv
    dx_tv = (g_t (1[v = y_t] - p_tv) - e_t p_tv (log p_tv + entropy_t)) / temperature_t * softcap' * logit_scale

To add a backend: subclass `Backend` in a file of its own and add a row to `_FACTORIES`. What it may ask of a device is
in `devices.py`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.backends.devices import traits
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.objectives import Tokens, objective, total_loss

logger = logging.getLogger("grpo_fast")


@dataclass(frozen=True)
class Transform:
    """From raw products to logits: bias, then logit_scale and soft cap, then temperature.

    Attributes:
        head: scale and soft cap.
        bias: `[V]` in the weight's dtype, or None.
        temperature: a float, or `[R]` float32, one a row.
    """

    head: HeadConfig
    bias: Tensor | None
    temperature: float | Tensor

    def rows(self, rows: slice | Tensor) -> Transform:
        """The same transform for some of the rows."""
        return replace(self, temperature=self.temperature[rows]) if isinstance(self.temperature, Tensor) else self

    def vocab_block(self, start: int, stop: int) -> Transform:
        """The same transform for columns `start:stop`."""
        return self if self.bias is None else replace(self, bias=self.bias[start:stop])


@dataclass(frozen=True)
class RowChunk:
    """Rows of raw products, as every row function gets them.

    Attributes:
        logits: raw products `[R, V]`. targets: `[R]` int64. transform: of these rows.
        vocab_start: the vocabulary index of column 0, when the chunk holds a block of the vocabulary.
    """

    logits: Tensor
    targets: Tensor
    transform: Transform
    vocab_start: int = 0


class RowStatistics(NamedTuple):
    """What is known of rows once their logits are: `[R]` each, in the logits' dtype, nats; parts of buffers."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


class ObjectiveResults(NamedTuple):
    """What the row pass of an objective says of rows besides dx: `[R]` each; `live` bool, rows whose dx is not zero."""

    logprobs: Tensor
    entropy: Tensor
    live: Tensor


@dataclass(frozen=True)
class RowSlopes:
    """What the gradient needs to know of rows: their statistics, and the loss's derivatives.

    Attributes:
        lse, entropy: `[R]`.
        g, e: `[R]` gradients of the loss in logprob and entropy (e None: zero). Rows with both zero give zeros.
    """

    lse: Tensor
    entropy: Tensor
    g: Tensor
    e: Tensor | None

    def part(self, rows: slice) -> RowSlopes:
        """Those of some of the rows."""
        return RowSlopes(self.lse[rows], self.entropy[rows], self.g[rows], None if self.e is None else self.e[rows])


@dataclass(frozen=True)
class RowObjective:
    """The loss of rows, and what it reads of them besides their logits.

    Attributes:
        tokens: of the rows. weights: `[R]`, of their terms in the loss. config: which loss.
        grad_scale: multiplies dx (float16 operands would lose small gradients otherwise).
    """

    tokens: Tokens
    weights: Tensor
    config: LossConfig
    grad_scale: float | Tensor


class Backend(ABC):
    """GEMMs and row functions on a chunk of logits. All methods are deterministic and read no host value back.

    A row's results depend neither on its position nor on the other rows, as long as `tile_rows` is the same: that is
    what makes old, current and reference passes agree bit for bit.
    """

    name: str
    stages_dx: bool = False
    """Whether dx goes to memory of its own where it can, so that the backward GEMMs span several tiles of logits."""

    has_fused_forward: bool = False

    @abstractmethod
    def why_unavailable(self, device: torch.device) -> str | None:
        """None if the backend runs on `device`; otherwise the reason, and how to get it."""

    @abstractmethod
    def scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        """Temporary memory of the row functions and GEMMs, besides the chunk of logits itself."""

    def preferred_tile_rows(self, dtype: torch.dtype, device: torch.device) -> int:
        """Rows of one logits GEMM, before the workspace cap: a power of two."""
        return traits(device).tile_rows

    def row_pitch(self, vocab: int) -> int:
        """Elements from one row of logits or dx to the next."""
        return vocab

    def new_buffer(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory on the device of `like` for what has a row or column for every vocabulary entry."""
        return like.new_empty(shape, dtype=dtype)

    # -- GEMMs -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor, tile_rows: int) -> None:
        """out `[R, V]` float32 = hidden `[R, H]` @ weight `[V, H]`^T, unrounded; in GEMMs of exactly `tile_rows`."""

    @abstractmethod
    def grad_hidden(self, dx: Tensor, weight: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        """out `[R, H]` float32 = dx `[R, V]` @ weight `[V, H]`, added to what is there if `accumulate`."""

    @abstractmethod
    def grad_weight(self, dx: Tensor, hidden: Tensor, out: Tensor, base: Tensor | None) -> None:
        """out `[V, H]` = base + dx `[R, V]`^T @ hidden `[R, H]`, rounded once to the dtype of `out`.

        `base` `[V, H]` is float32 and may be overwritten; None stands for zero. It is often `out` itself.
        """

    # -- row functions -----------------------------------------------------------------------------------------------

    @abstractmethod
    def statistics(self, rows: RowChunk, out: RowStatistics | None = None) -> RowStatistics:
        """Statistics of the rows, written to `out` if given; the raw products stay as they are.

        The logprob of a target outside the vocabulary is NaN.
        """

    @abstractmethod
    def gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """dx `[R, V]`, written to `out`, or over the raw products `[R, V]`.

        Args:
            dtype: of the GEMM operands that dx will meet; over the products, dx may be a narrower view of their memory.
            out: `[R, V]` in that dtype, or None.
        """

    def objective_rows(
        self,
        rows: RowChunk,
        objective: RowObjective,
        *,
        dtype: torch.dtype,
        out: Tensor | None = None,
        results: ObjectiveResults | None = None,
    ) -> tuple[Tensor, ObjectiveResults]:
        """The whole row pass: statistics, the objective's derivative, dx.

        A backend whose kernel does the three in one sweep overrides it for token-local objectives.

        Args:
            dtype, out: as in `gradient`.
            results: where the results go; None: new tensors.

        Returns:
            dx `[R, V]` and the results.
        """
        results = new_results(rows) if results is None else results
        statistics = RowStatistics(results.logprobs, results.entropy, torch.empty_like(results.entropy))
        logprobs, entropy, lse = self.statistics(rows, statistics)
        g, e = objective_derivative(logprobs, entropy, objective.tokens, objective.weights, objective.config)
        torch.ne(g, 0, out=results.live)
        if e is not None:
            results.live.logical_or_(e != 0)
        scale = objective.grad_scale
        slopes = RowSlopes(lse, entropy, _scaled(g, scale), None if e is None else _scaled(e, scale))
        return self.gradient(rows, slopes, dtype=dtype, out=out), results

    def scale(self, gradient: Tensor, factor: Tensor) -> Tensor:
        """gradient * factor (0-dim), in place."""
        return gradient.mul_(factor)

    def fused_forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, transform: Transform
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logprobs, entropy, lse) `[T]` without logits in memory, for backends with `has_fused_forward`."""
        raise NotImplementedError(f"{self.name} has no fused forward")


def new_statistics(rows: RowChunk) -> RowStatistics:
    """Memory for the statistics of rows."""
    return RowStatistics(*(rows.logits.new_empty(rows.logits.shape[0]) for _ in range(3)))


def new_results(rows: RowChunk) -> ObjectiveResults:
    """Memory for the results of an objective's row pass."""
    logits, num_rows = rows.logits, rows.logits.shape[0]
    live = logits.new_empty(num_rows, dtype=torch.bool)
    return ObjectiveResults(logits.new_empty(num_rows), logits.new_empty(num_rows), live)


def _scaled(values: Tensor, scale: float | Tensor) -> Tensor:
    return values if isinstance(scale, float) and scale == 1.0 else values * scale


@contextmanager
def _autograd_inside_operator() -> Iterator[None]:
    """Record a graph inside a custom operator, which runs below autograd: the dispatcher hides it from there."""
    keys = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        yield


def objective_derivative(
    logprobs: Tensor, entropy: Tensor, tokens: Tokens, weights: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor | None]:
    """(d loss / d logprobs, d loss / d entropy or None) `[T]`, by autograd through the objective's formula."""
    with _autograd_inside_operator():
        logprobs = logprobs.detach().requires_grad_()
        entropy = entropy.detach().requires_grad_(config.entropy_coef != 0)
        loss = total_loss(objective(logprobs, entropy, tokens, config), entropy, weights, config)
        inputs = [logprobs] + [entropy] * entropy.requires_grad
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return grads[0], grads[1] if entropy.requires_grad else None


# -- the table --------------------------------------------------------------------------------------------------------

# name: (module, class). Modules load when first asked for.
_FACTORIES: dict[str, tuple[str, str]] = {
    "triton": ("grpo_fast.backends.triton", "TritonBackend"),
    "cpu": ("grpo_fast.backends.cpu", "CpuBackend"),
    "torch": ("grpo_fast.backends.torch", "TorchBackend"),
    "cuda": ("grpo_fast.backends.cuda", "CudaBackend"),  # by name only: unmeasured
}
# What "auto" takes on a kind of device: the first that is available there.
_AUTO = {"cuda": ("triton", "torch"), "cpu": ("cpu", "torch")}
_announced: set[tuple[str, str]] = set()


def backend_names() -> tuple[str, ...]:
    """Names that `backend=` accepts besides "auto"."""
    return tuple(_FACTORIES)


@cache
def get_backend(name: str) -> Backend:
    """The backend called `name`; `resolve_backend` has checked that it exists."""
    module, attribute = _FACTORIES[name]
    backend: Backend = getattr(import_module(module), attribute)()
    return backend


@torch.compiler.assume_constant_result  # looked up while tracing, not traced
def resolve_backend(name: str, device: torch.device) -> str:
    """The name of the backend to use on `device`; "auto" takes the first available and logs, once, which
    and why not those before it.

    Raises:
        ValueError: unknown name, or a backend asked for by name that does not run here (with the reason).
    """
    if name != "auto":
        if name not in _FACTORIES:
            raise ValueError(f"backend: expected auto or one of {', '.join(_FACTORIES)}; got {name!r}")
        reason = get_backend(name).why_unavailable(device)
        if reason is not None:
            raise ValueError(f"backend: {name!r} is not available on {device}: {reason}")
        return name
    candidates = _AUTO.get(device.type, ("torch",))
    passed_over = ""
    for chosen in candidates:
        reason = get_backend(chosen).why_unavailable(device)
        if reason is None:
            break
        passed_over += f"; not {chosen!r}: {reason}"
    if (chosen, device.type) not in _announced:
        _announced.add((chosen, device.type))
        logger.info("backend auto: using %r on %s%s", chosen, device.type, passed_over)
    return chosen
