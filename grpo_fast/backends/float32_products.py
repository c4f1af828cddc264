"""float32 matrix products that stay float32 where the process allows less.

`torch.set_float32_matmul_precision("high" | "medium")` and the switches behind it let libraries round float32 operands
to TF32 (11 significant bits) or bf16 (8) before they multiply: 1e-3 in a logit. The switch is the whole process's, so
turning it off for a product would race with whoever else multiplies at that moment. Instead operands are split into
parts that the narrow format holds exactly, x = x_0 + x_1 + ..., largest first, and of the products of parts those are
added up that float32 would not lose:

    TF32: 22 of 24 bits in two parts, three products          bf16: 24 bits in three parts, six products

Operands are split a block at a time: the parts of a whole head would be several times its size. On a GPU that is still
faster than float32 without tensor cores. Where nothing is allowed it is one plain product.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from grpo_fast.backends.devices import TRAITS

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


def scratch_bytes(device: torch.device) -> int:
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
    for i, j, at in product(ranges[0], ranges[2], ranges[1]):
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
