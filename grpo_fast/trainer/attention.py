"""Attention over packs that hold each prompt once: exact, without a [tokens, tokens] mask.

A pack is one row of T tokens: the prompt of a group, then its completions, then the next group. Everything but
attention is token by token, so it runs on the T tokens as they are and the prompt's work is done once a group. Only
attention needs to know who sees whom: completion s sees its prompt and itself. Here the pack's queries, keys and values
are *unshared*: gathered into S complete sequences (prompt + completion), over which plain causal attention is exact,
and one copy of each token's output is put back.

    pack     P P P a a b b b | Q Q c c        T tokens; positions 0 1 2 3 4 3 4 5 | 0 1 2 3
    unshared P P P a a . | P P P b b b | Q Q c c . .    S sequences, causal; `.` is right padding (sdpa only)

Implementations: `flash_attention_2` (flash-attn's varlen kernel), `varlen` (torch's own), both on GPUs and without
padding, and `sdpa`, whose right padding needs no mask since a causal query never looks to its right. Sliding windows
are honoured; what none of this knows (chunked or linear attention, sinks, position biases) is refused, and
`check_packed_attention` compares a pack with plain forwards once a run, so nothing is silently wrong.

Legend: T pack tokens, S sequences, L the longest sequence, N unshared tokens (S * L if padded), h heads, d head size.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grpo_fast.trainer.errors import ModelError

NAME = "grpo_fast_packed"
"""The name under which transformers knows this attention."""
DECODE = "grpo_fast_decode"
"""The name of `decode_attention`, for sampling on a CPU."""
WRITTEN_OUT_LENGTH = 192
"""Of sequences in 16 bit whose attention a CPU does in plain products."""
# Keyword arguments of transformers' attention functions that would change the result and are not handled here.
_REFUSED = ("s_aux", "position_bias", "block_mask")


@dataclass(frozen=True)
class PackLayout:
    """Who sees whom in a pack; the keyword argument `pack_layout` of the model.

    Attributes:
        source: `[N]` the pack token at each unshared position (any token where padded).
        place: `[T]` one unshared position of each pack token.
        shared: `[U]` pack tokens that occur more than once (prompts of several completions).
        copies: `[U, C]` their other unshared positions, and `is_copy` `[U, C]` which of them exist.
        cu_seqlens: `[S+1]` int32 bounds of the sequences among the N positions (not padded), else None.
        padding_fraction: share of the N positions that are padding.
        num_sequences: S.
        max_length: L.
        implementation: `sdpa`, `varlen` or `flash_attention_2`.
    """

    source: Tensor
    place: Tensor
    shared: Tensor
    copies: Tensor
    is_copy: Tensor
    cu_seqlens: Tensor | None
    padding_fraction: float
    num_sequences: int
    max_length: int
    implementation: str

    @staticmethod
    def build(sequences: Sequence[Sequence[range]], num_tokens: int, *, implementation: str) -> PackLayout:
        """The layout of `num_tokens` pack tokens in which sequence s is the concatenation of the ranges
        `sequences[s]`; every pack token belongs to at least one sequence. It is on the CPU (`tensors`, `with_tensors`).
        """
        padded = implementation == "sdpa"
        indices = [torch.cat([torch.arange(part.start, part.stop) for part in parts]) for parts in sequences]
        lengths = [len(index) for index in indices]
        longest = max(lengths, default=0)
        if padded:
            source = torch.zeros(len(indices), longest, dtype=torch.int64)
            for row, index in zip(source, indices, strict=True):
                row[: len(index)] = index
            source = source.flatten()
            starts = [number * longest for number in range(len(indices))]
        else:
            source = torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64)
            starts = list(accumulate(lengths[:-1], initial=0))
        positions = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        place, shared, copies, is_copy = _occurrences(torch.cat(indices), torch.cat(positions), num_tokens)
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return PackLayout(
            source=source,
            place=place,
            shared=shared,
            copies=copies,
            is_copy=is_copy,
            cu_seqlens=None if padded else bounds,
            padding_fraction=1.0 - sum(lengths) / source.numel() if source.numel() else 0.0,
            num_sequences=len(indices),
            max_length=longest,
            implementation=implementation,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: dict[str, Any]) -> PackLayout:
        """The layout with other tensors, `tensors()` on a device."""
        return replace(self, **tensors)


def _occurrences(tokens: Tensor, positions: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`place, shared, copies, is_copy` of `PackLayout`, from the pack token at each (unpadded) position."""
    order = torch.argsort(tokens, stable=True)
    counts = torch.bincount(tokens, minlength=num_tokens)
    assert bool((counts > 0).all()), "a pack token belongs to no sequence"
    first = counts.cumsum(0) - counts
    place = positions[order[first]]
    shared = torch.nonzero(counts > 1).flatten()
    others = torch.arange(1, max(int(counts.max()), 1))[None, :]
    is_copy = others < counts[shared][:, None]
    copies = positions[order[torch.where(is_copy, first[shared][:, None] + others, 0)]]
    return place, shared, copies, is_copy


class _Unshare(torch.autograd.Function):
    """`[T, ...]` to `[N, ...]`. The backward sums the copies in a fixed order and in float32: an indexed add would be
    atomic on a GPU, so not repeatable, and would round to 16 bit after every copy."""

    @staticmethod
    def forward(ctx, packed: Tensor, layout: PackLayout) -> Tensor:  # type: ignore[override]
        ctx.layout = layout
        return packed[layout.source]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        layout = ctx.layout
        total = grad[layout.place]
        if layout.shared.numel():
            is_copy = layout.is_copy.view(*layout.is_copy.shape, *[1] * (grad.dim() - 1))
            others = torch.where(is_copy, grad[layout.copies], 0.0).sum(1, dtype=torch.float32)
            total[layout.shared] = (total[layout.shared].float() + others).to(grad.dtype)
        return total, None


class _Share(torch.autograd.Function):
    """`[N, ...]` to `[T, ...]`: one copy of every token; the others' outputs are equal, so they get no gradient."""

    @staticmethod
    def forward(ctx, unshared: Tensor, layout: PackLayout) -> Tensor:  # type: ignore[override]
        ctx.layout, ctx.size = layout, unshared.shape[0]
        return unshared[layout.place]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.new_zeros(ctx.size, *grad.shape[1:])
        return total.index_copy_(0, ctx.layout.place, grad), None


@dataclass(frozen=True)
class _Options:
    """What a layer asks of its attention: score factor, window in tokens, score cap, dropout probability."""

    scale: float
    window: int | None
    softcap: float | None
    dropout: float


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    pack_layout: PackLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over a pack: query `[1, h, T, d]`, key and value `[1, h_kv, T, d]`.

    Returns:
        `[1, T, h, d]` and None.

    Raises:
        ModelError: the layout did not reach this layer, or the model asks for something not supported here.
    """
    if pack_layout is None:
        raise ModelError(f"{type(module).__name__}: the pack's layout did not reach it; this model cannot be packed")
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ModelError(f"{type(module).__name__}: packed attention does not support {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = _Options(scale, sliding_window, softcap, dropout)
    q, k, v = (_Unshare.apply(states[0].transpose(0, 1), pack_layout) for states in (query, key, value))
    out = _KERNELS[pack_layout.implementation](q, k, v, pack_layout, options)
    return _Share.apply(out, pack_layout)[None], None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, options: _Options) -> Tensor:
    """Causal attention over `[S * L, h, d]`: torch's SDPA, or written out where a score cap forbids that."""
    shape = (layout.num_sequences, layout.max_length)
    dtype = q.dtype
    written_out = options.softcap is not None
    if q.device.type == "cpu":
        # Forward and backward of 48 sequences of 69 tokens, 9 heads on 3 of size 64, on two EPYC cores with AVX-512
        # BF16: torch's kernel takes 61 ms in bfloat16 and 27 ms in float32, plain products in bfloat16 take 7. At 256
        # tokens a sequence they are even, at 1024 the kernel is 2.8 times faster.
        written_out |= dtype != torch.float32 and layout.max_length <= WRITTEN_OUT_LENGTH
        if not written_out:
            q, k, v = q.float(), k.float(), v.float()
    q, k, v = (states.view(*shape, *states.shape[1:]).transpose(1, 2) for states in (q, k, v))
    mask = _window_mask(layout.max_length, options.window, q.device)
    if written_out:
        out = _written_out(q, k, v, mask, options)
    else:
        grouped = q.shape[1] != k.shape[1]
        if grouped and mask is not None:
            # SDPA's fused kernels take grouped heads or a mask, not both.
            k, v, grouped = _repeat_heads(k, q, 1), _repeat_heads(v, q, 1), False
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=options.scale,
            dropout_p=options.dropout,
            enable_gqa=grouped,
        )
    return out.transpose(1, 2).flatten(0, 1).to(dtype)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """`[L, L]` bool, True within the last `window` positions; None where plain causal attention is the same."""
    if window is None or window >= length:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
    """Attention in plain products, `[S, h, L, d]`, as transformers' eager one: scores in the states' dtype, softmax in
    float32. With a score cap they are `softcap * tanh(scores / softcap)` (Gemma 2).
    """
    sequences, heads, length, size = q.shape
    kv_heads = k.shape[1]
    # The heads that share a key are rows of one product.
    scores = ((q * options.scale).reshape(sequences, kv_heads, -1, size) @ k.transpose(-1, -2)).float()
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.view(sequences, heads, length, length).masked_fill(~mask, -torch.inf)
    weights = functional.dropout(scores.softmax(-1).to(q.dtype), p=options.dropout)
    return (weights.view(sequences, kv_heads, -1, length) @ v).view(q.shape)


def _repeat_heads(states: Tensor, query: Tensor, dim: int) -> Tensor:
    return states.repeat_interleave(query.shape[dim] // states.shape[dim], dim)


def _flash(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, options: _Options) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    bounds, longest = layout.cu_seqlens, layout.max_length
    window = (-1, -1) if options.window is None else (options.window - 1, 0)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        dropout_p=options.dropout,
        softmax_scale=options.scale,
        causal=True,
        window_size=window,
        softcap=options.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, options: _Options) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if options.softcap is not None or options.dropout:
        missing = "score cap" if options.softcap is not None else "attention dropout"
        raise ModelError(f"model.attn_implementation: varlen has no {missing}; set it to sdpa or flash_attention_2")
    bounds, longest = layout.cu_seqlens, layout.max_length
    assert bounds is not None
    window = (-1 if options.window is None else options.window - 1, 0)
    # torch 2.11's has no grouped heads.
    k, v = _repeat_heads(k, q, 1), _repeat_heads(v, q, 1)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=options.scale, window_size=window)
    assert isinstance(out, Tensor)  # it returns more only if asked to
    return out


_KERNELS = {"sdpa": _sdpa, "flash_attention_2": _flash, "varlen": _varlen}


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, except for one query a sequence: then two batched products over grouped heads.

    torch's fused CPU kernel repeats the key and value heads for that (at B = 64, 9 heads on 3, 60 positions, bfloat16
    on one core: 3.2 ms, this 0.3 ms).
    """
    batch, heads, length, size = query.shape
    if length != 1 or any(kwargs.get(name) is not None for name in (*_REFUSED, "softcap")):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], size)
    scores = (grouped @ key.transpose(-1, -2)).float() * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        # Not -inf: a row that sees nothing (left padding) must stay finite, as its values are later multiplied by 0.
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1).to(value.dtype) @ value).view(batch, 1, heads, value.shape[-1]), None


# ---- which implementation -------------------------------------------------------------------------------------------


def implementations(requested: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The packed attentions to try, best first: the one asked for, or with `auto` all that are present.

    Raises:
        ModelError: the one asked for cannot run here, with the reason.
    """
    fused = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    has_flash = importlib.util.find_spec("flash_attn") is not None
    has_varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None and _has_flash_kernels(device)
    available = {"flash_attention_2": fused and has_flash, "varlen": fused and has_varlen, "sdpa": True}
    if requested == "auto":
        return [name for name, present in available.items() if present]
    if not available[requested]:
        missing = "a GPU and a 16-bit dtype" if not fused else "the flash-attn package" if not has_flash else "sm_80"
        raise ModelError(f"model.attn_implementation: {requested} needs {missing}; set it to sdpa or auto")
    return [requested]


def _has_flash_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def register() -> None:
    """Make `NAME` and `DECODE` known to transformers; without a mask function for `NAME` it builds no mask there."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionInterface.register(DECODE, decode_attention)
    AttentionMaskInterface.register(DECODE, sdpa_mask)


@contextlib.contextmanager
def attention_set_to(model: Any, name: str) -> Iterator[None]:
    """Run the body with transformers' attention `name` (`sdpa` to generate, `NAME` for packs)."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    configs = {key: config for key, config in configs.items() if hasattr(config, "_attn_implementation_internal")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
