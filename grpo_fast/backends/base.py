"""What a backend supplies: three products and the row functions on a chunk of logits; and the table of backends.

Legend: R rows of a chunk, V vocabulary (or a block of it), H hidden size. For row t with raw product x_t = h_t W^T:

    z_t = softcap(logit_scale (x_t + bias)) / temperature_t
    lse_t = log sum_v exp z_tv         logprob_t = z_t[y_t] - lse_t        entropy_t = lse_t - sum_v p_tv z_tv
    dx_tv = (g_t (1[v = y_t] - p_tv) - e_t p_tv (log p_tv + entropy_t)) / temperature_t * softcap' * logit_scale

To add a backend: subclass `Backend`, or `TorchBackend` where torch is to serve the rest, in a file of its own and add a
row to `_FACTORIES`. What it may ask of a device is in `devices.py`.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from grpo_fast.backends.devices import TRAITS
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.losses import LOSSES
from grpo_fast.objectives import Tokens, objective, slope_scope, total_loss

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

    def tensors(self) -> dict[str, Tensor | None]:
        """By name, as kernels read them: `[R]` float32, contiguous, or None."""
        return _float32(vars(self))


@dataclass(frozen=True)
class RowObjective:
    """The loss of rows, and what it reads of them besides their logits.

    Attributes:
        tokens: of the rows. weights: `[R]`, of their terms in the loss. config: which loss.
        grad_scale: multiplies dx (float16 operands would lose small gradients otherwise): 0-dim, or None for 1.
    """

    tokens: Tokens
    weights: Tensor
    config: LossConfig
    grad_scale: Tensor | None = None

    @property
    def kernel(self) -> KernelObjective | None:
        """The objective in the kernels' terms; None if it couples tokens or has no kernel."""
        return kernel_objective(self.config, self.tokens)

    def tensors(self) -> dict[str, Tensor | None]:
        """What kernels read of the tokens, by name: `[R]` float32, contiguous, or None."""
        given = {"advantages": self.tokens.advantages, "weights": self.weights}
        return _float32(given | self.tokens.optional(lambda values: values))

    def entropy_slope(self) -> Tensor | None:
        """d loss / d entropy of every row, `[1]` float32 on the device, or None for zero."""
        if self.config.entropy_coef == 0:
            return None
        return -self.config.entropy_coef / self.tokens.bonus_count.float().reshape(1)

    def scale_tensor(self) -> Tensor | None:
        """`grad_scale` as kernels read it, `[1]` float32."""
        return None if self.grad_scale is None else self.grad_scale.float().reshape(1)


def _float32(tensors: dict[str, Any]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.float().contiguous() for name, t in tensors.items()}


class GroupFunctions(NamedTuple):
    """`group_advantages` and `token_rows` as kernels/group_advantages.py and kernels/group_rows.py define them."""

    advantages: Callable[..., Tensor]
    token_rows: Callable[..., None]


# -- objectives in the kernels' terms ---------------------------------------------------------------------------------


_KERNEL_PARAMETERS = tuple(p.name for loss in LOSSES.values() if loss.kernel is not None for p in loss.parameters)


class KernelObjective(NamedTuple):
    """A token-local objective: what is compiled, and numbers by name (a bound that is not there is infinite).

    What a trainer changes from call to call (the bonus's weight and count) is not among it, so that few of these live.
    `correction`, the train/inference weight: "none", "weight" (known beforehand), "token_truncate" or "token_mask".
    """

    policy: str
    kl: str
    kl_times_ratio: bool
    correction: str
    parameters: tuple[tuple[str, float], ...]


def kernel_objective(config: LossConfig, tokens: Tokens) -> KernelObjective | None:
    """The objective of tokens like these; None if it couples them or if no kernel has its term."""
    if config.record.kernel is None or slope_scope(config, has_old=tokens.old_logprobs is not None) != "row":
        return None
    mode = None if tokens.sampling_logprobs is None else config.importance_sampling_mode
    correction = "weight" if tokens.importance is not None else mode or "none"
    return _kernel_objective(config.record.kernel, config.key, correction)


@lru_cache(maxsize=64)
def _kernel_objective(policy: str, key: str, correction: str) -> KernelObjective:
    config = LossConfig.from_key(key)
    low, high, delta = config.importance_sampling_clip_min, config.importance_sampling_clip_max, config.delta
    parameters = {
        "clip_low": 1.0 - config.epsilon,
        "clip_high": 1.0 + config.upper_epsilon,
        "clip_bound": config.upper_epsilon,
        "delta": math.inf if delta is None else delta,
        "beta": config.beta,
        "importance_min": -math.inf if low is None else low,
        "importance_max": math.inf if high is None else high,
    }
    parameters |= {name: getattr(config, name) for name in _KERNEL_PARAMETERS}
    return KernelObjective(
        policy=policy,
        kl=config.kl_estimator if config.beta else "none",
        kl_times_ratio=config.use_bias_correction_kl,
        correction=correction,
        parameters=tuple(parameters.items()),
    )


# -- what a backend is ------------------------------------------------------------------------------------------------


class Backend(ABC):
    """Products and row functions on a chunk of logits. All methods are deterministic and read no host value back.

    A row's results depend neither on its position nor on the other rows, as long as `tile_rows` is the same: that is
    what makes old, current and reference passes agree bit for bit.
    """

    name: str
    stages_dx: bool = False
    """Whether dx goes to memory of its own where it can, so that the backward products span several tiles of logits."""

    has_fused_forward: bool = False

    @abstractmethod
    def why_unavailable(self, device: torch.device) -> str | None:
        """None if the backend runs on `device`; otherwise the reason, and how to get it."""

    def scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        """Temporary memory besides the chunk of logits itself."""
        return self.row_scratch_bytes(vocab, dtype, device) + self.product_scratch_bytes(dtype, device)

    @abstractmethod
    def row_scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        """Temporary memory of the row functions."""

    @abstractmethod
    def product_scratch_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """Temporary memory of the products."""

    def preferred_tile_rows(self, dtype: torch.dtype, device: torch.device) -> int:
        """Rows of one logits product, before the workspace cap: a power of two."""
        return TRAITS[device.type].tile_rows

    def row_pitch(self, vocab: int) -> int:
        """Elements from one row of logits or dx to the next."""
        return vocab

    def new_buffer(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory on the device of `like` for what has a row or column for every vocabulary entry."""
        return like.new_empty(shape, dtype=dtype)

    # -- products ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor, tile_rows: int) -> None:
        """out `[R, V]` float32 = hidden `[R, H]` @ weight `[V, H]`^T, unrounded; products of exactly `tile_rows`."""

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
    def statistics(self, rows: RowChunk, out: RowStatistics) -> None:
        """Write the statistics of the rows to `out`; the raw products stay as they are.

        The logprob of a target outside the vocabulary is NaN.
        """

    @abstractmethod
    def gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """dx `[R, V]`, written to `out`, or over the raw products `[R, V]`.

        Args:
            dtype: of the operands that dx will meet; over the products, dx may be a narrower view of their memory.
            out: `[R, V]` in that dtype, or None.
        """

    def objective_rows(
        self,
        rows: RowChunk,
        objective: RowObjective,
        results: ObjectiveResults,
        *,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """The whole row pass: statistics, the objective's slopes, dx `[R, V]`; writes `results`.

        A backend whose kernel does the three in one sweep overrides it where `objective.kernel` is there.

        Args:
            dtype, out: as in `gradient`.
        """
        lse = torch.empty_like(results.entropy)
        self.statistics(rows, RowStatistics(results.logprobs, results.entropy, lse))
        g, e = objective_slopes(results.logprobs, results.entropy, objective)
        torch.ne(g, 0, out=results.live)
        if e is not None:
            results.live.logical_or_(e != 0)
        if objective.grad_scale is not None:
            g, e = g * objective.grad_scale, None if e is None else e * objective.grad_scale
        return self.gradient(rows, RowSlopes(lse, results.entropy, g, e), dtype=dtype, out=out)

    def scale(self, gradient: Tensor, factor: Tensor) -> Tensor:
        """gradient * factor (0-dim), in place."""
        return gradient.mul_(factor)

    def fused_forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, transform: Transform) -> RowStatistics:
        """Statistics `[T]` without logits in memory, for backends with `has_fused_forward`."""
        raise NotImplementedError(f"{self.name} has no fused forward")

    def group_functions(self) -> GroupFunctions | None:
        """What serves batches of completions before the model is asked; None: torch's operators do."""
        return None


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


def objective_slopes(logprobs: Tensor, entropy: Tensor, own: RowObjective) -> tuple[Tensor, Tensor | None]:
    """(d loss / d logprobs, d loss / d entropy or None) `[R]`, by autograd through the objective's formula."""
    with _autograd_inside_operator():
        logprobs = logprobs.detach().requires_grad_()
        entropy = entropy.detach().requires_grad_(own.config.entropy_coef != 0)
        terms = objective(logprobs, entropy, own.tokens, own.config)
        loss = total_loss(terms, entropy, own.weights, own.config)
        inputs = [logprobs] + [entropy] * entropy.requires_grad
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return grads[0], grads[1] if entropy.requires_grad else None


# -- what C++ takes: addresses and sizes, as the modules do not link torch --------------------------------------------


def addresses(**tensors: Tensor | None) -> dict[str, int]:
    """Where tensors' numbers are, by name; 0 for none."""
    return {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


def native_dtype(module: Any, dtype: torch.dtype) -> Any:
    """The C++ name of a dtype."""
    return getattr(module.DType, str(dtype).removeprefix("torch."))


class NativeRows:
    """A chunk of logits `[R, V]` float32 as the module's `Rows`, and what its addresses point to."""

    def __init__(self, module: Any, rows: RowChunk) -> None:
        logits, transform = rows.logits, rows.transform
        temperature = transform.temperature
        per_row = temperature.float().contiguous() if isinstance(temperature, Tensor) else None
        bias = None if transform.bias is None else transform.bias.float().contiguous()
        targets = rows.targets.contiguous()
        self.kept = (logits, targets, bias, per_row)
        self.native = module.Rows(
            **addresses(logits=logits, targets=targets, bias=bias, row_temperature=per_row),
            num_rows=logits.shape[0],
            num_columns=logits.shape[1],
            row_stride=logits.stride(0),
            logit_scale=transform.head.logit_scale,
            softcap=transform.head.softcap or 0.0,
            temperature=1.0 if isinstance(temperature, Tensor) else temperature,
        )


@lru_cache(maxsize=64)
def native_objective(module: Any, objective: KernelObjective) -> Any:
    """The objective as the module's."""
    parameters = dict(objective.parameters)
    named = {name: getattr(objective, name) for name in ("policy", "kl", "kl_times_ratio", "correction")}
    return module.Objective(**named, parameters=[parameters[name] for name in module.PARAMETERS])


# -- the table --------------------------------------------------------------------------------------------------------

BackendName = Literal["auto", "triton", "cpu", "torch", "cuda"]
# name: (module, class). Modules load when first asked for.
_FACTORIES: dict[str, tuple[str, str]] = {
    "triton": ("grpo_fast.backends.triton", "TritonBackend"),
    "cpu": ("grpo_fast.backends.cpu", "CpuBackend"),
    "torch": ("grpo_fast.backends.torch", "TorchBackend"),
    "cuda": ("grpo_fast.backends.cuda", "CudaBackend"),  # by name only: unmeasured
}
assert get_args(BackendName) == ("auto", *_FACTORIES)
# What "auto" takes on a kind of device: the first that is available there.
_AUTO = {"cuda": ("triton", "torch"), "cpu": ("cpu", "torch")}
_announced: set[tuple[str, str]] = set()


def backend_names() -> tuple[BackendName, ...]:
    """Names that `backend=` accepts besides "auto"."""
    names: tuple[BackendName, ...] = get_args(BackendName)[1:]
    return names


@cache
def get_backend(name: str) -> Backend:
    """The backend called `name`; `resolve_backend` has checked that it exists."""
    module, attribute = _FACTORIES[name]
    backend: Backend = getattr(import_module(module), attribute)()
    return backend


@torch.compiler.assume_constant_result  # looked up while tracing, not traced
def resolve_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The name of the backend that serves operands of a dtype on a device.

    "auto" takes the first available and logs, once, which and why not those before it. float64, which is for
    comparisons, is served by torch, whatever is asked for.

    Raises:
        ValueError: unknown name, or a backend asked for by name that does not run here (with the reason).
    """
    if name != "auto":
        if name not in _FACTORIES:
            raise ValueError(f"backend: expected auto or one of {', '.join(_FACTORIES)}; got {name!r}")
        reason = get_backend(name).why_unavailable(device)
        if reason is not None:
            raise ValueError(f"backend: {name!r} is not available on {device}: {reason}")
        return "torch" if dtype == torch.float64 else name
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
    return "torch" if dtype == torch.float64 else chosen


def is_traced(tensor: Tensor) -> bool:
    """Whether there are no values to read or to hand to native code: a compiler or a fake mode is looking on."""
    return torch.compiler.is_compiling() or torch._guards.detect_fake_mode(tensor) is not None


def group_functions(values: Tensor, backend: str) -> GroupFunctions | None:
    """The backend's group functions if they serve tensors like this one, neither traced nor differentiated."""
    if is_traced(values) or values.requires_grad or values.numel() == 0:
        return None
    return get_backend(backend).group_functions() if values.dtype in (torch.float32, torch.float64) else None
