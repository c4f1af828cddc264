"""A GPU's stand-in on CPU tensors, so that the code takes every branch that it takes on a GPU.

    with stand_in() as gpu:      # or the fixture `gpu`
        ...                      # CPU tensors are a GPU's, as far as grpo_fast asks
    gpu.waits                    # operators that would have made the host wait

While it is there
- `devices.TRAITS["cpu"]` is a GPU's row: products of 16-bit operands come from `aten::mm.dtype_out` and
  `addmm.dtype_out`, which the CPU does not have. They are implemented here with the checks that torch 2.11's CUDA code
  makes (aten/src/ATen/native/cuda/Blas.cpp, read), summed in float64 and rounded to float32 once.
- float32 products are rounded to TF32 where torch.backends.cuda.matmul allows it.
- Streams are a model. What every operator and Triton launch reads and writes is written down with the stream that it
  was given to, by byte ranges of storages; two accesses, one of them a write, that no event orders raise `Unordered`,
  as does memory that goes back to the allocator of one stream while another may still use it.

Triton kernels run under the interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from grpo_fast import devices
from grpo_fast.ops.call import tuning
from tests.allocations import OPERATORS
from tests.cases import INTERPRETED

GIB = 2**30
HALVES = (torch.bfloat16, torch.float16)
aten = torch.ops.aten


class Unordered(AssertionError):  # noqa: N818
    """Two streams meet in the same bytes, and nothing says which comes first."""


# -- streams ----------------------------------------------------------------------------------------------------------


class Stream:
    """Work in order. `clock[s]`: how much of stream s's work is done before whatever this stream is given next."""

    def __init__(self, device: Any = None) -> None:
        self.clock: dict[Stream, int] = {}

    def record_event(self) -> dict[Stream, int]:
        return dict(self.clock)

    def wait_event(self, event: dict[Stream, int]) -> None:
        for stream, time in event.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def tick(self) -> int:
        """The time of a new piece of work."""
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]


class Streams:
    """torch.cuda, as far as streams go."""

    def __init__(self) -> None:
        self.current = Stream()
        self.made: list[Stream] = []

    def Stream(self, device: Any = None) -> Stream:  # noqa: N802
        self.made.append(Stream())
        return self.made[-1]

    def current_stream(self, device: Any = None) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


@dataclass
class Access:
    """Bytes `begin:end` of a storage, touched by one piece of work."""

    begin: int
    end: int
    stream: Stream
    time: int
    writes: bool
    what: str

    def before(self, stream: Stream) -> bool:
        return stream.clock.get(self.stream, 0) >= self.time


@dataclass
class Memory:
    """What is known of a storage."""

    owner: Stream
    accesses: list[Access] = field(default_factory=list)


# -- the device -------------------------------------------------------------------------------------------------------

_WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
_NOTHING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
WRITTEN = {
    "dx",
    "logprobs",
    "entropy",
    "lse",
    "live",
    "token_advantages",
    "active_rows",
    "rows",
    "num_active",
    "tensor",
    "products",
    "grad_hidden",
    "out",
}
"""Arguments of Triton kernels that some kernel writes."""


class StandIn(TorchDispatchMode):
    """The device: it sees every operator. `waits` names those that make the host wait, `launches` the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = Streams()
        self.memory: dict[int, Memory] = {}
        self.waits: list[str] = []
        self.late: list[str] = []
        self.launches: list[str] = []
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OPERATORS:  # look inside our own operators
            with self:
                return OPERATORS[func](*args, **kwargs)
        if func in _WAITING or (func is aten.index.Tensor and any(_is_mask(i) for i in args[1])):
            self.waits.append(func.__name__)
        self.operators[func.__name__] += 1
        call = _as_tf32(func, args, kwargs) if torch.backends.cuda.matmul.fp32_precision == "tf32" else None
        result = func(*args, **kwargs) if call is None else call
        name, returns = func.__name__.split(".")[0], func._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return result  # a view
        for given, argument in zip((*args, *kwargs.values()), _arguments(func, args, kwargs), strict=True):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(tensor, Tensor):
                    self.touch(tensor, writes=writes, what=func.__name__)
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and (name not in _NOTHING or not self._known(tensor)):
                self.touch(tensor, writes=True, what=func.__name__)
        return result

    def _known(self, tensor: Tensor) -> bool:
        return id(tensor.untyped_storage()) in self.memory

    def touch(self, tensor: Tensor, *, writes: bool, what: str) -> None:
        """The current stream's next piece of work reads or writes a tensor."""
        if tensor.numel() == 0 or tensor.device.type != "cpu":
            return
        storage, stream = tensor.untyped_storage(), self.streams.current
        key = id(storage)
        if key not in self.memory:
            self.memory[key] = Memory(stream)
            weakref.finalize(storage, self._free, key)
        spread = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.storage_offset() * tensor.element_size()
        new = Access(begin, begin + (spread + 1) * tensor.element_size(), stream, stream.tick(), writes, what)
        kept = []
        for old in self.memory[key].accesses:
            meet = old.begin < new.end and new.begin < old.end
            if meet and (old.writes or new.writes) and not old.before(stream):
                raise Unordered(f"{new.what} after {old.what} on another stream, in the same bytes of a tensor")
            covered = new.begin <= old.begin and old.end <= new.end and old.before(stream)
            if not (covered and (new.writes or (old.stream is stream and not old.writes))):
                kept.append(old)
        self.memory[key].accesses = [*kept, new]

    def _free(self, key: int) -> None:
        memory = self.memory.pop(key, None)
        for access in memory.accesses if memory else ():
            if not access.before(memory.owner):
                self.late.append(f"memory that {access.what} uses on another stream went back to its own stream's pool")

    def launched(self, name: str, arguments: dict[str, Any]) -> None:
        """A Triton kernel was given its arguments."""
        self.launches.append(name)
        for argument, value in arguments.items():
            if isinstance(value, Tensor):
                self.touch(value, writes=argument in WRITTEN, what=f"{name}({argument})")


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    by_name = {argument.name: argument for argument in func._schema.arguments}
    return [*func._schema.arguments[: len(args)], *(by_name[name] for name in kwargs)]


# -- products ---------------------------------------------------------------------------------------------------------


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _check_product(left: Tensor, right: Tensor, out_dtype: torch.dtype, out: Tensor) -> None:
    _check(left.dim() == 2, f"self must be a matrix, got {left.dim()}-D tensor")
    _check(right.dim() == 2, f"mat2 must be a matrix, got {right.dim()}-D tensor")
    _check(
        left.shape[1] == right.shape[0], f"mat1 and mat2 shapes cannot be multiplied ({left.shape} and {right.shape})"
    )
    _check(out_dtype == out.dtype, "out_dtype must be the same as the dtype of the provided out tensor")
    _check(left.dtype == right.dtype, "input dtypes must be the same")
    wide = out_dtype == torch.float32 and left.dtype in HALVES
    _check(out_dtype == left.dtype or wide, "out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
    # The out overloads hand `out` over as the addend, which is never resized; a row must not run into the next.
    _check(out.shape == (left.shape[0], right.shape[1]), f"expected out of shape {[left.shape[0], right.shape[1]]}")
    apart = out.numel() == 0 or (min(out.stride()) == 1 and max(out.stride()) >= out.shape[out.stride().index(1)])
    _check(apart or 1 in out.shape, f"unsupported operation: out of strides {out.stride()} overlaps itself")


def _mm_dtype_out(left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    _check_product(left, right, out_dtype, out)
    return out.copy_(left.double() @ right.double())


def _addmm_dtype_out(
    base: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    _check_product(left, right, out_dtype, out)
    _check(base.dtype in (out_dtype, left.dtype), "self dtype must match either out_dtype or mat1 dtype")
    _check(base.shape == out.shape, f"expected self of shape {list(out.shape)}")
    return out.copy_(beta * base.double() + alpha * (left.double() @ right.double()))


def _tf32(values: Tensor) -> Tensor:
    """Rounded to 11 significant bits, to nearest."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _as_tf32(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a float32 product gives where TF32 is allowed; None for other operators."""
    first = {aten.mm.default: 0, aten.mm.out: 0, aten.addmm.default: 1, aten.addmm_.default: 1, aten.addmm.out: 1}.get(
        func
    )
    if first is None or args[first].dtype != torch.float32:
        return None
    operands = [_tf32(operand) for operand in args[first : first + 2]]
    return func(*args[:first], *operands, *args[first + 2 :], **kwargs)


# -- putting it there -------------------------------------------------------------------------------------------------


@contextmanager
def stand_in(*, row_stream: bool = False, tile_rows: int | None = None, memory: int = 24 * GIB) -> Iterator[StandIn]:
    """CPU tensors are a GPU's while this lasts.

    Args:
        row_stream, tile_rows: as in `call.tuning`. memory: bytes that the card has.
    """
    device = StandIn()
    before = devices.TRAITS["cpu"]
    gpu = replace(devices.TRAITS["cuda"], streams=device.streams, total_memory=lambda _: memory)
    outermost = before.streams is None  # torch 2.11 refuses to register an operator twice
    library = torch.library.Library("aten", "IMPL")
    if outermost:
        library.impl("mm.dtype_out", _mm_dtype_out, "CPU")
        library.impl("addmm.dtype_out", _addmm_dtype_out, "CPU")
    devices.TRAITS["cpu"] = gpu
    patch = pytest.MonkeyPatch()
    _hear_launches(patch, device)
    _hear_lists(patch, device)
    try:
        with tuning(tile_rows=tile_rows, row_stream=row_stream), device:
            yield device
    finally:
        devices.TRAITS["cpu"] = before
        library._destroy()
        patch.undo()
    if device.late:
        raise Unordered(device.late[0])


def _hear_lists(patch: pytest.MonkeyPatch, device: StandIn) -> None:
    """`Tensor.tolist` reads memory, below the dispatcher, and waits for it."""
    plain = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        device.waits.append("tolist")
        return plain(self)

    patch.setattr(Tensor, "tolist", tolist)


def _hear_launches(patch: pytest.MonkeyPatch, device: StandIn) -> None:
    """Triton's interpreter works on memory, below the dispatcher: tell the device of every launch."""
    if not INTERPRETED:
        return
    from grpo_fast.kernels import (  # noqa: F401  (they import it by name)  # noqa: F401
        forward_logprobs,
        group_advantages,
        group_rows,
        launcher,
        row_gradient,
        row_objective,
        row_statistics,
        scale,
        sparse_rows,
        sparse_weight,
    )

    launch = launcher.launch

    def heard(kernel: Any, grid: Any, arguments: Mapping[str, Any], device_of: torch.device) -> None:
        device.launched(kernel.fn.__name__, dict(arguments))
        with _disable_current_modes():
            launch(kernel, grid, arguments, device_of)

    for name, module in sys.modules.items():
        if name.startswith("grpo_fast.kernels.") and getattr(module, "launch", None) is launch:
            patch.setattr(module, "launch", heard)


@pytest.fixture
def gpu() -> Iterator[StandIn]:
    """The stand-in, for the length of a test."""
    with stand_in() as device:
        yield device
