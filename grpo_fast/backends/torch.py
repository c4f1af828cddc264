"""The `torch` backend: products by torch, row functions in torch ops. Runs on any device; the plain one to read.

Row functions work through blocks of rows so that their temporaries stay small (four blocks at most) and, on a CPU, near
the caches. bf16/fp16 products come back in float32: from the library product itself (`out_dtype`) on devices that have
one, elsewhere by widening the operands a block of the vocabulary at a time. float32 products keep their 24 bits also
where the process allows TF32 or bf16 in their place (the last section).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.backends.base import Backend, RowChunk, RowIds, RowSlopes, RowStatistics, Transform
from grpo_fast.devices import TRAITS
from grpo_fast.packing import offsets_of

MIN_ROW_BLOCK = 16
MIN_ROW_WIDTH = 16
"""Of rows on supports: shorter ones are padded to it, which makes fewer groups of them."""
UPCAST_BYTES = 32 * 2**20
"""Size of one upcast block of the weight."""
FEW_ROWS = 4
"""Fewer rows than this a CPU's BLAS multiplies as vectors, summing straight over the vocabulary: 1.6e-4 off for a real
float32 head (SmolLM2's), where four rows are 6e-7 off. So dHidden of fewer is padded to this many."""


class TorchBackend(Backend):
    """See the module."""

    name = "torch"

    def why_unavailable(self, device: torch.device) -> str | None:
        return None

    def row_scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        # Four blocks of rows.
        return 4 * max(MIN_ROW_BLOCK * vocab, TRAITS[device.type].row_block_elements) * max(4, dtype.itemsize)

    def product_scratch_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        upcast = _upcasts(dtype, device)
        split = _split_bytes(device) if upcast or dtype == torch.float32 else 0
        return split + (2 * UPCAST_BYTES if upcast else 0)

    # -- products ----------------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor, tile_rows: int) -> None:
        tiles = range(0, hidden.shape[0], tile_rows)
        if not _upcasts(hidden.dtype, hidden.device):
            for row in tiles:
                _multiply(hidden[row : row + tile_rows], weight.t(), out[row : row + tile_rows])
            return
        wide_hidden = hidden.float()
        for start, stop in _vocab_blocks(weight):
            block = weight[start:stop].float().t()
            for row in tiles:
                # A contiguous result first: torch would copy a strided `out` as well.
                product = out.new_empty(wide_hidden[row : row + tile_rows].shape[0], stop - start)
                add_product(product, wide_hidden[row : row + tile_rows], block, overwrite=True)
                out[row : row + tile_rows, start:stop].copy_(product)

    def grad_hidden(self, dx: Tensor, weight: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        missing = FEW_ROWS - dx.shape[0]
        if missing > 0 and TRAITS[dx.device.type].vector_products:
            wide = out.new_empty(FEW_ROWS, out.shape[1])
            self.grad_hidden(torch.nn.functional.pad(dx, (0, 0, 0, missing)), weight, wide)
            (out.add_ if accumulate else out.copy_)(wide[: dx.shape[0]])
            return
        if not _upcasts(weight.dtype, weight.device):
            _multiply(dx, weight, out, accumulate=accumulate)
            return
        for start, stop in _vocab_blocks(weight):
            add_product(out, dx[:, start:stop].float(), weight[start:stop].float(), overwrite=not accumulate)
            accumulate = True

    def grad_weight(self, dx: Tensor, hidden: Tensor, out: Tensor, base: Tensor | None) -> None:
        wide = out if base is None else base
        if not _upcasts(hidden.dtype, hidden.device):
            _multiply(dx.t(), hidden, wide, accumulate=base is not None)
        else:
            wide_hidden = hidden.float()
            for start, stop in _vocab_blocks(wide):
                columns = dx[:, start:stop].t().float()
                block = wide[start:stop]
                product = block if block.dtype == torch.float32 else block.new_empty(block.shape, dtype=torch.float32)
                add_product(product, columns, wide_hidden, overwrite=base is None)
                if product is not block:
                    block.copy_(product)
        if wide is not out:
            out.copy_(wide)

    # -- products on supports: blocks of entries, of gathered rows ---------------------------------------------------

    def sparse_share(self, dtype: torch.dtype, device: torch.device) -> int:
        # On two EPYC cores, bf16, H = 576, V = 49152: 3 us an entry, 0.6 to 1.2 ms a dense row: V / 128 to V / 256.
        # But the first masked row widens the whole weight, which a few long rows are not worth. On a GPU: not measured.
        return 64

    def sparse_logits(self, hidden: Tensor, weight: Tensor, of: RowIds, out: Tensor) -> None:
        for block in _entry_blocks(out.numel(), hidden):
            left = hidden[of.rows[block]].to(out.dtype)
            torch.mul(left, weight[of.ids[block]], out=left)
            torch.sum(left, 1, out=out[block])

    def sparse_grad_hidden(self, dx: Tensor, weight: Tensor, of: RowIds, out: Tensor) -> None:
        out.copy_(_segment_sums(dx, weight, of.ids, of.offsets))

    def sparse_grad_weight(self, dx: Tensor, hidden: Tensor, of: RowIds, out: Tensor) -> None:
        ids, entries, rows = of.by_id
        ids, counts = ids.unique_consecutive(return_counts=True)
        ids = ids.long()
        sums = _segment_sums(dx[entries], hidden, rows, offsets_of(counts))
        out[ids] = sums.add_(out[ids]).to(out.dtype)

    # -- row functions -----------------------------------------------------------------------------------------------

    def dx_place(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        narrow = dtype.itemsize < logits.dtype.itemsize and TRAITS[logits.device.type].wide_products
        # A row's narrow result lies over the first half of its own logits, which have been read by then.
        return logits.view(dtype)[:, : logits.shape[1]] if narrow else logits

    def statistics(self, rows: RowChunk, out: RowStatistics) -> None:
        if rows.offsets is None:
            _statistics(_Dense(rows), out)
            return
        for part, dense in _dense(rows):
            found = RowStatistics(*(whole.new_empty(part.numel()) for whole in out))
            _statistics(dense, found)
            for whole, values in zip(out, found, strict=True):
                whole[part] = values

    def gradient(self, rows: RowChunk, slopes: RowSlopes, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if rows.offsets is None:
            dx = self.dx_place(rows.logits, dtype) if out is None else out
            _gradient(_Dense(rows), slopes, dx)
            return dx
        for part, dense in _dense(rows):
            dx = dense.rows.logits
            _gradient(dense, slopes.part(part), dx)
            assert dense.places is not None
            assert dense.valid is not None
            rows.logits[dense.places] = torch.where(dense.valid, dx, dx[:, :1])
        return rows.logits


class _Dense(NamedTuple):
    """Rows of one length: as they came, or padded, with which columns are `valid` and their `places` in `[N]`, the
    row's first where they are not."""

    rows: RowChunk
    valid: Tensor | None = None
    places: Tensor | None = None


def _dense(rows: RowChunk) -> Iterator[tuple[Tensor, _Dense]]:
    """(which rows, the same padded to one length) of rows of different lengths, a block at a time.

    A row is padded to a power of two that is its own: how its sums are taken, and so its bits, do not depend on the
    rows beside it. Empty ones, which blocks of the vocabulary may have, are left out. A GPU is waited for once.
    """
    assert rows.offsets is not None
    starts, sizes, device = rows.offsets[:-1], rows.offsets.diff(), rows.logits.device
    # Binary digits of size - 1: the exponent of the next power of two.
    digits = torch.frexp((sizes - 1).clamp_(min=MIN_ROW_WIDTH - 1).double()).exponent.masked_fill_(sizes == 0, 0)
    counts = (digits[:, None] == torch.arange(64, device=device)).sum(0).tolist()
    groups = digits.argsort(stable=True).split(counts)
    for exponent in range(1, len(groups)):
        columns = torch.arange(2**exponent if counts[exponent] else 0, device=device)
        for block in _row_blocks(counts[exponent], 2**exponent, device, at_least=1):
            part = groups[exponent][block]
            valid = columns < sizes[part, None]
            places = starts[part, None] + torch.where(valid, columns, 0)
            transform = rows.transform.rows(part)
            if transform.bias is not None:
                transform = replace(transform, bias=transform.bias[places])
            yield part, _Dense(RowChunk(rows.logits[places], rows.targets[part], transform), valid, places)


def _statistics(dense: _Dense, out: RowStatistics) -> None:
    rows = dense.rows
    columns, inside = _columns(rows)
    for block in _row_blocks(rows.num_rows, rows.logits.shape[1], rows.logits.device):
        z = _transformed(dense, block)
        log_p = torch.log_softmax(z, dim=-1)
        own = log_p.gather(1, columns[block])[:, 0]
        out.logprobs[block] = torch.where(inside[block], own, torch.nan)
        out.lse[block] = z.amax(-1) - log_p.amax(-1)
        probabilities = log_p.exp()
        # A probability of zero has log -inf; its product must be zero, not NaN.
        finite_log_p = log_p.clamp_(min=torch.finfo(log_p.dtype).min)
        terms = probabilities.mul_(finite_log_p)
        # A lone row of some size would be cut among the threads; it is summed as one of several is.
        out.entropy[block] = -terms.expand(max(terms.shape[0], 2), -1).sum(-1)[: terms.shape[0]]


def _gradient(dense: _Dense, slopes: RowSlopes, dx: Tensor) -> None:
    rows, g, e = dense.rows, slopes.g, slopes.e
    columns, inside = _columns(rows)
    one_hot = torch.where(inside, g, 0.0)[:, None]
    for block in _row_blocks(rows.num_rows, rows.logits.shape[1], rows.logits.device):
        z = _transformed(dense, block)
        log_p = z - slopes.lse[block, None]
        grad = log_p.exp()
        if e is None:
            grad.mul_(-g[block, None])
        else:
            tilt = log_p.clamp_(min=torch.finfo(log_p.dtype).min).add_(slopes.entropy[block, None])
            tilt.mul_(grad).mul_(-e[block, None])  # p first: 0 times the lowest number is 0, e times it infinite
            grad.mul_(-g[block, None]).add_(tilt)
        grad.scatter_add_(1, columns[block], one_hot[block])
        dx[block].copy_(_through_transform(grad, z, rows.transform, block))


def _columns(rows: RowChunk) -> tuple[Tensor, Tensor]:
    """(a column `[R, 1]` of each row, whether it is the target's `[R]`: the target may be outside)."""
    columns = rows.targets - rows.vocab_start
    inside = (columns >= 0) & (columns < rows.logits.shape[1])
    return columns.clamp(0, rows.logits.shape[1] - 1)[:, None], inside


def _transformed(dense: _Dense, rows: slice) -> Tensor:
    """Logits z of a block of raw products, -inf where padded; the block itself where there is nothing to do."""
    block, transform = dense.rows.logits[rows], dense.rows.transform
    bias = transform.bias
    z = block if bias is None else block + (bias if bias.dim() == 1 else bias[rows])
    if transform.head.logit_scale != 1.0:
        z = z * transform.head.logit_scale
    if transform.head.softcap is not None:
        z = (z / transform.head.softcap).tanh_().mul_(transform.head.softcap)
    temperature = _row_temperature(transform, rows)
    z = z if temperature is None else z / temperature
    return z if dense.valid is None else z.masked_fill(~dense.valid[rows], -torch.inf)


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


def _row_blocks(
    num_rows: int, num_columns: int, device: torch.device, at_least: int = MIN_ROW_BLOCK
) -> Iterator[slice]:
    step = max(at_least, TRAITS[device.type].row_block_elements // num_columns // at_least * at_least)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


# -- sums of gathered rows --------------------------------------------------------------------------------------------


def _entry_blocks(num_entries: int, like: Tensor) -> Iterator[slice]:
    """Entries whose gathered rows `[., H]` of `like` make a block."""
    step = max(TRAITS[like.device.type].row_block_elements // max(like.shape[1], 1), 1)
    for start in range(0, num_entries, step):
        yield slice(start, min(start + step, num_entries))


def _segment_sums(factors: Tensor, values: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """`[S, H]`: sum_j factors_j values[index_j] over offsets[s] <= j < offsets[s + 1], in the dtype of the factors.

    No atomic additions: one order, the same on every run. A segment that blocks cut apart is added up block by block.
    """
    sums = factors.new_zeros(offsets.numel() - 1, values.shape[1])
    blocks = list(_entry_blocks(factors.numel(), values))
    # The segments with entries in each block: those from `first` to `last`, the latter left out. A GPU is waited for.
    starts, stops = (
        torch.tensor(limits, device=offsets.device) for limits in ([b.start for b in blocks], [b.stop for b in blocks])
    )
    firsts, lasts = torch.searchsorted(offsets, starts, right=True) - 1, torch.searchsorted(offsets, stops)
    for block, (first, last) in zip(blocks, torch.stack([firsts, lasts], 1).tolist(), strict=True):
        inside = offsets[first : last + 1].clamp(block.start, block.stop) - block.start
        terms = values[index[block]].to(factors.dtype) * factors[block, None]
        sums[first:last] += torch.segment_reduce(terms, "sum", offsets=inside, axis=0, unsafe=True, initial=0.0)
    return sums


def _upcasts(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device's product cannot return float32 from this dtype, so that operands are upcast."""
    return dtype in (torch.bfloat16, torch.float16) and not TRAITS[device.type].wide_products


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """out (+)= left @ right by one library product, summed in float32 (float64), rounded once to the dtype of `out`."""
    if out.dtype == left.dtype and left.dtype.itemsize >= 4:
        add_product(out, left, right, overwrite=not accumulate)
    elif accumulate:
        torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
    elif out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)


def _vocab_blocks(weight: Tensor) -> Iterator[tuple[int, int]]:
    vocab, width = weight.shape
    step = max(256, UPCAST_BYTES // (4 * max(width, 128)) // 256 * 256)
    for start in range(0, vocab, step):
        yield start, min(start + step, vocab)


# -- float32 products that stay float32 where the process allows less -------------------------------------------------
#
# `torch.set_float32_matmul_precision("high" | "medium")` and the switches behind it let libraries round float32
# operands to TF32 (11 significant bits) or bf16 (8) before they multiply: 1e-3 in a logit. The switch is the whole
# process's, so turning it off for a product would race with whoever else multiplies at that moment. Instead operands
# are split into parts that the narrow format holds exactly, x = x_0 + x_1 + ..., largest first, and of the products of
# parts those are added up that float32 would not lose:
#
#     TF32: 22 of 24 bits in two parts, three products          bf16: 24 bits in three parts, six products
#
# Operands are split a block at a time: the parts of a whole head would be several times its size. On a GPU that is
# still faster than float32 without tensor cores. Where nothing is allowed it is one plain product.

_BITS = {"tf32": 11, "bf16": 8}


def operand_bits(device: torch.device) -> int:
    """Significant bits that the library may round float32 operands to; 24 where it may not."""
    return _BITS.get(getattr(TRAITS[device.type].float32_switch, "fp32_precision", "ieee"), 24)


def add_product(out: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
    """out `[M, N]` += left `[M, K]` @ right `[K, N]` (= if `overwrite`), all float32 or all float64."""
    bits = operand_bits(out.device)
    if bits == 24 or out.dtype != torch.float32:
        if overwrite:
            torch.mm(left, right, out=out)
        else:
            out.addmm_(left, right)
        return
    for rows, terms, columns, first in _blocks(
        left.shape[0], left.shape[1], right.shape[1], block_elements(out.device)
    ):
        lefts, rights = _parts(left[rows, terms], bits), _parts(right[terms, columns], bits)
        block = out[rows, columns]
        if overwrite and first:
            block.zero_()
        for i, left_part in reversed(list(enumerate(lefts))):  # the small ones first
            for right_part in reversed(rights[: len(rights) - i]):
                block.addmm_(left_part, right_part)


def block_elements(device: torch.device) -> int:
    """Elements of an operand that are split at a time."""
    return TRAITS[device.type].row_block_elements


def _split_bytes(device: torch.device) -> int:
    """Temporary memory of `add_product` at most: both operands' parts, and three tensors while one is being split."""
    bits = operand_bits(device)
    return 0 if bits == 24 else 4 * (2 * _num_parts(bits) + 3) * block_elements(device)


def _blocks(m: int, k: int, n: int, elements: int) -> Iterator[tuple[slice, slice, slice, bool]]:
    """(rows, terms, columns, whether the terms are the first) of products of operands of at most `elements` each."""
    steps = [m, k, n]
    while max(steps[0] * steps[1], steps[1] * steps[2]) > elements and max(steps) > 1:
        longest = steps.index(max(steps))
        steps[longest] = (steps[longest] + 1) // 2
    ranges = [range(0, size, step) if size else [0] for size, step in zip((m, k, n), steps, strict=True)]
    for i, j, at in itertools.product(ranges[0], ranges[2], ranges[1]):
        yield slice(i, i + steps[0]), slice(at, at + steps[1]), slice(j, j + steps[2]), at == 0


def _num_parts(bits: int) -> int:
    return -(-22 // bits)


def _parts(values: Tensor, bits: int) -> list[Tensor]:
    """float32 values as a sum of tensors with at most `bits` significant bits each, the largest first."""
    parts, rest = [], values
    for _ in range(_num_parts(bits)):
        # Truncated, so that a part never overflows; infinities and NaN stay what they are, in the first part only.
        part = (rest.contiguous().view(torch.int32) & -(1 << (24 - bits))).view(torch.float32)
        part = torch.where(rest.isfinite(), part, rest)
        parts.append(part)
        rest = torch.where(rest.isfinite(), rest - part, 0.0)
    return parts
