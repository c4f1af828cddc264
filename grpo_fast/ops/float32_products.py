"""float32 matrix products that stay float32 where the process allows less.

`torch.set_float32_matmul_precision("high" | "medium")` and the switches behind it let libraries round float32 operands
to TF32 (11 significant bits) or bf16 (8) before they multiply: 1e-3 in a logit. The switch is the whole process's, so
turning it off for a product would race with whoever else multiplies at that moment. Instead operands are split into
parts that the narrow format holds exactly, x = x_0 + x_1 + ..., largest first, and of the products of parts those are
added up that float32 would not lose:

    TF32: 22 of 24 bits in two parts, three products          bf16: 24 bits in three parts, six products

On a GPU that is still faster than float32 without tensor cores. Where nothing is allowed it is one plain product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.ops.devices import traits

_BITS = {"tf32": 11, "bf16": 8}


def operand_bits(device: torch.device) -> int:
    """Significant bits that the library may round float32 operands to; 24 where it may not."""
    return _BITS.get(getattr(traits(device).float32_switch, "fp32_precision", "ieee"), 24)


def add_product(out: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
    """out `[M, N]` += left `[M, K]` @ right `[K, N]` (= if `overwrite`), all float32 or all float64."""
    bits = operand_bits(out.device)
    if bits == 24 or out.dtype != torch.float32:
        if overwrite:
            torch.mm(left, right, out=out)
        else:
            out.addmm_(left, right)
        return
    lefts, rights = _parts(left, bits), _parts(right, bits)
    if overwrite:
        out.zero_()
    for i, left_part in reversed(list(enumerate(lefts))):  # the small ones first
        for right_part in reversed(rights[: len(rights) - i]):
            out.addmm_(left_part, right_part)


def _parts(values: Tensor, bits: int) -> list[Tensor]:
    """float32 values as a sum of tensors with at most `bits` significant bits each, the largest first."""
    parts, rest = [], values
    for _ in range(-(-22 // bits)):
        # Truncated, so that a part never overflows; infinities and NaN stay what they are, in the first part only.
        part = (rest.contiguous().view(torch.int32) & -(1 << (24 - bits))).view(torch.float32)
        part = torch.where(rest.isfinite(), part, rest)
        parts.append(part)
        rest = torch.where(rest.isfinite(), rest - part, 0.0)
    return parts
