"""What is optimised (`LossConfig`) and what the LM head computes (`HeadConfig`): frozen, validated, hashable."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LOSS_TYPES = (
    "grpo",
    "bnpo",
    "dr_grpo",
    "dapo",
    "luspo",
    "cispo",
    "sapo",
    "vespo",
    "gmpo",
    "dppo",
    "ppo_dual",
    "reinforce",
    "rloo",
)
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")
KL_ESTIMATORS = ("k1", "k2", "k3")
IMPORTANCE_SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


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
        expected = " and ".join(["a finite number", *bounds]) + (" or None" if optional else "")
        raise ValueError(f"{name}: expected {expected}; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A member of the GRPO family. Names, meanings and defaults are those of TRL 1.16's GRPOConfig.

    Every field is explained where its formula stands, in `grpo_fast.objectives`.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    loss_type: str = "dapo"
    """Per-token policy term and aggregation; one of `LOSS_TYPES`."""
    importance_sampling_level: str = "token"
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
    kl_estimator: str = "k3"
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
    importance_sampling_mode: str | None = None
    """Correction of train/inference mismatch from `sampling_logprobs`; one of `IMPORTANCE_SAMPLING_MODES`."""
    importance_sampling_clip_min: float | None = None
    importance_sampling_clip_max: float | None = 3.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    dppo_threshold: float = 0.2
    """Probability difference beyond which dppo drops a token."""
    dppo_log_ratio_coef: float = 1e-3
    """Weight of dppo's (log ratio)^2 term."""
    dual_clip: float = 3.0
    """The constant c of ppo_dual: for A < 0 the clipped objective is bounded below by c * A."""
    all_token_metrics: bool = False
    """Also compute rows whose gradient is known to be zero (zero advantage), so that logprobs, entropy and
    metrics cover every unmasked token."""

    def __post_init__(self) -> None:
        require_choice("loss_type", self.loss_type, LOSS_TYPES)
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
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "dppo_threshold", "dual_clip"):
            require_number(name, getattr(self, name), above=0)
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "dppo_log_ratio_coef"):
            require_number(name, getattr(self, name), at_least=0)
        self._check_combinations()
        # One string names the whole config: custom ops take strings, not dataclasses.
        object.__setattr__(self, "_key", json.dumps(dataclasses.asdict(self), sort_keys=True))

    def _check_combinations(self) -> None:
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length: dr_grpo divides by it; expected an integer >= 1, got None")
        if self.loss_type == "vespo" and (self.importance_sampling_mode or "token").startswith("sequence"):
            raise ValueError(
                "importance_sampling_mode: vespo expects token_truncate, token_mask or None; "
                f"got {self.importance_sampling_mode!r}"
            )
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError(
                "epsilon_high: expected a number, as cispo bounds the ratio by it, not by 1 + it (MiniMax-M1: 5); "
                f"got None (TRL then takes epsilon, {self.epsilon})"
            )
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"importance_sampling_clip_min: expected at most importance_sampling_clip_max ({high}); got {low}"
            )

    @property
    def upper_epsilon(self) -> float:
        """`epsilon_high`, or `epsilon` where that is None."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def key(self) -> str:
        """The config as a JSON string; `LossConfig.from_key` reads it back."""
        return self._key  # type: ignore[attr-defined,no-any-return]

    @staticmethod
    @lru_cache(maxsize=64)
    def from_key(key: str) -> LossConfig:
        """The config that `key` names."""
        fields: dict[str, Any] = json.loads(key)
        return LossConfig(**fields)


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
