"""The `torch` backend: GEMMs by torch, row functions in torch ops. Runs on any device; the plain one to read.

Row functions work through blocks of rows so that their temporaries stay small (four blocks at most) and near the
caches. bf16/fp16 products come back in float32: on CUDA from the library GEMM itself (`out_dtype`), elsewhere
by upcasting the weight a block of the vocabulary at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from grpo_fast.ops.backend import Backend, RowChunk, RowSlopes, Transform

MIN_ROW_BLOCK = 16
ROW_BLOCK_ELEMENTS = 2**19
"""Elements of a block of rows, where its rows are short enough for more than `MIN_ROW_BLOCK`."""
UPCAST_BYTES = 32 * 2**20
"""Size of one upcast block of the weight."""


@contextmanager
def _exact_half_products(dtype: torch.dtype) -> Iterator[None]:
    """Let oneDNN multiply float32 copies of bf16 values as bf16, with float32 accumulation and output.

    The operands are bf16 values, so nothing is rounded: the same product, 2-3x faster where the CPU has bf16
    instructions (measured with AVX-512 BF16, torch 2.13). dx operands are rounded to bf16, as on every other device.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


FEW_ROWS = 4
"""Fewer rows than this a CPU's BLAS multiplies as vectors, summing straight over the vocabulary: 1.6e-4 off for a real
float32 head (SmolLM2's), where four rows are 6e-7 off. So dHidden of fewer is padded to this many."""


class TorchBackend(Backend):
    """See the module."""

    name = "torch"

    def why_unavailable(self, device: torch.device) -> str | None:
        return None

    def scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        row_blocks = 4 * max(MIN_ROW_BLOCK * vocab, ROW_BLOCK_ELEMENTS) * max(4, dtype.itemsize)
        return row_blocks + self.gemm_scratch_bytes(dtype, device)

    def gemm_scratch_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """Temporary memory of the GEMMs alone."""
        return 2 * UPCAST_BYTES if _upcasts(dtype, device) else 0

    # -- GEMMs -------------------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor, tile_rows: int) -> None:
        tiles = range(0, hidden.shape[0], tile_rows)
        if not _upcasts(hidden.dtype, hidden.device):
            for row in tiles:
                tile, tile_out = hidden[row : row + tile_rows], out[row : row + tile_rows]
                if _is_half(hidden):
                    torch.ops.aten.mm.dtype_out(tile, weight.t(), torch.float32, out=tile_out)
                else:
                    torch.mm(tile, weight.t(), out=tile_out)
            return
        wide_hidden = hidden.float()
        with _exact_half_products(hidden.dtype):
            for start, stop, block in _upcast_blocks(weight):
                for row in tiles:
                    # A contiguous result first: torch would copy a strided `out` as well.
                    product = wide_hidden[row : row + tile_rows] @ block.t()
                    out[row : row + tile_rows, start:stop].copy_(product)

    def grad_hidden(self, dx: Tensor, weight: Tensor, out: Tensor) -> None:
        missing = FEW_ROWS - dx.shape[0]
        if missing > 0 and dx.device.type == "cpu":
            wide = out.new_zeros(FEW_ROWS, out.shape[1])
            self.grad_hidden(torch.nn.functional.pad(dx, (0, 0, 0, missing)), weight, wide)
            out.add_(wide[: dx.shape[0]])
            return
        if not _is_half(weight):
            out.addmm_(dx, weight)
        elif not _upcasts(weight.dtype, weight.device):
            torch.ops.aten.addmm.dtype_out(out, dx, weight, torch.float32, out=out)
        else:
            with _exact_half_products(weight.dtype):
                for start, stop, block in _upcast_blocks(weight):
                    out.addmm_(dx[:, start:stop], block)

    def grad_weight(self, dx: Tensor, hidden: Tensor, out: Tensor, base: Tensor | None) -> None:
        wide = out if base is None else base
        if _upcasts(hidden.dtype, hidden.device):
            wide_hidden = hidden.float()
            with _exact_half_products(hidden.dtype):
                for start, stop in _vocab_blocks(wide):
                    columns = dx[:, start:stop].t()
                    if base is None:
                        out[start:stop].copy_(columns @ wide_hidden)
                    else:
                        base[start:stop].addmm_(columns, wide_hidden)
        elif base is None:
            torch.mm(dx.t(), hidden, out=out)
        elif _is_half(hidden):
            torch.ops.aten.addmm.dtype_out(base, dx.t(), hidden, torch.float32, out=base)
        else:
            base.addmm_(dx.t(), hidden)
        if wide is not out:
            out.copy_(wide)

    # -- row functions -----------------------------------------------------------------------------------------------

    def statistics(self, rows: RowChunk) -> tuple[Tensor, Tensor, Tensor]:
        logits, targets, transform = rows.logits, rows.targets, rows.transform
        logprobs, entropy, lse = (logits.new_empty(logits.shape[0]) for _ in range(3))
        for block in _row_blocks(logits):
            z = _transformed(logits[block], transform, block)
            log_p = torch.log_softmax(z, dim=-1)
            logprobs[block] = log_p.gather(1, targets[block, None])[:, 0]
            lse[block] = z.amax(-1) - log_p.amax(-1)
            probabilities = log_p.exp()
            # A probability of zero has log -inf; its product must be zero, not NaN.
            finite_log_p = log_p.clamp_(min=torch.finfo(log_p.dtype).min)
            entropy[block] = -probabilities.mul_(finite_log_p).sum(-1)
        return logprobs, entropy, lse

    def gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        logits, transform, lse, entropy, g, e = (
            rows.logits,
            rows.transform,
            slopes.lse,
            slopes.entropy,
            slopes.g,
            slopes.e,
        )
        num_columns = logits.shape[1]
        columns = rows.targets - rows.vocab_start
        inside = (columns >= 0) & (columns < num_columns)
        one_hot = torch.where(inside, g, 0.0)[:, None]
        columns = columns.clamp(0, num_columns - 1)[:, None]
        narrow = dtype.itemsize < logits.dtype.itemsize and logits.device.type == "cuda"
        # A row's narrow result lies over the first half of its own logits, which have been read by then.
        over = logits.view(dtype)[:, :num_columns] if narrow else logits
        dx = over if out is None else out
        for block in _row_blocks(logits):
            z = _transformed(logits[block], transform, block)
            log_p = z - lse[block, None]
            grad = log_p.exp()
            if e is None:
                grad.mul_(-g[block, None])
            else:
                slope = log_p.clamp_(min=torch.finfo(log_p.dtype).min).add_(entropy[block, None])
                grad.mul_(slope.mul_(-e[block, None]).sub_(g[block, None]))
            grad.scatter_add_(1, columns[block], one_hot[block])
            dx[block].copy_(_through_transform(grad, z, transform, block))
        return dx


def _transformed(block: Tensor, transform: Transform, rows: slice) -> Tensor:
    """Logits z of a block of raw products; the block itself where there is nothing to do, else a new tensor."""
    z = block if transform.bias is None else block + transform.bias
    if transform.head.logit_scale != 1.0:
        z = z * transform.head.logit_scale
    if transform.head.softcap is not None:
        z = (z / transform.head.softcap).tanh_().mul_(transform.head.softcap)
    temperature = _row_temperature(transform, rows)
    return z if temperature is None else z / temperature


def _through_transform(grad: Tensor, z: Tensor, transform: Transform, rows: slice) -> Tensor:
    """Gradient in the raw products from the gradient in z, in place; tanh' = 1 - (z temperature / softcap)^2."""
    temperature = _row_temperature(transform, rows)
    if temperature is not None:
        grad.div_(temperature)
    if transform.head.softcap is not None:
        capped = z / transform.head.softcap
        if temperature is not None:
            capped.mul_(temperature)
        grad.mul_(capped.square_().neg_().add_(1.0))
    if transform.head.logit_scale != 1.0:
        grad.mul_(transform.head.logit_scale)
    return grad


def _row_temperature(transform: Transform, rows: slice) -> float | Tensor | None:
    if isinstance(transform.temperature, Tensor):
        return transform.temperature[rows, None]
    return None if transform.temperature == 1.0 else transform.temperature


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    num_rows, num_columns = logits.shape
    step = max(MIN_ROW_BLOCK, ROW_BLOCK_ELEMENTS // num_columns // MIN_ROW_BLOCK * MIN_ROW_BLOCK)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _upcasts(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device's GEMM cannot return float32 from this dtype, so that operands are upcast."""
    return dtype in (torch.bfloat16, torch.float16) and device.type != "cuda"


def _vocab_blocks(weight: Tensor) -> Iterator[tuple[int, int]]:
    vocab, width = weight.shape
    step = max(256, UPCAST_BYTES // (4 * max(width, 128)) // 256 * 256)
    for start in range(0, vocab, step):
        yield start, min(start + step, vocab)


def _upcast_blocks(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    for start, stop in _vocab_blocks(weight):
        yield start, stop, weight[start:stop].float()
