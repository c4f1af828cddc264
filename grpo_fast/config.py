"""What is optimised (`LossConfig`) and what the LM head computes (`HeadConfig`): frozen, validated, hashable."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, get_args

from grpo_fast.losses import (
    IMPORTANCE_SAMPLING_MODES,
    LOSSES,
    Aggregation,
    Clip,
    CorrectionMode,
    Coupling,
    Kernel,
    Loss,
    LossName,
    Mean,
    Parameter,
    Quantity,
    RegisteredLoss,
)
from grpo_fast.losses import LOSS_TYPES as LOSS_TYPES

_Level: TypeAlias = Literal["token", "sequence", "sequence_token"]
_Estimator: TypeAlias = Literal["k1", "k2", "k3"]
if TYPE_CHECKING:
    LossType: TypeAlias = LossName | RegisteredLoss
    ImportanceSamplingLevel: TypeAlias = _Level
    KlEstimator: TypeAlias = _Estimator
    ImportanceSamplingMode: TypeAlias = CorrectionMode
    Parameters: TypeAlias = Mapping[str, float]
else:  # what fills the config from recipes (OmegaConf, from 2.3 on) knows neither Literal nor Mapping
    LossType = ImportanceSamplingLevel = KlEstimator = ImportanceSamplingMode = str
    Parameters = dict[str, float]

IMPORTANCE_SAMPLING_LEVELS = get_args(_Level)
KL_ESTIMATORS = get_args(_Estimator)
BUILT_IN = tuple(parameter for loss in LOSSES.values() for parameter in loss.parameters)
"""Parameters that are fields of `LossConfig`; registered losses come later."""
METRIC_GROUPS = ("clip_ratio", "completions", "eval", "ratio", "rewards", "sampling", "support", "time")
"""What metrics of every loss and of trainers begin with, before a slash: no names for losses."""
DEFAULTS = {parameter.name: parameter.default for parameter in BUILT_IN}


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")


def require_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    optional: bool = False,
) -> None:
    """Raise ValueError unless `value` is a finite number with `above < value`, `at_least <= value <= at_most`."""
    if optional and value is None:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not (value > above and at_least <= value <= at_most):  # type: ignore[operator]
        bounds = [f"> {above}"] * (above > -math.inf)
        bounds += [f">= {at_least}"] * (at_least > -math.inf)
        bounds += [f"<= {at_most}"] * (at_most < math.inf)
        expected = " ".join(["a finite number", " and ".join(bounds)]).strip() + (" or None" if optional else "")
        raise ValueError(f"{name}: expected {expected}; got {value!r}")


def check_parameter(parameter: Parameter, value: object, prefix: str = "") -> None:
    """Raise ValueError, which says `prefix` and the name, unless `value` is within the parameter's bounds."""
    p = parameter
    require_number(prefix + p.name, value, above=p.above, at_least=p.at_least, at_most=p.at_most)


class FrozenParameters(dict[str, float]):
    """A dict that cannot change, and so has a hash. A dict it is for OmegaConf, JSON and `dataclasses.asdict`."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenParameters, (dict(self),)

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("parameters: cannot change; make another LossConfig (dataclasses.replace)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A member of the GRPO family. Names, meanings and defaults are those of TRL 1.16's GRPOConfig.

    Every field is explained where its formula stands, in `grpo_fast.losses` and `grpo_fast.objectives`.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    loss_type: LossType = "dapo"
    """Per-token policy term and aggregation: a name of `LOSSES` (docs/losses.md), or what `register_loss` returned."""
    importance_sampling_level: ImportanceSamplingLevel = "token"
    """Level of the ratio current/old: `token`, `sequence` (GSPO) or `sequence_token` (GSPO-token)."""
    temperature: float = 1.0
    """Logits are divided by it; it must be the sampling temperature of the rollout."""
    epsilon: float = 0.2
    """Lower clip bound: the ratio is clipped at 1 - epsilon."""
    epsilon_high: float | None = None
    """Upper clip bound 1 + epsilon_high (`epsilon` if None). For cispo it is the bound itself."""
    delta: float | None = None
    """Two-sided clipping: upper bound of the unclipped ratio."""
    beta: float = 0.0
    """Weight of the KL divergence to the reference policy; needs `ref_logprobs` unless 0."""
    kl_estimator: KlEstimator = "k3"
    """`k1` p - ref, `k2` (p - ref)^2 / 2, `k3` e^(ref-p) - (ref-p) - 1."""
    use_bias_correction_kl: bool = True
    """Multiply the KL by the ratio (before `delta`), which makes its gradient unbiased off-policy."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus: minus entropy_coef times the mean entropy over active tokens."""
    top_entropy_quantile: float = 1.0
    """Share of the active tokens, by highest entropy, that carry policy loss."""
    off_policy_mask_threshold: float | None = None
    """Drop a sequence with A < 0 whose mean (sampling - p) exceeds this (nats per token)."""
    max_completion_length: int | None = None
    """The constant C of dr_grpo's denominator B * C."""
    importance_sampling_mode: ImportanceSamplingMode | None = None
    """Correction of train/inference mismatch from `sampling_logprobs`: truncated or masked, by token or sequence."""
    importance_sampling_clip_min: float | None = None
    importance_sampling_clip_max: float | None = 3.0
    sapo_temperature_pos: float = DEFAULTS["sapo_temperature_pos"]
    """The parameters of sapo, vespo, dppo and ppo_dual: `grpo_fast.losses` says what they are (docs/losses.md)."""
    sapo_temperature_neg: float = DEFAULTS["sapo_temperature_neg"]
    vespo_k_pos: float = DEFAULTS["vespo_k_pos"]
    vespo_lambda_pos: float = DEFAULTS["vespo_lambda_pos"]
    vespo_k_neg: float = DEFAULTS["vespo_k_neg"]
    vespo_lambda_neg: float = DEFAULTS["vespo_lambda_neg"]
    dppo_threshold: float = DEFAULTS["dppo_threshold"]
    """Probability difference beyond which dppo drops a token."""
    dppo_log_ratio_coef: float = DEFAULTS["dppo_log_ratio_coef"]
    """Weight of dppo's (log ratio)^2 term."""
    dual_clip: float = DEFAULTS["dual_clip"]
    """The constant c of ppo_dual: for A < 0 the clipped objective is bounded below by c * A."""
    parameters: Parameters = field(default_factory=dict)
    """Those of a registered loss, by name; what is left out has the record's default."""
    all_token_metrics: bool = False
    """Also compute rows whose gradient is known to be zero (zero advantage), so that logprobs, entropy and
    metrics cover every unmasked token."""

    def __post_init__(self) -> None:
        require_choice("loss_type", self.loss_type, tuple(LOSSES))
        require_choice("importance_sampling_level", self.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
        require_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if self.importance_sampling_mode is not None:
            require_choice("importance_sampling_mode", self.importance_sampling_mode, IMPORTANCE_SAMPLING_MODES)
        require_number("temperature", self.temperature, above=0)
        # cispo bounds the ratio from above only; the others need a lower bound that is a probability ratio.
        require_number("epsilon", self.epsilon, at_least=0, at_most=1)
        require_number("epsilon_high", self.epsilon_high, at_least=0, optional=True)
        require_number("delta", self.delta, above=0, optional=True)
        require_number("beta", self.beta, at_least=0)
        require_number("entropy_coef", self.entropy_coef)
        require_number("top_entropy_quantile", self.top_entropy_quantile, at_least=0, at_most=1)
        require_number("off_policy_mask_threshold", self.off_policy_mask_threshold, optional=True)
        require_number("max_completion_length", self.max_completion_length, at_least=1, optional=True)
        require_number("importance_sampling_clip_min", self.importance_sampling_clip_min, at_least=0, optional=True)
        require_number("importance_sampling_clip_max", self.importance_sampling_clip_max, above=0, optional=True)
        for parameter in BUILT_IN:
            check_parameter(parameter, getattr(self, parameter.name))
        object.__setattr__(self, "parameters", self._own_parameters())
        self._check_combinations()
        _ = self.record, self.upper_epsilon, self.key  # found once

    def _own_parameters(self) -> FrozenParameters:
        """All of a registered loss's parameters, in its record's order."""
        known = {p.name: p for p in self.record.parameters if p not in BUILT_IN}
        if not isinstance(self.parameters, Mapping) or not self.parameters.keys() <= known.keys():
            names = ", ".join(known) or "none"
            raise ValueError(f"parameters: expected those of {self.loss_type} ({names}); got {self.parameters!r}")
        for name, value in self.parameters.items():
            check_parameter(known[name], value, "parameters.")
        return FrozenParameters({name: self.parameters.get(name, p.default) for name, p in known.items()})

    def _check_combinations(self) -> None:
        for name, reason in self.record.requires.items():
            if getattr(self, name) is None:
                raise ValueError(f"{name}: {reason.format(**dataclasses.asdict(self))}")
        mode, modes = self.importance_sampling_mode, self.record.importance_sampling_modes
        if mode is not None and mode not in modes:
            expected = " or ".join([", ".join(modes)] * bool(modes) + ["None"])
            raise ValueError(f"importance_sampling_mode: {self.loss_type} expects {expected}; got {mode!r}")
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"importance_sampling_clip_min: expected at most importance_sampling_clip_max ({high}); got {low}"
            )

    @cached_property
    def record(self) -> Loss:
        """What is known of the loss type."""
        return LOSSES[self.loss_type]

    def parameter(self, name: str) -> float:
        """The value of a parameter of the loss type, a field or one of `parameters`."""
        value: float = self.parameters[name] if name in self.parameters else getattr(self, name)
        return value

    @cached_property
    def upper_epsilon(self) -> float:
        """`epsilon_high`, or `epsilon` where that is None."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @cached_property
    def key(self) -> str:
        """The config as a JSON string, which operators take; `LossConfig.from_key` reads it back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def __repr__(self) -> str:
        """What is not the default, so that signatures which show a config stay readable."""
        defaults = {f.name: {} if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(self)}
        given = [f"{n}={getattr(self, n)!r}" for n, default in defaults.items() if getattr(self, n) != default]
        return f"{type(self).__name__}({', '.join(given)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}), ()

    @staticmethod
    @lru_cache(maxsize=64)
    def from_key(key: str) -> LossConfig:
        """The config that `key` names."""
        fields: dict[str, Any] = json.loads(key)
        return LossConfig(**fields)


assert DEFAULTS.keys() <= LossConfig.__dataclass_fields__.keys(), "LossConfig lacks a parameter of a loss"


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a model does between `hidden @ weight.T + bias` and its logits.

        logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)

    Without `softcap` the tanh is left out. Gemma 2 caps at 30, Cohere and Granite scale.
    """

    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        require_number("logit_scale", self.logit_scale)
        require_number("softcap", self.softcap, above=0, optional=True)
        if self.logit_scale == 0:
            raise ValueError("logit_scale: expected a number other than 0; got 0")


# -- losses from outside ----------------------------------------------------------------------------------------------


def register_loss(loss: Loss, *, replace: bool = False) -> RegisteredLoss:
    """Add a loss: `LossConfig(loss_type=register_loss(loss))`, with `parameters={...}` for its own.

    Every process that uses it registers it. Without a `kernel`, row kernels compute log-probabilities and gradients,
    and torch the objective between them.

    Args:
        replace: take the place of a loss registered under this name, for configs made from now on: a notebook's cell
            that runs again. Built-in losses stay.

    Returns:
        Its name.

    Raises:
        ValueError: a field is malformed, or the name is taken.
    """
    _check(loss, replace=replace)
    LOSSES[loss.name] = loss
    LossConfig.from_key.cache_clear()
    return RegisteredLoss(loss.name)


def _check(loss: Loss, *, replace: bool = False) -> None:
    """Raise ValueError if a field holds what it may not."""
    if not isinstance(loss, Loss):
        raise ValueError(f"loss: expected a Loss; got {type(loss).__name__}")
    known = LOSS_TYPES if replace else tuple(LOSSES)
    if isinstance(loss.name, str) and (
        (loss.name in known and LOSSES[loss.name] is not loss) or loss.name in METRIC_GROUPS
    ):
        taken = ", ".join([*LOSSES, *METRIC_GROUPS])
        raise ValueError(f"name: expected one that is not taken ({taken}); got {loss.name!r}")
    if not callable(loss.term):
        raise ValueError(f"term: expected a function of TermInputs; got {loss.term!r}")
    for name in ("formula", "when", "paper"):
        text = getattr(loss, name)
        if not isinstance(text, str) or not text.strip() or "\n" in text:
            raise ValueError(f"{name}: expected one line of text; got {text!r}")
    containers = {"reads": tuple, "importance_sampling_modes": tuple, "parameters": tuple, "requires": Mapping}
    for name, kind in (containers | {"metrics": Mapping}).items():
        if not isinstance(getattr(loss, name), kind):
            raise ValueError(f"{name}: expected a {kind.__name__}; got {getattr(loss, name)!r}")
    options = tuple(LossConfig.__dataclass_fields__)
    for name, values, choices in (
        ("aggregation", [loss.aggregation], get_args(Aggregation)),
        ("reads", loss.reads, get_args(Quantity)),
        ("couples", [loss.couples], get_args(Coupling)),
        ("requires", loss.requires, options),
        ("importance_sampling_modes", loss.importance_sampling_modes, IMPORTANCE_SAMPLING_MODES),
        ("clip", [loss.clip], get_args(Clip)),
        ("metrics", loss.metrics.values(), get_args(Mean)),
        ("kernel", [] if loss.kernel is None else [loss.kernel], get_args(Kernel)),
    ):
        for value in values:
            require_choice(name, value, choices)
    for reason in loss.requires.values():
        if not isinstance(reason, str) or set(re.findall(r"{(.*?)}", reason)) - {*options}:
            raise ValueError(f"requires: expected texts in which options stand in braces; got {reason!r}")
    for p in loss.parameters:
        if not isinstance(p, Parameter):
            raise ValueError(f"parameters: expected a tuple of Parameter; got {p!r} in it")
        check_parameter(p, p.default)
        if p.name in options and p not in BUILT_IN:
            raise ValueError(f"parameters: expected names that are no options of LossConfig; got {p.name!r}")
    names = [p.name for p in loss.parameters]
    for name in (loss.name, *names):
        if not isinstance(name, str) or not name.isidentifier() or names.count(name) > 1:
            raise ValueError(f"name: expected an identifier that stands for one thing; got {name!r}")
    for name in loss.metrics:
        if not isinstance(name, str) or not name.startswith(f"{loss.name}/"):
            raise ValueError(f"metrics: expected names that begin with {loss.name}/; got {name!r}")
    if loss.kernel is not None and (loss.couples != "nothing" or "importance" in loss.reads):
        reason = "device terms see one token, before its importance weight"
        raise ValueError(f"kernel: expected None, as {reason}, and it sees more; got {loss.kernel!r}")
    if loss.aggregation == "constant_length" and "max_completion_length" not in loss.requires:
        raise ValueError("requires: expected max_completion_length, as constant_length divides by it")
    if loss.beside_advantage is not None:
        require_choice("beside_advantage", loss.beside_advantage, tuple(names))
