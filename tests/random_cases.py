"""Random small configurations of the loss, whole: a number draws the settings, the settings draw the tensors.

Legend: T packed tokens, S sequences, B x L the padded layout, H hidden size, V vocabulary. The same number gives the
same case on every machine, whatever other numbers are drawn, so that a failing case is repeated by its number alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from grpo_fast.backends.base import get_backend, resolve_backend
from grpo_fast.config import KL_ESTIMATORS, LOSS_TYPES, HeadConfig, LossConfig
from grpo_fast.losses import LOSSES
from grpo_fast.ops.call import workspace_for
from grpo_fast.packing import Support
from grpo_fast.reference import reference_logprobs
from tests.cases import INTERPRETED
from tests.reference_metrics import TokenData, couples_tokens
from tests.supports import draw_support

MAX_TOKENS = 60
IGNORED = -100
NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One case. What stands at its default is not printed.

    Attributes:
        call: "grpo_loss", "token_logprobs" or "policy_loss".
        device: "cpu", or "stand-in" for a GPU on CPU tensors.
        rows: of logits that the workspace holds (a tile has 16).
        grads: which inputs require gradients.
        forbidden: last tokens of the vocabulary that a bias of -inf takes out.
        mask: None or the kind of `loss_mask`. ignore: some targets are `ignore_index`, which masks them, too.
        junk: masked positions hold anything.
        masked: share of tokens.
        advantages: "[S]", "[S, 1]", "token" or "[1, T]".
        drift: nats a token between the policies.
        sampling: None, "known" or "some" (NaN elsewhere).
        views: strided arguments, as (name, kind).
        poison: (argument, value) at one token, which must be counted.
        support: a mixture of `tests/supports.py`, or None. Drawn by nobody here: `supports.with_support` puts it there.
        prefix: an extra leading dimension of `token_logprobs`.
    """

    number: int
    call: str = "grpo_loss"
    config: LossConfig
    backend: str
    device: str = "cpu"
    plan: str = "auto"
    rows: int = 1000
    dtype: torch.dtype = torch.float64
    lengths: tuple[int, ...]
    padding: int | None = None
    implicit_sequence: bool = False
    hidden_size: int
    vocab: int
    grads: tuple[str, ...] = ("hidden", "weight")
    bias: bool = False
    forbidden: int = 0
    logit_scale: float = 1.0
    softcap: float | None = None
    row_temperature: bool = False
    mask: str | None = None
    ignore: bool = False
    ignore_index: int | None = -100
    junk: bool = False
    masked: float = 0.0
    advantages: str = "[S]"
    zero_advantages: float = 0.0
    on_policy: bool = False
    drift: float = 0.3
    sampling: str | None = None
    normalizer: float | None = None
    entropy_normalizer: float | None = None
    tensor_normalizers: bool = False
    upstream: float = 1.0
    main_grad: bool = False
    views: tuple[tuple[str, str], ...] = ()
    poison: tuple[str, float] | None = None
    prefix: bool = False
    entropy_output: bool = True
    support: str | None = None

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default]
        values = {f.name: getattr(self, f.name) for f in changed if f.name != "config"}
        usual = LossConfig()
        config = [f for f in fields(LossConfig) if getattr(self.config, f.name) != getattr(usual, f.name)]
        values["config"] = "LossConfig(" + ", ".join(f"{f.name}={getattr(self.config, f.name)!r}" for f in config) + ")"
        return "Settings(" + ", ".join(f"{name}={value}" for name, value in values.items()) + ")"

    @property
    def head(self) -> HeadConfig:
        return HeadConfig(logit_scale=self.logit_scale, softcap=self.softcap)

    @property
    def padded(self) -> bool:
        return self.padding is not None

    @property
    def width(self) -> int:
        """L."""
        assert self.padding is not None
        return max(self.lengths, default=0) + self.padding

    @property
    def shape(self) -> tuple[int, ...]:
        """Of targets."""
        return (len(self.lengths), self.width) if self.padded else (sum(self.lengths),)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(first, last + 1) of every sequence among the flattened tokens."""
        sizes = [self.width] * len(self.lengths) if self.padded else self.lengths
        return list(pairwise(accumulate(sizes, initial=0)))

    @property
    def per_token(self) -> bool:
        """Whether advantages are seen to be one a token: one of a sequence of one token is a sequence's."""
        num_tokens, num_sequences = math.prod(self.shape), len(self.lengths)
        if self.padded:
            return self.advantages == "token" and self.width != 1
        if self.advantages == "token":
            return num_tokens != num_sequences
        return self.advantages == "[1, T]" and not num_tokens == num_sequences == 1

    @property
    def served_by(self) -> str:
        """The backend's name, but torch's for float64."""
        return resolve_backend(self.backend, torch.device("cpu"), self.dtype)

    @property
    def workspace_bytes(self) -> int:
        return workspace_for(self.served_by, self.vocab, self.dtype, torch.device("cpu"), self.rows)


class Draw(random.Random):
    """Python's generator with the two questions that are asked of it."""

    def chance(self, share: float) -> bool:
        return self.random() < share

    def one_of(self, choices: Sequence[str]) -> str:
        """Any of them, by one number whatever their count: the rest of a case does not depend on it."""
        return choices[int(self.random() * len(choices))]

    def pick(self, *choices: Any, usual: float = 0.0) -> Any:
        """One of the choices, the first with probability `usual`, else any."""
        return choices[0] if self.chance(usual) else self.choice(choices)


def draw_settings(number: int, backends: tuple[str, ...], devices: Sequence[str] = ("cpu",)) -> Settings:
    """The settings of case `number`."""
    d = Draw(number)
    call = d.choices(("grpo_loss", "token_logprobs", "policy_loss"), (80, 12, 8))[0]
    config = draw_config(d)
    backend, device = d.one_of(backends), d.one_of(devices)
    if device != "cpu" and backend == "cpu":  # GPUs do not have it
        backend = "torch"
    wide_share = (10, 55, 0, 35) if INTERPRETED else (54, 18, 12, 16)
    dtype = d.choices((torch.float64, torch.float32, torch.bfloat16, torch.float16), wide_share)[0]
    lengths, padding = draw_lengths(d)
    mask = d.pick(None, "bool", "int64", "uint8", "float", usual=0.3)
    ignore = d.chance(0.15)
    masked = d.pick(0.2, 0.0, 0.6, 1.0, usual=0.6) if mask is not None or ignore else 0.0
    if padding is not None and mask is None and not ignore:  # every position is a token
        lengths, padding = (max(lengths, default=0),) * len(lengths), 0
    bias, softcap, scale = d.chance(0.4), d.pick(None, 5.0, 20.0, usual=0.6), d.pick(1.0, 0.5, 2.0, -0.7, usual=0.5)
    vocab = d.pick(*((1, 2) if dtype == torch.float64 else ()), 7, 19, 31, 64, 97, 128, 129, 200, 257, 300, 300)
    can_forbid = bias and softcap is None and scale > 0 and vocab > 1
    settings = Settings(
        number=number,
        call=call,
        config=config,
        backend=backend,
        device=device,
        rows=d.pick(16, 32, 48, 1000, usual=0.4),
        dtype=dtype,
        lengths=lengths,
        padding=padding,
        implicit_sequence=len(lengths) == 1 and padding is None and d.chance(0.5),
        hidden_size=d.pick(1, 3, 8, 16, 24),
        vocab=vocab,
        grads=draw_grads(d, bias),
        bias=bias,
        forbidden=d.randint(1, vocab - 1) if can_forbid and d.chance(0.2) else 0,
        logit_scale=scale,
        softcap=softcap,
        row_temperature=d.chance(0.3),
        mask=mask,
        ignore=ignore,
        ignore_index=d.pick(-100, -5, usual=0.5) if ignore else d.pick(None, -100),
        junk=d.chance(0.5),
        masked=masked,
        zero_advantages=d.pick(0.0, 0.4, 1.0, usual=0.3),
        on_policy=d.chance(0.25),
        drift=d.pick(0.3, 0.05, 2.0, 9.0, usual=0.8),
        sampling=draw_sampling(d, config),
        normalizer=d.pick(None, 1.0, 37.5, 0.01, 1e6, usual=0.4),
        entropy_normalizer=d.pick(None, 1.0, 41.0, 1e5, usual=0.4),
        tensor_normalizers=d.chance(0.5),
        upstream=d.pick(1.0, 0.5, -2.0, 1024.0, 1e-3, usual=0.4),
        main_grad=d.chance(0.25),
        views=tuple((name, d.choice(VIEWS)) for name in VIEWED if d.chance(0.25)),
        poison=draw_poison(d) if d.chance(0.08) else None,
        prefix=d.chance(0.3),
        entropy_output=d.chance(0.8),
    )
    return finish(d, settings)


def finish(d: Draw, settings: Settings) -> Settings:
    """Settle what depends on the rest."""
    num_tokens, num_sequences = math.prod(settings.shape), len(settings.lengths)
    advantages = d.pick("[S]", "[S, 1]", "token", "token" if settings.padded else "[1, T]")
    if advantages == "token" and num_tokens == num_sequences and set(settings.lengths) != {1} and not settings.padded:
        advantages = "[1, T]"  # [T] would be ambiguous
    if advantages == "[S]" and num_tokens == num_sequences and set(settings.lengths) != {1} and not settings.padded:
        advantages = "[S, 1]"
    if advantages in ("token", "[1, T]"):  # where they belong to one sequence must be said
        settings = replace(settings, implicit_sequence=False)
    if settings.call == "token_logprobs":
        settings = replace(settings, poison=None)
    if settings.call == "policy_loss":
        dtype = torch.float32 if settings.dtype in NARROW else settings.dtype
        grads = d.pick(("logprobs", "entropy"), ("logprobs",), ("entropy",), (), usual=0.6)
        settings = replace(settings, dtype=dtype, grads=grads, main_grad=False, prefix=False)
    if settings.poison is not None:
        name, _ = settings.poison
        dtype = torch.float32 if settings.dtype in NARROW else settings.dtype
        settings = replace(settings, dtype=dtype)
        absent = {
            "hidden": settings.call == "policy_loss" or settings.config.top_entropy_quantile < 1,
            "old_logprobs": settings.on_policy,
            "ref_logprobs": settings.config.beta == 0,
        }
        if absent.get(name, False):
            settings = replace(settings, poison=None)
    main_grad = settings.main_grad and "weight" in settings.grads
    if main_grad and settings.call == "grpo_loss":
        settings = replace(settings, upstream=1.0)
    if settings.dtype == torch.float16 and main_grad:  # the loss cannot be scaled: keep to what float16 can say
        settings = replace(settings, normalizer=None, entropy_normalizer=None, drift=min(settings.drift, 0.3))
    settings = replace(settings, advantages=advantages, main_grad=main_grad)
    return replace(settings, plan=d.choice(legal_plans(settings)))


def draw_config(d: Draw) -> LossConfig:
    loss_type = d.choice(LOSS_TYPES)
    epsilon_high = d.pick(0.9, 1.25, 5.0) if loss_type == "cispo" else d.pick(None, 0.28, 0.05, 1.25, usual=0.4)
    modes = LOSSES[loss_type].importance_sampling_modes
    given: dict[str, Any] = {
        "loss_type": loss_type,
        "importance_sampling_level": d.pick("token", "sequence", "sequence_token", usual=0.4),
        "temperature": d.pick(1.0, 0.7, 1.6, usual=0.4),
        "epsilon": d.pick(0.2, 0.1, 0.5, 1.0, 0.0, usual=0.5),
        "epsilon_high": epsilon_high,
        "delta": d.pick(None, 1.4, 1.05, 3.0, usual=0.5),
        "beta": d.pick(0.0, 0.1, 1.0, usual=0.3),
        "kl_estimator": d.choice(KL_ESTIMATORS),
        "use_bias_correction_kl": d.chance(0.5),
        "entropy_coef": d.pick(0.0, 0.05, -0.05, 2.0, -1.5, usual=0.5),
        "top_entropy_quantile": d.pick(1.0, 0.6, 0.2, 0.5, 0.0, usual=0.75),
        "off_policy_mask_threshold": d.pick(None, 0.02, -0.1, 0.3, usual=0.6),
        "max_completion_length": d.randint(1, 40) if loss_type == "dr_grpo" else None,
        "importance_sampling_mode": d.pick(None, *modes, usual=0.3),
        "importance_sampling_clip_min": d.pick(None, 0.5, 0.9),
        "importance_sampling_clip_max": d.pick(3.0, 1.2, None),
        "all_token_metrics": d.chance(0.25),
    }
    if d.chance(0.4):
        for name, low, high in TUNED:
            given[name] = round(d.uniform(low, high), 3)
    return LossConfig(**given)


TUNED = (
    ("sapo_temperature_pos", 0.3, 2),
    ("sapo_temperature_neg", 0.3, 2),
    ("vespo_k_pos", 0, 3),
    ("vespo_lambda_pos", 0, 3),
    ("vespo_k_neg", 0, 3),
    ("vespo_lambda_neg", 0, 3),
    ("dppo_threshold", 0.02, 0.5),
    ("dppo_log_ratio_coef", 0, 0.2),
    ("dual_clip", 0.5, 3),
)


def draw_lengths(d: Draw) -> tuple[tuple[int, ...], int | None]:
    """(lengths, padding or None): at most `MAX_TOKENS` tokens, padding included."""
    padding = d.randint(0, 2) if d.chance(0.4) else None
    if d.chance(0.03):
        return (), padding
    lengths = tuple(d.pick(0, 1, 1, 2, 3, 5, 8, 11, 14, 17) for _ in range(d.pick(1, 2, 4, 6, 7, 8, 9)))
    if d.chance(0.03):
        lengths = (0,) * len(lengths)
    if d.chance(0.04):
        lengths = (1,) * len(lengths)
    if padding is not None:
        return lengths[: max(1, MAX_TOKENS // (max(lengths) + padding + 1))], padding
    while sum(lengths) > MAX_TOKENS:
        lengths = lengths[1:]
    return lengths, None


def draw_grads(d: Draw, bias: bool) -> tuple[str, ...]:
    grads = d.pick(("hidden", "weight"), ("hidden",), ("weight",), (), usual=0.5)
    return (*grads, "bias") if bias and d.chance(0.7) else grads


def draw_sampling(d: Draw, config: LossConfig) -> str | None:
    needed = config.importance_sampling_mode is not None
    return d.pick("known", "some") if needed or d.chance(0.4) else None


def draw_poison(d: Draw) -> tuple[str, float]:
    name = d.pick("hidden", "old_logprobs", "ref_logprobs", "advantages")
    return name, d.pick(math.nan, math.inf, -math.inf)


def legal_plans(settings: Settings) -> list[str]:
    """The plans that serve a case, "auto" among them, the likelier the oftener."""
    head = not {"weight", "bias"} & set(settings.grads)
    coupled = couples_tokens(settings.config, has_old=not settings.on_policy)
    plans = ["auto", "auto", "recompute", "lean"]
    supported = settings.support is not None
    if head:
        plans += ["frozen_head"] * 3
    # Its kernel reads operands where they lie, rows of contiguous elements.
    readable = settings.backend == "triton" and not supported
    if readable and not settings.grads and ("weight", "transposed") not in settings.views:
        plans += ["fused_forward"] * 2
    if settings.call == "grpo_loss":
        if not coupled:
            plans += ["single_pass"] * 2 + ["resident"] * (0 if supported else 2)
        elif supported:
            pass
        elif settings.config.top_entropy_quantile == 1 and max(settings.lengths, default=0) <= settings.rows:
            plans += ["resident"] * 4
    return plans


def expected_plan(settings: Settings, longest: int) -> str | None:
    """What "auto" must take (None: not said), the longest sequence having so many computed rows."""
    if not settings.grads:
        return "forward"
    if not {"weight", "bias"} & set(settings.grads) and settings.config.entropy_coef == 0:
        return "frozen_head"
    if not couples_tokens(settings.config, has_old=not settings.on_policy):
        return "single_pass"
    if settings.config.top_entropy_quantile < 1 or settings.support is not None:
        return "recompute"
    if longest <= settings.rows:
        return "resident"
    return None if get_backend(settings.served_by).stages_dx else "recompute"


# -- tensors ----------------------------------------------------------------------------------------------------------

VIEWS = ("wide", "step", "transposed", "offset")
VIEWED = (
    "hidden", "weight", "bias", "targets", "advantages", "loss_mask", "cu_seqlens", "old_logprobs", "ref_logprobs",
    "sampling_logprobs", "temperature", "logprobs", "entropy",
)  # fmt: skip


def strided(values: Tensor, kind: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(base, view) with `view(base)` equal to `values` and poison between; `view` finds a gradient's part likewise."""
    junk: Any = math.nan if values.is_floating_point() else values.dtype == torch.bool or 77

    def surrounded(*shape: int) -> Tensor:
        return values.new_full(shape, junk)

    if kind == "transposed" and values.dim() >= 2:
        return values.transpose(-1, -2).contiguous(), lambda base: base.transpose(-1, -2)
    if kind == "wide" and values.dim() >= 1:
        size = values.shape[-1]
        return torch.cat([values, surrounded(*values.shape[:-1], 3)], -1), lambda base: base[..., :size]
    if kind == "step" and values.dim() >= 1:
        return torch.stack([values, surrounded(*values.shape)], 1).flatten(0, 1), lambda base: base[::2]
    size, shape = values.numel(), values.shape  # "offset": aligned to nothing but the element
    return torch.cat([surrounded(1), values.reshape(-1)]), lambda base: base[1 : 1 + size].view(shape)


@dataclass(kw_only=True)
class Problem:
    """The tensors of a case, contiguous and in the layout of the call; masked positions hold something harmless.

    Attributes:
        advantages: `[S]`, or one a token in the shape of targets.
        mask: every token that carries loss, targets ignored taken out.
        logprobs, entropy: float64, true ones.
    """

    settings: Settings
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    advantages: Tensor
    mask: Tensor
    ignored: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    sampling_logprobs: Tensor
    temperature: Tensor
    logprobs: Tensor
    entropy: Tensor
    support: Support | None = None

    @property
    def side_dtype(self) -> torch.dtype:
        return torch.promote_types(self.settings.dtype, torch.float32)

    @property
    def cu_seqlens(self) -> Tensor | None:
        s = self.settings
        if s.padded or s.implicit_sequence:
            return None
        return torch.tensor([0, *accumulate(s.lengths)])

    @property
    def oracle_advantages(self) -> Tensor:
        """`[S]`, or one a token in two dimensions, which is read as that alone."""
        return (
            self.advantages[None]
            if self.settings.advantages in ("token", "[1, T]") and not self.settings.padded
            else self.advantages
        )

    def token_logprobs_given(self) -> dict[str, Tensor | None]:
        """Old, ref and sampling logprobs, as the case has them."""
        s = self.settings
        return {
            "old_logprobs": None if s.on_policy else self.old_logprobs,
            "ref_logprobs": self.ref_logprobs if s.config.beta != 0 else None,
            "sampling_logprobs": None if s.sampling is None else self.sampling_logprobs,
        }

    def given_finite(self) -> Tensor:
        """Whether what is given of a token is finite."""
        data = self.token_data(self.logprobs, None)
        lists = [values for values in (data.advantages, data.old, data.ref) if values is not None]
        finite = torch.tensor(lists, dtype=torch.float64).isfinite().all(0).reshape(self.settings.shape)
        return finite & self.hidden.isfinite().all(-1)  # a soft cap makes an infinite one look harmless

    def support_of(self, sequences_or_tokens: slice) -> Support | None:
        """Rows of the support that belong to part of the targets, cut in their first dimension."""
        if self.support is None:
            return None
        of_targets = torch.arange(math.prod(self.settings.shape)).reshape(self.settings.shape)
        return self.support[of_targets[sequences_or_tokens].reshape(-1)]

    def normalizers(self) -> dict[str, float | Tensor | None]:
        s = self.settings
        given: dict[str, Any] = {"normalizer": s.normalizer, "entropy_normalizer": s.entropy_normalizer}
        if s.tensor_normalizers:
            given = {name: None if v is None else torch.tensor(v) for name, v in given.items()}
        return given

    def token_data(self, logprobs: Tensor, entropy: Tensor | None) -> TokenData:
        """As the metrics' reference takes it."""
        s, given = self.settings, self.token_logprobs_given()

        def listed(values: Tensor | None) -> list[float] | None:
            return None if values is None else values.double().reshape(-1).tolist()

        each = listed(self.advantages) or []
        if s.advantages in ("[S]", "[S, 1]"):
            each = [a for a, (begin, end) in zip(each, s.bounds, strict=True) for _ in range(end - begin)]
        return TokenData(
            bounds=s.bounds,
            mask=self.mask.reshape(-1).tolist(),
            advantages=each,
            token_advantages=s.per_token,
            logprobs=listed(logprobs) or [],
            entropy=listed(entropy),
            old=listed(given["old_logprobs"]),
            ref=listed(given["ref_logprobs"]),
            sampling=listed(given["sampling_logprobs"]),
        )


def build(settings: Settings) -> Problem:
    """The tensors of a case. Outside float64 it is drawn again while anything lies too near a bound that jumps."""
    for attempt in range(100):
        generator = torch.Generator().manual_seed(settings.number * 101 + attempt)
        problem = _draw_problem(settings, generator)
        if settings.dtype == torch.float64 or distance_to_bounds(problem) > 2e-4:
            break
    if settings.poison is not None:
        _poison(problem, *settings.poison, generator)
    return problem


def _draw_problem(s: Settings, generator: torch.Generator) -> Problem:
    shape, side = s.shape, torch.promote_types(s.dtype, torch.float32)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def chosen(share: float, *size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64) < share

    def drifted(logprobs: Tensor, scale: float) -> Tensor:
        per_sequence = 0.5 * scale * normal(len(s.lengths))
        sizes = torch.tensor([end - begin for begin, end in s.bounds], dtype=torch.int64)
        shift = per_sequence.repeat_interleave(sizes).reshape(shape)
        return (logprobs + shift + scale * normal(*shape)).clamp(max=-1e-4).to(side)

    def one_hot_sharp(*size: int) -> Tensor:
        """A third of the rows are confident."""
        return torch.where(chosen(1 / 3, *size), 2.0, 1.0)

    temperature = torch.full(shape, s.config.temperature, dtype=side)
    if s.row_temperature:
        temperature = (0.5 + 1.5 * torch.rand(*shape, generator=generator, dtype=torch.float64)).to(side)
    scale = 2.5 / (abs(s.logit_scale) * s.hidden_size**0.5)
    hidden = (scale * one_hot_sharp(*shape)[..., None] * normal(*shape, s.hidden_size)).to(s.dtype)
    weight = normal(s.vocab, s.hidden_size).to(s.dtype)
    bias = (0.5 * normal(s.vocab)).to(s.dtype) if s.bias else None
    allowed = s.vocab - s.forbidden
    targets = torch.randint(0, allowed, shape, generator=generator)
    if s.forbidden and bias is not None:
        bias[allowed:] = -math.inf
    advantages = normal(*shape) if s.advantages in ("token", "[1, T]") else normal(len(s.lengths))
    advantages[chosen(s.zero_advantages, *advantages.shape)] = 0.0
    mask = ~chosen(s.masked, *shape)
    if s.padded:
        mask &= torch.arange(s.width) < torch.tensor(s.lengths, dtype=torch.int64)[:, None]
    ignored = chosen(0.3, *shape) if s.ignore else torch.zeros(shape, dtype=torch.bool)
    if s.ignore and s.mask is None:
        ignored = ~mask  # there is no other way to say it
    mask &= ~ignored
    support = None if s.support is None else draw_support(targets, allowed, s.support, s.number)
    logprobs, entropy = exact_logprobs(s, hidden, weight, bias, targets, temperature, support)
    old = drifted(logprobs, s.drift)
    ref = drifted(logprobs, s.drift)
    sampling = drifted(old.double(), 0.7 * s.drift)
    if s.sampling == "some":
        sampling[chosen(0.2, *shape)] = math.nan
    return Problem(
        settings=s,
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        advantages=advantages.to(side),
        mask=mask,
        ignored=ignored,
        old_logprobs=old,
        ref_logprobs=ref,
        sampling_logprobs=sampling,
        temperature=temperature,
        logprobs=logprobs,
        entropy=entropy,
        support=support,
    )


def exact_logprobs(
    s: Settings, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, temperature: Tensor, support: Any
) -> tuple[Tensor, Tensor]:
    """The oracle's, in float64; forbidden tokens are not part of its vocabulary."""
    allowed = s.vocab - s.forbidden
    return reference_logprobs(
        hidden.double(),
        weight[:allowed].double(),
        targets,
        bias=None if bias is None else bias[:allowed].double(),
        head=s.head,
        temperature=temperature.double() if s.row_temperature else s.config.temperature,
        support=support,
    )


def _poison(problem: Problem, name: str, value: float, generator: torch.Generator) -> None:
    """Put `value` into one unmasked token of an argument, if there is one."""
    places = problem.mask.nonzero()
    if not len(places):
        return
    place = places[int(torch.randint(len(places), (), generator=generator))]
    tensor = getattr(problem, name)
    index = tuple(place.tolist())
    if name == "hidden":
        tensor[index][int(torch.randint(tensor.shape[-1], (), generator=generator))] = value
    elif name == "advantages" and problem.settings.advantages in ("[S]", "[S, 1]"):
        token = index[0] if len(index) == 1 else index[0] * problem.settings.width
        tensor[next(i for i, (begin, end) in enumerate(problem.settings.bounds) if begin <= token < end)] = value
    else:
        tensor[index] = value


# -- how near a case is to where a loss or a metric jumps --------------------------------------------------------------


def distance_to_bounds(problem: Problem) -> float:
    """Least distance of a ratio, weight, drift, probability gap or entropy to a bound of the config."""
    c, s = problem.settings.config, problem.settings
    near: list[Tensor] = [torch.ones(1)]

    def bounded(values: Tensor, *bounds: float | None) -> None:
        near.extend((values / bound - 1).abs() for bound in bounds if bound)

    high = c.epsilon if c.epsilon_high is None else c.epsilon_high
    given = {name: None if v is None else v.double().reshape(-1) for name, v in problem.token_logprobs_given().items()}
    logprobs, entropy, mask = problem.logprobs.reshape(-1), problem.entropy.reshape(-1), problem.mask.reshape(-1)
    old = logprobs if given["old_logprobs"] is None else given["old_logprobs"]
    for begin, end in s.bounds:
        kept = torch.arange(begin, end)[mask[begin:end]]
        if not len(kept):
            continue
        p, r = logprobs[kept], (logprobs - old)[kept]
        if not s.on_policy:  # then every ratio is exactly 1
            for log_w in (r, r.mean()[None]):
                bounded(log_w.exp(), 1 - c.epsilon, 1 + high, high, c.delta, c.dual_clip)
        sampling = given["sampling_logprobs"]
        behaviour = old[kept] if sampling is None else torch.where(sampling[kept].isnan(), p, sampling[kept])
        if c.off_policy_mask_threshold is not None:
            near.append(((behaviour - p).mean() - c.off_policy_mask_threshold).abs()[None])
        near.append(((p.exp() - behaviour.exp()).abs() - c.dppo_threshold).abs())
        if sampling is not None:
            d = (old - sampling)[kept].nan_to_num(nan=0.0)
            for total in (d, d.sum()[None]):
                bounded(total.exp(), c.importance_sampling_clip_min, c.importance_sampling_clip_max)
    if c.top_entropy_quantile < 1 and mask.any():
        ordered = entropy[mask].sort().values
        position = (1 - c.top_entropy_quantile) * (len(ordered) - 1)
        gaps = ordered.diff().abs()
        share = position % 1
        # Between two entropies their distance counts; on one of them the comparison is of equals.
        if 0 < share < 1e-3 or share > 1 - 1e-3:
            near.append(torch.zeros(1))
        elif len(gaps):
            near.append(gaps[max(math.floor(position) - 1, 0) : math.ceil(position) + 1] * min(share or 1, 1 - share))
    return min(float(values.min()) for values in near if values.numel())
