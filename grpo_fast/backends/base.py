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
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.devices import TRAITS, is_traced
from grpo_fast.objectives import KernelObjective, Tokens, kernel_objective, objective_slopes

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
    """Rows of raw products, as every row function gets them: dense, or each of its own length.

    Attributes:
        logits: raw products `[R, V]`; or with `offsets` `[N]`, row t being `logits[offsets[t]:offsets[t + 1]]`.
        targets: `[R]` int64, vocabulary indices; or with `offsets` places in the row, -1 where it is not there.
        transform: of these rows; with `offsets` its bias is `[N]`.
        vocab_start: the vocabulary index of column 0, when the chunk holds a block of the vocabulary.
        offsets: `[R+1]` int64 from 0 on, or None. No row is empty, but where a chunk is a block of the vocabulary.
        longest: the length of the longest row, where there are offsets.
    """

    logits: Tensor
    targets: Tensor
    transform: Transform
    vocab_start: int = 0
    offsets: Tensor | None = None
    longest: int = 0

    @property
    def num_rows(self) -> int:
        """R."""
        return self.targets.numel()


@dataclass(frozen=True)
class RowIds:
    """Rows' supports: the vocabulary ids that a row's raw products are of.

    Attributes:
        ids: `[N]` int32, row after row. offsets: `[R+1]` int64 from 0 on.
        rows: `[N]` int64, the row of each id.
    """

    ids: Tensor
    offsets: Tensor
    rows: Tensor

    @cached_property
    def by_id(self) -> ById:
        """The same entries in the order of their ids."""
        ids, entries = self.ids.sort(stable=True)
        return ById(ids, entries, self.rows[entries])


class ById(NamedTuple):
    """Entries of `RowIds`, those of an id side by side, ascending in id, then in row.

    ids: `[N]` int32. entries: `[N]` int64, places in `RowIds.ids`. rows: `[N]` int64, the row of each.
    """

    ids: Tensor
    entries: Tensor
    rows: Tensor


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

    def part(self, rows: slice | Tensor) -> RowSlopes:
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

    def slopes(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the loss in both, `[R]`, by autograd."""
        return objective_slopes(logprobs, entropy, self.tokens, self.weights, self.config)

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

    # -- products on supports ----------------------------------------------------------------------------------------

    def sparse_limit(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        """Tokens of the largest support whose row is computed from gathered rows of the weight, not by a product.

        It depends on nothing else, so that all passes over the same weights compute a row in the same way.
        """
        return max(vocab // self.sparse_share(dtype, device), 1)

    @abstractmethod
    def sparse_share(self, dtype: torch.dtype, device: torch.device) -> int:
        """V over `sparse_limit`: how much dearer a gathered product is than one of a matrix product's."""

    @abstractmethod
    def sparse_logits(self, hidden: Tensor, weight: Tensor, of: RowIds, out: Tensor) -> None:
        """out `[N]` float32: out_j = hidden[row of j] . weight[id of j], unrounded."""

    @abstractmethod
    def sparse_grad_hidden(self, dx: Tensor, weight: Tensor, of: RowIds, out: Tensor) -> None:
        """out `[R, H]` = sum_j dx_j weight[id of j] over each row's entries, summed in float32; dx `[N]` float32."""

    @abstractmethod
    def sparse_grad_weight(self, dx: Tensor, hidden: Tensor, of: RowIds, out: Tensor) -> None:
        """out[v] += sum_j dx_j hidden[row of j] over the entries of each id v that occurs, and nowhere else.

        out `[V, H]` of any dtype; the sum is taken in float32, with what is there, and rounded once.
        """

    def sparse_objective(
        self,
        hidden: Tensor,
        weight: Tensor,
        of: RowIds,
        rows: RowChunk,
        objective: RowObjective,
        results: ObjectiveResults,
        grad_hidden: Tensor | None,
    ) -> Tensor:
        """All of rows on their supports but the weight's gradient; returns dx `[N]` float32, over `rows.logits`.

        A backend that does it in one visit of each row overrides it where `objective.kernel` is there.

        Args:
            hidden: `[R, H]`. rows: `logits` `[N]` yet to be computed.
            grad_hidden: `[R, H]` where dHidden goes, or None.
        """
        self.sparse_logits(hidden, weight, of, rows.logits)
        dx = self.objective_rows(rows, objective, results, dtype=rows.logits.dtype)
        if grad_hidden is not None:
            self.sparse_grad_hidden(dx, weight, of, grad_hidden)
        return dx

    # -- row functions -----------------------------------------------------------------------------------------------

    @abstractmethod
    def dx_place(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """Where dx `[R, V]` for operands of `dtype` goes over raw products `[R, V]`."""

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
        g, e = objective_slopes(
            results.logprobs, results.entropy, objective.tokens, objective.weights, objective.config
        )
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


# -- what C++ takes: addresses and sizes, as the modules do not link torch --------------------------------------------


def addresses(**tensors: Tensor | None) -> dict[str, int]:
    """Where tensors' numbers are, by name; 0 for none."""
    return {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


def native_dtype(module: Any, dtype: torch.dtype) -> Any:
    """The C++ name of a dtype."""
    return getattr(module.DType, str(dtype).removeprefix("torch."))


class NativeRows:
    """A chunk of raw products, float32, as the module's `Rows`, and what its addresses point to."""

    def __init__(self, module: Any, rows: RowChunk) -> None:
        logits, transform = rows.logits, rows.transform
        temperature = transform.temperature
        per_row = temperature.float().contiguous() if isinstance(temperature, Tensor) else None
        bias = None if transform.bias is None else transform.bias.float().contiguous()
        targets = rows.targets.contiguous()
        self.kept = (logits, targets, bias, per_row)
        sparse = rows.offsets is not None
        self.native = module.Rows(
            **addresses(logits=logits, targets=targets, bias=bias, row_temperature=per_row),
            num_rows=rows.num_rows,
            num_columns=0 if sparse else logits.shape[1],
            row_stride=0 if sparse else logits.stride(0),
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


def group_functions(values: Tensor, backend: str) -> GroupFunctions | None:
    """The backend's group functions if they serve tensors like this one, neither traced nor differentiated."""
    if is_traced(values) or values.requires_grad or values.numel() == 0:
        return None
    return get_backend(backend).group_functions() if values.dtype in (torch.float32, torch.float64) else None
