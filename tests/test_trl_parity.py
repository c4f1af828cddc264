"""TRL 1.16's own `_compute_loss`, run on fixed tensors, against the oracle and against `grpo_fast.loss.policy_loss`.

TRL gets the padded layout, ours the packed one. Loss, gradients in logprobs and entropy, and logged metrics must agree.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.advantages import group_advantages
from grpo_fast.config import LossConfig
from grpo_fast.loss import policy_loss
from grpo_fast.reference import reference_advantages, reference_policy_loss
from tests.cases import OBJECTIVES, TOLERANCES, Case, make_case, padded, rel_rms, to_padded
from tests.trl_loss import LOSS_TYPES, trl_advantages, trl_missing, trl_policy_loss

pytestmark = pytest.mark.skipif(trl_missing() is not None, reason=str(trl_missing()))

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "token_truncate": {"importance_sampling_clip_min": 0.8, "importance_sampling_clip_max": 1.3},
    "token_mask": {"importance_sampling_clip_min": 0.6, "importance_sampling_clip_max": 1.6},
    "sequence_truncate": {"importance_sampling_clip_max": 1.5},
    "sequence_mask": {},
}
# How vespo weighs sequences is logged by TRL but named neither in the objectives nor for people to read.
UNLISTED_METRICS = {"vespo/phi_seq_mean", "policy_loss", "entropy_coef"}


def base_config(loss_type: str, **changes: Any) -> LossConfig:
    """A config of `loss_type` whose bounds bite on the cases below."""
    own: dict[str, Any] = {"dr_grpo": {"max_completion_length": 24}, "cispo": {"epsilon_high": 1.25}}.get(loss_type, {})
    return LossConfig(loss_type=loss_type, **{**own, **changes})


def configs(loss_type: str, level: str, correction: str) -> list[LossConfig]:
    """KL off, on and bias-corrected, x delta x off-policy mask x entropy mask; the bonus on for every other one."""
    mode = {} if correction == "none" else {"importance_sampling_mode": correction, **CORRECTIONS[correction]}
    kls: list[dict[str, Any]] = [{}, {"beta": 0.1, "use_bias_correction_kl": False}, {"beta": 0.1}]
    deltas = [{}, {"delta": 1.4, "epsilon": 0.15, "epsilon_high": 0.28}] if loss_type in CLIPPED else [{}]
    off_policy = [{}, {"off_policy_mask_threshold": 0.02}]
    quantiles = [{}, {"top_entropy_quantile": 0.6}]
    rows = []
    for choice in itertools.product(*(list(enumerate(axis)) for axis in (kls, deltas, off_policy, quantiles))):
        bonus = {"entropy_coef": 0.05} if sum(index for index, _ in choice) % 2 else {}
        options = {name: value for _, part in choice for name, value in part.items()}
        rows.append(base_config(loss_type, importance_sampling_level=level, **mode, **options, **bonus))
    return rows


@cache
def case_of(dtype: torch.dtype, **options: Any) -> Case:
    return make_case(0, dtype=dtype, **options)


class Result:
    """What either side says: loss, gradients in packed logprobs and entropy, metrics."""

    def __init__(self, loss: Tensor, logprobs: Tensor, entropy: Tensor, metrics: dict[str, float] | None) -> None:
        self.metrics = metrics
        loss.backward()
        zeros = torch.zeros_like(entropy)
        assert logprobs.grad is not None
        self.tensors = {
            "loss": loss.detach(),
            "dlogprobs": logprobs.grad,
            "dentropy": zeros if entropy.grad is None else entropy.grad,
        }


@cache
def run_trl(case: Case, config: LossConfig, *, on_policy: bool = False, **options: Any) -> Result:
    """TRL's loss of the padded case."""
    cu_seqlens = case.cu_seqlens
    assert cu_seqlens is not None
    wide = padded(case)
    needed = wide.policy_inputs(config, on_policy=on_policy)
    logprobs, entropy = case.logprobs.clone().requires_grad_(), case.entropy.clone().requires_grad_()
    loss, metrics = trl_policy_loss(
        config,
        to_padded(logprobs, cu_seqlens),
        to_padded(entropy, cu_seqlens),
        wide.loss_mask,
        wide.advantages,
        old=needed["old_logprobs"],
        ref=needed["ref_logprobs"],
        sampling=needed["sampling_logprobs"],
        **options,
    )
    return Result(loss, logprobs, entropy, metrics)


def run_reference(case: Case, config: LossConfig, *, on_policy: bool = False, **options: Any) -> Result:
    logprobs, entropy = case.logprobs.clone().requires_grad_(), case.entropy.clone().requires_grad_()
    needed = case.policy_inputs(config, on_policy=on_policy)
    loss = reference_policy_loss(logprobs, entropy, case.advantages, config=config, **needed, **options)
    return Result(loss, logprobs, entropy, None)


def run_policy_loss(case: Case, config: LossConfig, *, on_policy: bool = False, **options: Any) -> Result:
    logprobs, entropy = case.logprobs.clone().requires_grad_(), case.entropy.clone().requires_grad_()
    needed = case.policy_inputs(config, on_policy=on_policy)
    out = policy_loss(logprobs, case.advantages, entropy=entropy, config=config, **needed, **options)
    return Result(out.loss, logprobs, entropy, out.metrics.as_dict())


@pytest.fixture(params=["reference", "policy_loss"])
def ours(request):
    """The two implementations that must equal TRL."""
    return run_reference if request.param == "reference" else run_policy_loss


def mismatches(actual: Result, expected: Result, bound: float) -> list[str]:
    """What differs: tensors by relative RMS beyond `bound`, metrics by 1e-5 of their value."""
    found = []
    for name, tensor in expected.tensors.items():
        error = rel_rms(actual.tensors[name], tensor)
        if not error <= bound:
            found.append(f"{name} off by {error:.1e}")
    if actual.metrics is not None and expected.metrics is not None:
        for name in expected.metrics.keys() - UNLISTED_METRICS:
            got, want = actual.metrics.get(name), expected.metrics[name]
            if got is None or not abs(got - want) <= 1e-6 + 1e-5 * abs(want):
                found.append(f"{name}: {got} instead of {want}")
    return found


def _options(config: LossConfig) -> dict[str, Any]:
    """What the config says besides the defaults."""
    return {name: value for name, value in vars(config).items() if value != getattr(LossConfig, name, value)}


def compare(ours, case: Case, rows: list[LossConfig], *, bound: float, on_policy: bool = False) -> None:
    failures = []
    for config in rows:
        expected = run_trl(case, config, on_policy=on_policy)
        assert expected.tensors["dlogprobs"].any(), f"a case without gradient shows nothing: {config}"
        found = mismatches(ours(case, config, on_policy=on_policy), expected, bound)
        failures += [f"{_options(config)}: {', '.join(found)}"] if found else []
    assert not failures, f"{len(failures)} of {len(rows)} configs differ from TRL:\n" + "\n".join(failures)


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_option(ours, loss_type: str, level: str, correction: str) -> None:
    if loss_type == "vespo" and correction.startswith("sequence"):
        with pytest.raises(ValueError, match="importance_sampling_mode"):
            configs(loss_type, level, correction)
        return
    compare(ours, case_of(torch.float64), configs(loss_type, level, correction), bound=1e-10)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_float32(ours, loss_type: str) -> None:
    rows = [LossConfig(**p.values[0]) for p in OBJECTIVES if p.values[0]["loss_type"] == loss_type]
    rows = [replace(row, kl_estimator="k3") for row in rows if row.importance_sampling_level != "sequence_token"]
    compare(ours, case_of(torch.float32), rows, bound=TOLERANCES[torch.float32].floor)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy(ours, loss_type: str) -> None:
    modes = [None, "token_truncate"] if loss_type == "vespo" else [None, "token_truncate", "sequence_mask"]
    rows = [base_config(loss_type, beta=0.1, importance_sampling_mode=mode) for mode in modes]
    rows.append(base_config(loss_type, importance_sampling_level="sequence", off_policy_mask_threshold=0.02))
    compare(ours, case_of(torch.float64), rows, bound=1e-10, on_policy=True)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_per_token(ours, loss_type: str) -> None:
    rows = [
        base_config(loss_type, importance_sampling_level=level, off_policy_mask_threshold=threshold)
        for level in ("token", "sequence")
        for threshold in (None, 0.02)
    ]
    compare(ours, case_of(torch.float64, token_advantages=True), rows, bound=1e-10)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_unknown_sampling_logprobs(ours, mode: str) -> None:
    """NaN, the mark of a token whose log-probability the rollout engine did not give, means no difference."""
    case = case_of(torch.float64, missing_sampling=0.2)
    assert case.sampling_logprobs[case.loss_mask].isnan().any()
    loss_types = ["dapo"] if mode.startswith("sequence") else ["dapo", "vespo"]
    rows = [
        base_config(loss_type, importance_sampling_mode=mode, off_policy_mask_threshold=threshold)
        for loss_type in loss_types
        for threshold in (None, 0.02)
    ]
    compare(ours, case, rows, bound=1e-10)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_normalizer_is_the_optimiser_steps_denominator(ours, loss_type: str) -> None:
    case = case_of(torch.float64)
    assert case.cu_seqlens is not None
    config = base_config(loss_type)
    num_sequences, num_tokens = case.cu_seqlens.numel() - 1, int(case.loss_mask.sum())
    if loss_type in ("dapo", "cispo", "vespo"):
        normalizer, options = 373.0, {"num_items": 373}
    else:  # TRL divides these by the number of micro-batches
        default = {"bnpo": num_tokens, "dr_grpo": num_sequences * 24}.get(loss_type, num_sequences)
        normalizer, options = 3.0 * default, {"accumulation_steps": 3}
    found = mismatches(ours(case, config, normalizer=normalizer), run_trl(case, config, **options), 1e-10)
    assert not found, found


# -- the comparison itself --------------------------------------------------------------------------------------------


CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("grpo", {}, {"epsilon": 0.1}),
    ("grpo", {}, {"epsilon_high": 0.4}),
    ("grpo", {}, {"delta": 1.3}),
    ("grpo", {}, {"beta": 0.1}),
    ("grpo", {"beta": 0.1}, {"use_bias_correction_kl": False}),
    ("grpo", {}, {"importance_sampling_level": "sequence"}),
    ("grpo", {}, {"off_policy_mask_threshold": 0.02}),
    ("grpo", {}, {"top_entropy_quantile": 0.55}),
    ("grpo", {}, {"entropy_coef": 0.1}),
    ("grpo", {}, {"importance_sampling_mode": "sequence_mask"}),
    ("grpo", {"importance_sampling_mode": "token_mask"}, {"importance_sampling_clip_max": 1.5}),
    ("grpo", {"importance_sampling_mode": "token_mask"}, {"importance_sampling_clip_min": 0.7}),
    ("dr_grpo", {}, {"max_completion_length": 100}),
    ("cispo", {}, {"epsilon_high": 1.1}),
    ("sapo", {}, {"sapo_temperature_pos": 2.0}),
    ("sapo", {}, {"sapo_temperature_neg": 2.0}),
    ("vespo", {}, {"vespo_k_pos": 1.0}),
    ("vespo", {}, {"vespo_k_neg": 1.0}),
    ("vespo", {}, {"vespo_lambda_pos": 1.0}),
    ("vespo", {}, {"vespo_lambda_neg": 1.0}),
    ("vespo", {}, {"importance_sampling_mode": "token_mask"}),
]


@pytest.mark.parametrize(
    ("loss_type", "base", "change"), CHANGES, ids=[f"{kind}-{'-'.join(change)}" for kind, _, change in CHANGES]
)
def test_the_comparison_sees_each_option(loss_type: str, base: dict[str, Any], change: dict[str, Any]) -> None:
    """TRL's stand-in heeds every option: with the option changed on our side only, the comparison fails."""
    case = case_of(torch.float64)
    before, after = base_config(loss_type, **base), base_config(loss_type, **{**base, **change})
    assert not mismatches(run_reference(case, after), run_trl(case, after), 1e-10)
    assert mismatches(run_reference(case, after), run_trl(case, before), 1e-3)


# -- advantages -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["reference", "group_advantages"])
def our_advantages(request):
    return reference_advantages if request.param == "reference" else group_advantages


def reward_table(num_rewards: int, missing: float) -> Tensor:
    """Six groups of four; one group all equal, and a completion without any reward."""
    gen = torch.Generator().manual_seed(num_rewards)
    rewards = torch.randn(24, num_rewards, generator=gen, dtype=torch.float64)
    rewards[4:8] = 0.5
    rewards[torch.rand(rewards.shape, generator=gen) < missing] = torch.nan
    if missing:
        rewards[9] = torch.nan
        rewards[12:16] = torch.nan
        rewards[17:20] = torch.nan
    return rewards


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("num_rewards", [1, 3])
@pytest.mark.parametrize("how", ["group", "batch", "none", "normalize_then_sum"])
@pytest.mark.parametrize("group_size", [4, 1])
def test_advantages(our_advantages, group_size: int, how: str, num_rewards: int, missing: float) -> None:
    rewards = reward_table(num_rewards, missing)
    weights = torch.tensor([1.0, 0.3, -0.5], dtype=torch.float64)[:num_rewards]
    options: dict[str, Any] = {"aggregation": how} if how == "normalize_then_sum" else {"scale": how}
    expected = trl_advantages(rewards, group_size=group_size, weights=weights, **options)
    assert group_size == 1 or expected.count_nonzero() >= 8
    actual = our_advantages(rewards, group_size=group_size, weights=weights, **options)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-9, atol=1e-12)
