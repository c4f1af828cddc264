"""Shared test data: random but realistic loss inputs in both layouts, the objective matrix, the tolerance table.

Legend: T packed tokens, H hidden size, V vocabulary, S sequences, L padded length.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.losses import LOSS_TYPES, LOSSES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton kernels run on the CPU, by its interpreter."""
BACKENDS = ("triton",) if INTERPRETED else ("cpu", "torch")
"""Backends that run on this machine."""

# -- tolerances -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """What a dtype may differ from the float64 oracle by; an error above `floor` may still be twice plain eager's."""

    floor: float
    """Relative RMS error of losses and gradients."""
    logprob_nats: float
    """RMS error of logprobs and entropies, nats, on the same (rounded) inputs."""


# bf16 and fp16 gradients are returned in that dtype: their floor is about twice the rounding of dz and of the result.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(floor=1e-10, logprob_nats=1e-10),
    torch.float32: Tolerance(floor=1e-5, logprob_nats=1e-5),
    torch.bfloat16: Tolerance(floor=4e-3, logprob_nats=2e-3),
    torch.float16: Tolerance(floor=1e-3, logprob_nats=2e-3),
}


def rel_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of `expected`, in float64; inf where only `expected` is all zero.

    A zeroed result scores 1, and NaN propagates, so test with `rel_rms(...) <= bound`.
    """
    assert actual.shape == expected.shape, f"shape: expected {list(expected.shape)}, got {list(actual.shape)}"
    if expected.numel() == 0:
        return 0.0
    expected = expected.detach().double()
    error = (actual.detach().to(expected.device).double() - expected).square().mean().sqrt()
    scale = expected.square().mean().sqrt()
    if scale == 0:
        return 0.0 if error == 0 else float("nan" if error.isnan() else "inf")
    return float(error / scale)


def assert_close(name: str, actual: Tensor, expected: Tensor, *, eager: Tensor | None = None) -> None:
    """Assert the relative RMS error that the actual tensor's dtype allows (at most 2x that of `eager`, if given)."""
    bound = TOLERANCES[actual.dtype].floor
    if eager is not None:
        bound = max(bound, 2 * rel_rms(eager, expected))
    error = rel_rms(actual, expected)
    assert error <= bound, f"{name}: relative RMS error {error:.3e} > {bound:.3e} ({actual.dtype})"


# -- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What `HeadConfig` says, for tests of rooms that must not import it."""

    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Case:
    """Inputs of the loss; packed (`[T, ...]` with `cu_seqlens`), or padded (`[S, L, ...]`, `cu_seqlens` None)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    advantages: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor | None
    old_logprobs: Tensor
    ref_logprobs: Tensor
    sampling_logprobs: Tensor
    logprobs: Tensor
    """The true ones, `logprobs` and `entropy` being those of float64 arithmetic on this case's rounded inputs."""
    entropy: Tensor
    head: Head
    temperature: float

    def map(self, function) -> Case:
        """A copy with `function` applied to every tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(v) for name, v in tensors.items() if isinstance(v, Tensor)})

    def double(self) -> Case:
        """The same numbers in float64: the oracle's inputs."""
        return self.map(lambda v: v.double() if v.is_floating_point() else v)

    def leaves(self) -> dict[str, Tensor]:
        """Fresh leaf copies of hidden, weight and (if any) bias that require gradients."""
        tensors = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: v.detach().clone().requires_grad_() for name, v in tensors.items() if v is not None}

    def policy_inputs(self, config: Any, *, on_policy: bool = False) -> dict[str, Tensor | None]:
        """The keyword tensors that `config` (an object, or kwargs of one) needs; `on_policy` leaves `old` out."""
        get = config.get if isinstance(config, dict) else lambda name, default: getattr(config, name, default)
        needs_sampling = (
            get("importance_sampling_mode", None) is not None
            or get("off_policy_mask_threshold", None) is not None
            or "sampling_logprobs" in LOSSES[get("loss_type", "dapo")].reads
        )
        return {
            "cu_seqlens": self.cu_seqlens,
            "loss_mask": self.loss_mask,
            "old_logprobs": None if on_policy else self.old_logprobs,
            "ref_logprobs": self.ref_logprobs if get("beta", 0.0) else None,
            "sampling_logprobs": self.sampling_logprobs if needs_sampling else None,
        }


def _drifted(logprobs: Tensor, lengths: Tensor, generator: torch.Generator, *, sequence: float, token: float) -> Tensor:
    """Another policy's logprobs: a drift a sequence, one a token, and one token in ten thrice as far off."""
    num_tokens, wide = logprobs.numel(), {"dtype": torch.float64, "device": logprobs.device}
    drift = token * torch.randn(num_tokens, generator=generator, **wide)
    drift *= torch.where(torch.rand(num_tokens, generator=generator, device=logprobs.device) < 0.1, 3.0, 1.0)
    shift = sequence * torch.randn(lengths.numel(), generator=generator, **wide)
    return (logprobs + drift + shift.repeat_interleave(lengths)).clamp(max=-1e-4)


def make_case(
    seed: int = 0,
    lengths: Sequence[int] = (9, 1, 14, 0, 6, 11, 3, 8, 12, 5, 10, 7),
    hidden_size: int = 32,
    vocab: int = 97,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    masked_fraction: float = 0.15,
    masked_sequence: bool = True,
    zero_advantages: float = 0.0,
    token_advantages: bool = False,
    missing_sampling: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    logit_std: float = 2.5,
    device: str | torch.device = "cpu",
) -> Case:
    """A packed case of `len(lengths)` sequences, made on its device; the same for the same arguments there.

    Logits have standard deviation `logit_std`, twice that on a third of the rows (confident tokens); targets are drawn
    from the distribution. The drift of old, ref and sampling logprobs puts a fair share of the tokens and sequences
    outside either clip bound, either correction bound and the off-policy threshold of `OBJECTIVES`.

    Args:
        dtype: of hidden, weight and bias; everything else is float64 for float64, otherwise float32.
        masked_fraction: share of tokens with a False `loss_mask` (think of tool output).
        masked_sequence: mask the last sequence altogether.
        zero_advantages: share of the sequences whose advantage is exactly 0.
        token_advantages: `[T]` advantages, which vary in sign within a sequence, instead of `[S]`.
        missing_sampling: share of the sampling logprobs that are NaN.
    """
    gen = torch.Generator(device).manual_seed(seed)
    sizes = torch.tensor(list(lengths), dtype=torch.int64, device=device)
    num_tokens, num_sequences = int(sizes.sum()), sizes.numel()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64, device=device)

    def chosen(share: float, count: int) -> Tensor:
        return torch.rand(count, generator=gen, device=device) < share

    sharpness = torch.where(chosen(1 / 3, num_tokens), 2.0, 1.0)[:, None] * logit_std * temperature / logit_scale
    hidden = (normal(num_tokens, hidden_size) * sharpness / hidden_size**0.5).to(dtype)
    weight = normal(vocab, hidden_size).to(dtype)
    bias_vector = (0.5 * normal(vocab)).to(dtype)

    logits = hidden.double() @ weight.double().T + (bias_vector.double() if bias else 0.0)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probabilities = torch.log_softmax(logits / temperature, dim=-1)
    probabilities = log_probabilities.exp()
    # Inverse-CDF sampling: torch.multinomial refuses an empty batch.
    draws = torch.rand(num_tokens, 1, generator=gen, dtype=torch.float64, device=device)
    targets = (probabilities.cumsum(-1) < draws).sum(-1).clamp(max=vocab - 1)
    logprobs = log_probabilities.gather(-1, targets[:, None]).squeeze(-1)
    entropy = -(probabilities * log_probabilities).sum(-1)

    old = _drifted(logprobs, sizes, gen, sequence=0.2, token=0.3)
    ref = _drifted(logprobs, sizes, gen, sequence=0.3, token=0.4)
    sampling = _drifted(old, sizes, gen, sequence=0.15, token=0.25)
    sampling[chosen(missing_sampling, num_tokens)] = torch.nan

    advantages = normal(num_tokens if token_advantages else num_sequences)
    advantages[chosen(zero_advantages, advantages.numel())] = 0.0
    loss_mask = ~chosen(masked_fraction, num_tokens)
    if masked_sequence and num_sequences:
        loss_mask[num_tokens - int(sizes[-1]) :] = False

    side = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        hidden=hidden,
        weight=weight,
        bias=bias_vector if bias else None,
        targets=targets,
        advantages=advantages.to(side),
        loss_mask=loss_mask,
        cu_seqlens=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
        old_logprobs=old.to(side),
        ref_logprobs=ref.to(side),
        sampling_logprobs=sampling.to(side),
        logprobs=logprobs.to(side),
        entropy=entropy.to(side),
        head=Head(logit_scale, softcap),
        temperature=temperature,
    )


def to_padded(values: Tensor, cu_seqlens: Tensor, *, fill: float = 0.0) -> Tensor:
    """Packed `[T, ...]` to `[S, L, ...]`, sequences left-aligned, L one more than the longest, `fill` elsewhere."""
    bounds = cu_seqlens.tolist()
    width = max((end - begin for begin, end in pairwise(bounds)), default=0) + 1
    out = values.new_full((len(bounds) - 1, width, *values.shape[1:]), fill)
    for row, (begin, end) in enumerate(pairwise(bounds)):
        out[row, : end - begin] = values[begin:end]
    return out


def to_packed(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Undo `to_padded`."""
    bounds = cu_seqlens.tolist()
    return torch.cat([values[row, : end - begin] for row, (begin, end) in enumerate(pairwise(bounds))])


def padded(case: Case, *, fill_hidden: float = 7.0, fill_target: int = 0, fill_logprob: float = 0.0) -> Case:
    """The same data in the padded layout; the padding holds the `fill_*` values and is masked out."""
    cu_seqlens = case.cu_seqlens
    assert cu_seqlens is not None, "the case is already padded"
    fills: dict[str, float] = {"hidden": fill_hidden, "targets": fill_target, "loss_mask": False, "entropy": 0.0}
    logprob_names = ("old_logprobs", "ref_logprobs", "sampling_logprobs", "logprobs")
    fills.update(dict.fromkeys(logprob_names, fill_logprob))
    if case.advantages.numel() == case.targets.numel() != cu_seqlens.numel() - 1:
        fills["advantages"] = 0.0
    changes: dict[str, Any] = {
        name: to_padded(getattr(case, name), cu_seqlens, fill=fill) for name, fill in fills.items()
    }
    return replace(case, cu_seqlens=None, **changes)


# -- objective matrix -------------------------------------------------------------------------------------------------

_REQUIRED = {"max_completion_length": 24, "epsilon_high": 1.25}
_LOSS_TYPES: dict[str, dict[str, Any]] = {
    name: {option: _REQUIRED[option] for option in LOSSES[name].requires} for name in LOSS_TYPES
}
_LEVELS = ("token", "sequence", "sequence_token")
_KL: dict[str, dict[str, Any]] = {
    "nokl": {},
    "k1": {"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": False},
    "k2c": {"beta": 0.1, "kl_estimator": "k2", "use_bias_correction_kl": True},
    "k3": {"beta": 0.1, "kl_estimator": "k3", "use_bias_correction_kl": False},
    "k3c": {"beta": 0.1, "kl_estimator": "k3", "use_bias_correction_kl": True},
}
_CORRECTIONS: dict[str, dict[str, Any]] = {
    "nocorr": {},
    "ttrunc": {
        "importance_sampling_mode": "token_truncate",
        "importance_sampling_clip_min": 0.8,
        "importance_sampling_clip_max": 1.3,
    },
    "tmask": {
        "importance_sampling_mode": "token_mask",
        "importance_sampling_clip_min": 0.6,
        "importance_sampling_clip_max": 1.6,
    },
    "strunc": {"importance_sampling_mode": "sequence_truncate", "importance_sampling_clip_max": 1.5},
    "smask": {"importance_sampling_mode": "sequence_mask"},
}
_MASKS: dict[str, dict[str, Any]] = {
    "nomask": {},
    "offpol": {"off_policy_mask_threshold": 0.02},
    "topent": {"top_entropy_quantile": 0.6},
    "offpol_topent": {"off_policy_mask_threshold": 0.02, "top_entropy_quantile": 0.6},
}
_EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bonus": {"entropy_coef": 0.05},
    "delta": {"delta": 1.4, "epsilon": 0.15, "epsilon_high": 0.28},
    "bonus_delta": {"entropy_coef": 0.05, "delta": 1.5},
}
AXES: dict[str, tuple[str, ...]] = {
    "loss_type": tuple(_LOSS_TYPES),
    "level": _LEVELS,
    "kl": tuple(_KL),
    "correction": tuple(_CORRECTIONS),
    "mask": tuple(_MASKS),
    "extra": tuple(_EXTRAS),
}


def objective_rows() -> list[tuple[str, ...]]:
    """The matrix as names, one per axis: six rows a loss type, strides chosen so that every pair of values meets."""
    rows = []
    for i, loss_type in enumerate(_LOSS_TYPES):
        for j in range(6):
            correction = (3 * i + j) % 5
            mode = list(_CORRECTIONS.values())[correction].get("importance_sampling_mode")
            if mode not in (None, *LOSSES[loss_type].importance_sampling_modes):  # vespo takes those of tokens only
                correction -= 2
            names = [list(axis) for axis in list(AXES.values())[1:]]
            strides = (2 * j % 3, (3 * i + 2 * j) % 5, correction, (3 * i + 3 * j) % 4, (2 * i + 3 * j) % 4)
            rows.append((loss_type, *(axis[k] for axis, k in zip(names, strides, strict=True))))
    return rows


def objective_kwargs(loss_type: str, level: str, kl: str, correction: str, mask: str, extra: str) -> dict[str, Any]:
    """`LossConfig` keywords from one name an axis."""
    parts = [_KL[kl], _CORRECTIONS[correction], _MASKS[mask], _EXTRAS[extra], _LOSS_TYPES[loss_type]]
    kwargs: dict[str, Any] = {"loss_type": loss_type, "importance_sampling_level": level}
    for part in parts:
        kwargs.update(part)
    return kwargs


OBJECTIVES = [pytest.param(objective_kwargs(*row), id="-".join(row)) for row in objective_rows()]
"""`LossConfig` keyword dicts covering every pair of AXES values; use with `@pytest.mark.parametrize("kwargs", ...)`."""
