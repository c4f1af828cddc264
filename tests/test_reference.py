"""The oracle against numbers worked out by hand.

The hand-made batch: two sequences, of two tokens and of one. Ratios w = 1.5, 0.5 | 1.1, advantages 1 | -2.
"""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_fast.reference
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.losses import LOSSES
from grpo_fast.reference import reference_advantages, reference_logprobs, reference_loss, reference_policy_loss
from tests.cases import AXES, OBJECTIVES, Case, assert_close, make_case, padded, rel_rms, to_packed

PROBABILITIES = (0.9, 0.2, 0.5)
RATIOS = (1.5, 0.5, 1.1)
CU_SEQLENS = torch.tensor([0, 2, 3])
LOG = math.log


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


P = vector(*PROBABILITIES).log()
ENTROPY = vector(1.0, 2.0, 3.0)
p1, p2, p3 = P.tolist()


def policy(logprobs: Tensor = P, *, ratios: tuple[float, ...] = RATIOS, **options: Any) -> Tensor:
    """The oracle's loss of the hand-made batch; options are LossConfig's or the call's."""
    tensors = {name: options.pop(name) for name in list(options) if isinstance(options[name], Tensor)}
    tensors = {
        "entropy": ENTROPY,
        "advantages": vector(1.0, -2.0),
        "old_logprobs": P - vector(*ratios).log(),
        **tensors,
    }
    normalizer = options.pop("normalizer", None)
    return reference_policy_loss(
        logprobs, cu_seqlens=CU_SEQLENS, config=LossConfig(**options), normalizer=normalizer, **tensors
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


PHI_1 = math.exp(3 + 2 * LOG(0.75) - 3 * 0.75)
PHI_2 = math.exp(2 + 3 * LOG(1.1) - 2 * 1.1)
# Each line: what is asked, and the terms of the three tokens, aggregated, written out.
BY_HAND: list[tuple[dict[str, Any], float]] = [
    ({"loss_type": "grpo"}, ((-1.2 - 0.5) / 2 + 2.2) / 2),
    ({"loss_type": "bnpo"}, (-1.2 - 0.5 + 2.2) / 3),
    ({"loss_type": "dapo"}, (-1.2 - 0.5 + 2.2) / 3),
    ({"loss_type": "dr_grpo", "max_completion_length": 4}, (-1.2 - 0.5 + 2.2) / (2 * 4)),
    ({"loss_type": "luspo"}, (-1.2 - 0.5 + 2.2) / 2),
    ({"loss_type": "cispo", "epsilon_high": 1.25}, (-1.25 * p1 - 0.5 * p2 + 2.2 * p3) / 3),
    ({"loss_type": "sapo"}, ((-4 * sigmoid(0.5) - 4 * sigmoid(-0.5)) / 2 + 2 * 4 / 1.05 * sigmoid(0.105)) / 2),
    ({"loss_type": "vespo"}, (-PHI_1 * (p1 + p2) + 2 * PHI_2 * p3) / 3),
    ({"loss_type": "gmpo"}, (-math.sqrt(1.2 * 0.5) + 2.2) / 2),
    # Token 1: pi - mu = 0.9 - 0.6 > 0.2 with A > 0, so only the regulariser is left of it.
    ({"loss_type": "dppo"}, (-0.5 + 2.2 + 1e-3 * (LOG(1.5) ** 2 + LOG(0.5) ** 2 + LOG(1.1) ** 2)) / 3),
    # Token 2 (0.2 against 0.13) stays; token 3 (0.5 against 0.8, A < 0) goes.
    ({"loss_type": "dppo", "ratios": (1.1, 1.5, 0.625), "dppo_log_ratio_coef": 0}, (-1.1 - 1.5) / 3),
    ({"loss_type": "dppo", "sampling_logprobs": P - 0.01, "dppo_log_ratio_coef": 0}, (-1.5 - 0.5 + 2.2) / 3),
    ({"loss_type": "gmpo", "ratios": (1.5, 0.5, 0.7)}, (-math.sqrt(1.2 * 0.5) + 2 * 0.8) / 2),
    ({"loss_type": "gmpo", "advantages": vector(1, 3, -2)}, (-2 * math.sqrt(1.2 * 0.5) + 2.2) / 2),
    ({"loss_type": "ppo_dual", "dual_clip": 1.05}, (-1.2 - 0.5 + 2.1) / 3),
    ({"loss_type": "reinforce"}, (-p1 - p2 + 2 * p3) / 3),
    ({"loss_type": "rloo"}, (-p1 - p2 + 2 * p3) / 3),
    ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, (-math.sqrt(0.75) + 2.2) / 2),
    ({"loss_type": "grpo", "importance_sampling_level": "sequence_token"}, (-math.sqrt(0.75) + 2.2) / 2),
    ({"epsilon": 0.05, "epsilon_high": 0.4}, (-1.4 - 0.5 + 2.2) / 3),
    ({"delta": 1.05, "epsilon_high": 0.02}, (-1.02 - 0.5 + 2.1) / 3),
    ({"epsilon_high": 0.6, "old_logprobs": P - vector(1.5, 0.5, 0.7).log()}, (-1.5 - 0.5 + 1.6) / 3),
    ({"normalizer": 10}, 0.5 / 10),
    ({"loss_type": "grpo", "normalizer": 10}, (-0.85 + 2.2) / 10),
    # KL: ref - p = 0.5, -0.5, 0.
    *(
        (
            {
                "beta": 0.1,
                "kl_estimator": name,
                "use_bias_correction_kl": False,
                "ref_logprobs": P + vector(0.5, -0.5, 0),
            },
            x,
        )
        for name, x in [
            ("k1", 0.5 / 3),
            ("k2", (0.5 + 0.1 * 0.25) / 3),
            ("k3", (0.5 + 0.1 * (math.exp(0.5) + math.exp(-0.5) - 2)) / 3),
        ]
    ),
    (
        {"beta": 0.1, "kl_estimator": "k1", "ref_logprobs": P + vector(0.5, -0.5, 0)},
        (0.5 + 0.1 * 0.5 * (-1.5 + 0.5)) / 3,
    ),
    # Entropies 1, 2, 3: the median, 2, and what is above it stay.
    ({"top_entropy_quantile": 0.5}, (-0.5 + 2.2) / 3),
    ({"top_entropy_quantile": 0.5, "entropy_coef": 0.1}, (-0.5 + 2.2) / 3 - 0.1 * 2.5),
    ({"entropy_coef": 0.1}, 0.5 / 3 - 0.1 * 2),
    ({"loss_type": "grpo", "entropy_coef": 0.1, "normalizer": 10}, 1.35 / 10 - 0.1 * 2),
]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(name if isinstance(value, Tensor) else f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize(("options", "expected"), BY_HAND, ids=[name_of(options) for options, _ in BY_HAND])
def test_by_hand(options: dict[str, Any], expected: float) -> None:
    assert float(policy(**options)) == pytest.approx(expected, rel=1e-12)


# Terms without correction: -1.2, -0.5 | 2.2; e^d = 4, 0.25 | 2; their product over sequence 1 is 1.
@pytest.mark.parametrize(
    ("mode", "bounds", "expected"),
    [
        ("token_truncate", (None, 3.0), (-1.2 * 3 - 0.5 * 0.25 + 2.2 * 2) / 3),
        ("token_truncate", (0.5, 3.0), (-1.2 * 3 - 0.5 * 0.5 + 2.2 * 2) / 3),
        ("token_mask", (None, 3.0), (-0.5 * 0.25 + 2.2 * 2) / 3),
        ("token_mask", (0.5, None), (-1.2 * 4 + 2.2 * 2) / 3),
        ("sequence_truncate", (None, 1.5), (-1.7 + 2.2 * 1.5) / 3),
        ("sequence_mask", (None, 1.5), -1.7 / 3),
        ("sequence_mask", (1.5, 3.0), 2.2 * 2 / 3),
    ],
)
def test_corrections_by_hand(mode: str, bounds: tuple[float | None, float | None], expected: float) -> None:
    sampling = P - vector(*RATIOS).log() - vector(4.0, 0.25, 2.0).log()
    low, high = bounds
    options = {"importance_sampling_clip_min": low, "importance_sampling_clip_max": high}
    loss = policy(sampling_logprobs=sampling, importance_sampling_mode=mode, **options)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("drift", "expected"),
    [
        ((9.0, 9.0, 0.1), 0.5 / 3),  # A > 0 is never dropped
        ((0.0, 0.0, 0.11), -1.7 / 3),
        ((0.0, 0.0, math.nan), 0.5 / 3),  # unknown: no evidence against it
    ],
)
def test_off_policy_mask_by_hand(drift: tuple[float, ...], expected: float) -> None:
    loss = policy(sampling_logprobs=P + vector(*drift), off_policy_mask_threshold=0.1 + 1e-9)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_off_policy_mask_falls_back_to_old() -> None:
    # Sequence 2 has old - p = -log 1.1 = -0.095.
    assert float(policy(off_policy_mask_threshold=-0.09)) == pytest.approx(0.5 / 3)
    assert float(policy(off_policy_mask_threshold=-0.10)) == pytest.approx(-1.7 / 3)


def test_ratio_levels_differ_in_their_gradient() -> None:
    """Advantages 1 and 3 within a sequence: `sequence` spreads the gradient, `sequence_token` leaves each its own."""
    gradients = {}
    for level in ("sequence", "sequence_token"):
        p = P.clone().requires_grad_()
        policy(
            p, loss_type="luspo", epsilon=0.5, importance_sampling_level=level, advantages=vector(1, 3, 0)
        ).backward()
        gradients[level] = p.grad
    w = math.sqrt(0.75)
    torch.testing.assert_close(gradients["sequence"], vector(-2 * w, -2 * w, 0) / 2)
    torch.testing.assert_close(gradients["sequence_token"], vector(-w, -3 * w, 0) / 2)


def test_on_policy_has_ratio_one_with_gradient() -> None:
    p = P.clone().requires_grad_()
    config = LossConfig(loss_type="grpo")
    reference_policy_loss(p, None, vector(1, -2), cu_seqlens=CU_SEQLENS, config=config).backward()
    torch.testing.assert_close(p.grad, vector(-0.25, -0.25, 1.0))


# -- logprobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [None, HeadConfig(), HeadConfig(logit_scale=0.3, softcap=2.0)])
@pytest.mark.parametrize("per_token", [False, True])
def test_logprobs_by_hand(head: HeadConfig | None, per_token: bool) -> None:
    hidden, weight, bias = (
        vector(1, 2, -1, 0.5).view(2, 2),
        vector(0.5, -1, 2, 1, 0, 3).view(3, 2),
        vector(0.1, 0.2, -1),
    )
    temperatures = (0.7, 1.3) if per_token else (0.7, 0.7)
    got = reference_logprobs(
        hidden,
        weight,
        torch.tensor([2, 0]),
        bias=bias,
        head=head,
        temperature=vector(*temperatures) if per_token else temperatures[0],
    )
    for row, target, temperature in zip(range(2), (2, 0), temperatures, strict=True):
        z = [sum(a * b for a, b in zip(hidden[row].tolist(), w, strict=True)) for w in weight.tolist()]
        z = [value + b for value, b in zip(z, bias.tolist(), strict=True)]
        if head is not None:
            z = [head.logit_scale * value for value in z]
            z = [value if head.softcap is None else head.softcap * math.tanh(value / head.softcap) for value in z]
        weights = [math.exp(value / temperature) for value in z]
        share = [value / sum(weights) for value in weights]
        assert got[0][row].item() == pytest.approx(LOG(share[target]), rel=1e-12)
        assert got[1][row].item() == pytest.approx(-sum(q * LOG(q) for q in share), rel=1e-12)


def test_logprobs_on_a_support_by_hand() -> None:
    """Sums over the support alone, after cap and temperature; one token: 0; none: all of V. No gradient is NaN."""
    z = [2.0, -1.0, 0.5, 3.0]
    leaves = [torch.eye(4, dtype=torch.float64).requires_grad_(), vector(*z).diag().requires_grad_()]
    hidden = torch.ones(4, 4, dtype=torch.float64)
    support = SimpleNamespace(token_ids=torch.tensor([2, 0, 1, 3, 1]), offsets=torch.tensor([0, 2, 3, 5, 5]))
    head = HeadConfig(softcap=4.0)
    got = reference_logprobs(
        hidden @ leaves[0], leaves[1], torch.tensor([0, 1, 3, 3]), head=head, temperature=0.5, support=support
    )
    w = [math.exp(4.0 * math.tanh(value / 4.0) / 0.5) for value in z]
    kept = ([0, 2], [1], [1, 3], [0, 1, 2, 3])
    for row, (ids, target) in enumerate(zip(kept, (0, 1, 3, 3), strict=True)):
        share = {v: w[v] / sum(w[u] for u in ids) for v in ids}
        assert got[0][row].item() == pytest.approx(LOG(share[target]), rel=1e-12, abs=0.0)
        assert got[1][row].item() == pytest.approx(-sum(q * LOG(q) for q in share.values()), rel=1e-12, abs=0.0)
    (got[0].sum() + got[1].sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)

    def on_it(weight: Tensor) -> tuple[Tensor, Tensor]:
        return reference_logprobs(hidden, weight, torch.tensor([0, 1, 3, 3]), head=head, support=support)

    assert torch.autograd.gradcheck(on_it, leaves[1])
    (gradient,) = torch.autograd.grad(on_it(leaves[1])[0][1:3].sum(), leaves[1])
    assert not gradient[[0, 2]].any()  # rows outside of the supports
    assert gradient[[1, 3]].all(1).all()
    missing = reference_logprobs(hidden[:1], leaves[1], torch.tensor([3]), support=support_of([[2, 0]]))[0]
    assert missing.tolist() == [-math.inf]


def support_of(rows: list[list[int]]) -> SimpleNamespace:
    ids = torch.tensor([v for row in rows for v in row])
    return SimpleNamespace(token_ids=ids, offsets=torch.tensor([0, *accumulate(len(row) for row in rows)]))


def test_the_support_of_masked_rows_is_left_out() -> None:
    """Its rows are those of all targets, in either layout."""
    case = make_case(5, lengths=(3, 0, 2), vocab=7, hidden_size=4, dtype=torch.float64, masked_sequence=False)
    case.loss_mask[:] = torch.tensor([True, False, True, False, True])
    rows = [[(int(y) + k) % 7 for k in range(size)] for y, size in zip(case.targets, (2, 1, 0, 3, 4), strict=True)]
    kept = {"grpo": [rows[t] for t in (0, 2, 4)], "padded": [*rows[:3], *[[6]] * 5, *rows[3:], [], []]}
    packed = run(case, LossConfig(), support=support_of(rows))
    both = run(padded(case), LossConfig(), support=support_of(kept["padded"]))
    alone = replace(
        case,
        **{
            name: getattr(case, name)[case.loss_mask]
            for name in ("hidden", "targets", "old_logprobs", "ref_logprobs", "sampling_logprobs", "loss_mask")
        },
        cu_seqlens=torch.tensor([0, 2, 2, 3]),
    )
    few = run(alone, LossConfig(), support=support_of(kept["grpo"]))
    assert both[0] == pytest.approx(float(packed[0]), rel=1e-12)
    assert few[0] == pytest.approx(float(packed[0]), rel=1e-12)
    torch.testing.assert_close(few[1]["weight"], packed[1]["weight"])
    assert run(case, LossConfig())[0] != pytest.approx(float(packed[0]), rel=1e-3)


# -- layouts, masks, emptiness ----------------------------------------------------------------------------------------


def run(case: Case, config: LossConfig, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients of hidden (packed), weight and bias."""
    leaves = case.leaves()
    inputs = {"bias": leaves.get("bias"), "head": case.head, **case.policy_inputs(config), **options}
    out = reference_loss(leaves["hidden"], leaves["weight"], case.targets, case.advantages, config=config, **inputs)
    out.loss.backward()
    return out.loss.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("kwargs", OBJECTIVES)
def test_padded_equals_packed(kwargs: dict[str, Any]) -> None:
    """And nothing that is masked, NaN here, has any influence; every row of the matrix has a gradient."""
    case = make_case(0, dtype=torch.float64, bias=True)
    wide = padded(case, fill_hidden=math.nan, fill_target=-100, fill_logprob=math.nan)
    config = LossConfig(**kwargs)
    loss, gradients = run(case, config)
    wide_loss, wide_gradients = run(wide, config)
    wide_gradients["hidden"] = to_packed(wide_gradients["hidden"], case.cu_seqlens)
    assert_close("loss", wide_loss, loss)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert_close(f"d{name}", wide_gradients[name], gradient)
    with pytest.raises(AssertionError, match=r"relative RMS error 1\.0"):
        assert_close("zeroed", torch.zeros_like(loss), loss)


@pytest.mark.parametrize("lengths", [(), (0, 0), (3, 0, 2)], ids=["no-sequences", "no-tokens", "all-masked"])
@pytest.mark.parametrize("loss_type", AXES["loss_type"])
def test_nothing_to_learn_from(loss_type: str, lengths: tuple[int, ...]) -> None:
    case = make_case(0, lengths, dtype=torch.float64, masked_fraction=1.0)
    options = {"beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.5, "max_completion_length": 8}
    options["epsilon_high"] = 1.25
    loss, gradients = run(case, LossConfig(loss_type=loss_type, importance_sampling_level="sequence", **options))
    assert loss == 0
    assert all(gradient.eq(0).all() for gradient in gradients.values())


@pytest.mark.parametrize("loss_type", AXES["loss_type"])
def test_micro_batches_add_up(loss_type: str) -> None:
    """With the whole step's denominator as `normalizer`, the losses of its parts sum to that of the whole."""
    case = make_case(0, dtype=torch.float64)
    assert case.cu_seqlens is not None
    options = {"importance_sampling_mode": "token_mask", "max_completion_length": 24, "epsilon_high": 0.3}
    config = LossConfig(loss_type=loss_type, beta=0.1, **options)
    num_sequences = case.cu_seqlens.numel() - 1
    per_sequence = {"sequence_mean": 1, "sequence_sum": 1, "constant_length": 24}.get(LOSSES[loss_type].aggregation)
    total = int(case.loss_mask.sum()) if per_sequence is None else num_sequences * per_sequence

    names = ("loss_mask", "old_logprobs", "ref_logprobs", "sampling_logprobs")
    parts = []
    for begin, end in ((0, 5), (5, num_sequences)):
        bounds = case.cu_seqlens[begin : end + 1]
        tokens = slice(int(bounds[0]), int(bounds[-1]))
        tensors = {name: getattr(case, name)[tokens] for name in names}
        parts.append(
            reference_policy_loss(
                case.logprobs[tokens],
                None,
                case.advantages[begin:end],
                cu_seqlens=bounds - bounds[0],
                config=config,
                normalizer=total,
                **tensors,
            )
        )
    whole = reference_policy_loss(
        case.logprobs,
        None,
        case.advantages,
        config=config,
        cu_seqlens=case.cu_seqlens,
        **{n: getattr(case, n) for n in names},
    )
    assert_close("sum", parts[0] + parts[1], whole)


def test_entropy_is_asked_for() -> None:
    for options in ({"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}):
        with pytest.raises(ValueError, match="entropy"):
            reference_policy_loss(P, None, vector(1, 1), cu_seqlens=CU_SEQLENS, config=LossConfig(**options))


# -- mutations: each option matters, on the shared case ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({"loss_type": "gmpo"}, {"epsilon": 0.1}),
        ({"loss_type": "gmpo"}, {"epsilon_high": 0.3}),
        ({"loss_type": "gmpo", "beta": 0.1}, {"importance_sampling_level": "sequence"}),
        ({"loss_type": "dppo"}, {"dppo_threshold": 0.1}),
        ({"loss_type": "dppo"}, {"dppo_log_ratio_coef": 0.1}),
        ({"loss_type": "ppo_dual"}, {"dual_clip": 1.3}),
        ({"loss_type": "ppo_dual"}, {"delta": 1.3}),
        ({"loss_type": "dapo", "beta": 0.1}, {"kl_estimator": "k1"}),
        ({"loss_type": "dapo", "beta": 0.1}, {"kl_estimator": "k2"}),
        ({"loss_type": "dapo", "beta": 0.1}, {"use_bias_correction_kl": False}),
        (
            {"loss_type": "dapo", "importance_sampling_level": "sequence", "importance_sampling_mode": "token_mask"},
            {"importance_sampling_level": "sequence_token"},
        ),
        ({"loss_type": "reinforce", "importance_sampling_mode": "token_mask"}, {"importance_sampling_clip_max": 1.5}),
        ({"loss_type": "dapo"}, {"temperature": 0.9}),
        ({"loss_type": "dapo"}, {"loss_type": "grpo"}),
    ],
    ids=name_of,
)
def test_each_option_moves_the_gradient(base: dict[str, Any], change: dict[str, Any]) -> None:
    case = make_case(0, dtype=torch.float64)
    _, before = run(case, LossConfig(**base))
    _, after = run(case, LossConfig(**{**base, **change}))
    assert rel_rms(after["hidden"], before["hidden"]) > 1e-3


def test_the_oracle_imports_torch_only() -> None:
    tree = ast.parse(Path(grpo_fast.reference.__file__).read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert imported == {"__future__", "collections.abc", "itertools", "math", "torch", "types", "typing"}


# -- advantages -------------------------------------------------------------------------------------------------------

S2 = math.sqrt(2) + 1e-4  # the deviation of 1 and 3, as it divides


@pytest.mark.parametrize(
    ("rewards", "options", "expected"),
    [
        ((1, 3, 5, 5), {"group_size": 2}, (-1 / S2, 1 / S2, 0, 0)),
        ((1, 3, 5, 5), {"group_size": 2, "scale": "none"}, (-1, 1, 0, 0)),
        ((1, 3, 5, 7), {"group_size": 2, "scale": "batch"}, [x / (math.sqrt(20 / 3) + 1e-4) for x in (-1, 1, -1, 1)]),
        ((1, 3, 8), {"group_size": 3, "scale": "leave_one_out"}, (1 - 5.5, 3 - 4.5, 8 - 2)),
        ((1, 9, 3), {"group_ids": ["a", "b", "a"]}, (-1 / S2, 0, 1 / S2)),
        ((1, 9, 3), {"group_ids": torch.tensor([7, 2, 7]), "scale": "leave_one_out"}, (-2, 0, 2)),
        ((1, math.nan, 3), {"group_size": 3}, (-1 / S2, 0, 1 / S2)),
        ((1, math.nan, 3), {"group_size": 3, "scale": "leave_one_out"}, (-2, 0, 2)),
        (
            (4, math.nan, 4, 2),
            {"group_size": 2, "scale": "batch"},
            (0, 0, *(x / (math.sqrt(4 / 3) + 1e-4) for x in (1, -1))),
        ),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else "",
)
def test_advantages_by_hand(rewards: tuple[float, ...], options: dict[str, Any], expected: Any) -> None:
    torch.testing.assert_close(reference_advantages(vector(*rewards), **options), vector(*expected), rtol=1e-12, atol=0)


def test_several_rewards_by_hand() -> None:
    rewards = vector(1, 10, 3, math.nan, math.nan, math.nan).view(3, 2)
    options: dict[str, Any] = {"group_size": 3, "weights": [1.0, 0.5]}
    # Summed: 1 + 5 = 6 and 3; the third has no reward.
    summed = reference_advantages(rewards, scale="none", **options)
    torch.testing.assert_close(summed, vector(1.5, -1.5, 0))
    # Scored: -+1 / S2 for the first reward, 0 for the second (a group of one); their z-score over the batch.
    scored = reference_advantages(rewards, aggregation="normalize_then_sum", **options)
    z = (1 / S2) / (math.sqrt(2) / S2 + 1e-4)
    torch.testing.assert_close(scored, vector(-z, z, 0))


@pytest.mark.parametrize("options", [{}, {"group_ids": [0]}], ids=["none", "too-few"])
def test_groups_must_cover_the_rewards(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="group_ids: expected 2 labels"):
        reference_advantages(vector(1, 2), **options)
