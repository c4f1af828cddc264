"""What may stand for an argument, what is refused, and the two denominators: the public functions' front door."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_fast
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.head import Head
from grpo_fast.loss import Metrics, grpo_loss, policy_loss, token_logprobs
from tests.cases import BACKENDS, make_case, rel_rms
from tests.test_loss import oracle, run

GSPO = LossConfig(importance_sampling_level="sequence", loss_type="grpo")


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_at_the_top_need_torch_only() -> None:
    code = """
import sys
import grpo_fast
assert "torch" not in sys.modules, "importing the package loads nothing"
from grpo_fast import Head, HeadConfig, LossConfig, grpo_loss, head_of, policy_loss, token_logprobs
from grpo_fast.loss import grpo_loss as same
assert same is grpo_loss
assert not {"transformers", "datasets", "omegaconf"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_at_the_top() -> None:
    with pytest.raises(AttributeError, match="module 'grpo_fast' has no attribute 'grpo_los'"):
        grpo_fast.grpo_los  # noqa: B018
    assert set(grpo_fast.__all__) <= {name for name in grpo_fast.__all__ if getattr(grpo_fast, name)}


# -- a head -----------------------------------------------------------------------------------------------------------


def test_a_head_stands_for_weight_bias_and_config() -> None:
    case = make_case(1, bias=True, softcap=12.0)
    config = HeadConfig(softcap=12.0)
    head = Head(weight=case.weight, bias=case.bias, config=config, backbone=torch.nn.Identity())
    given = {"cu_seqlens": case.cu_seqlens, "loss_mask": case.loss_mask}
    plain = grpo_loss(case.hidden, case.weight, case.targets, case.advantages, bias=case.bias, head=config, **given)
    for weight, options in (
        (head, {}),
        (head, {"head": head}),
        (None, {"head": head}),
        (case.weight, {"head": head}),
        (case.weight, {"head": head, "bias": case.bias}),
    ):
        out = grpo_loss(case.hidden, weight, case.targets, case.advantages, **options, **given)
        assert torch.equal(out.loss, plain.loss)
        logprobs = token_logprobs(case.hidden, weight, case.targets, **options).logprobs
        assert torch.equal(logprobs[out.computed], plain.logprobs[out.computed])


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (None, {}, r"weight: expected a tensor \[V, H\], or a Head .*got None"),
        ("head", {"head": HeadConfig()}, "head: expected none besides the Head"),
        ("other", {"head": "head"}, "weight: expected None or the weight of the Head"),
        ("head", {"bias": torch.zeros(97)}, "bias: expected None or the bias of the Head"),
        ("other", {"head": 3.0}, r"head: expected a HeadConfig, or a Head as head_of\(model\) gives it; got float"),
    ],
)
def test_contradicting_heads(weight: Any, options: dict[str, Any], message: str) -> None:
    case = make_case(1)
    named = {
        "head": Head(weight=case.weight, bias=None, config=HeadConfig(), backbone=torch.nn.Identity()),
        "other": case.weight.clone(),
    }
    options = {name: named.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    for function, arguments in ((grpo_loss, (case.advantages,)), (token_logprobs, ())):
        if function is grpo_loss:
            options = options | {"cu_seqlens": case.cu_seqlens}
        else:
            options = {name: value for name, value in options.items() if name != "cu_seqlens"}
        with pytest.raises(ValueError, match=message):
            function(case.hidden, named.get(weight), case.targets, *arguments, **options)


class Placed(Tensor):
    """What a DTensor looks like from here."""

    placements = ("Shard(dim=0)",)


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_a_sharded_tensor_is_refused(name: str) -> None:
    case = make_case(1)
    given = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets}
    given[name] = given[name].as_subclass(Placed)
    with pytest.raises(ValueError, match=rf"{name}: expected a tensor that is whole on this rank; got a DTensor"):
        token_logprobs(**given)


def test_main_grad_of_strides_is_refused() -> None:
    """B1: the cpu backend writes rows one after another, a view's neighbours included."""
    case = make_case(1)
    leaves, whole = case.leaves(), torch.zeros(97, 64)
    arguments = (leaves["hidden"], leaves["weight"], case.targets)
    with pytest.raises(ValueError, match=r"main_grad: expected contiguous memory; got shape \[97, 32\] with strides"):
        grpo_loss(*arguments, case.advantages, cu_seqlens=case.cu_seqlens, main_grad=whole[:, :32])
    with pytest.raises(ValueError, match="main_grad: expected contiguous memory"):
        token_logprobs(*arguments, main_grad=torch.zeros(32, 97).t())
    assert not whole.any()
    with pytest.raises(ValueError, match="main_grad: expected memory of its own; got the weight's"):
        token_logprobs(*arguments, main_grad=leaves["weight"].detach())


# -- temperature ------------------------------------------------------------------------------------------------------


def test_temperature_of_the_config() -> None:
    case = make_case(2)
    config = LossConfig(temperature=0.7)
    given = (case.hidden, case.weight, case.targets)
    expected = token_logprobs(*given, temperature=0.7).logprobs
    assert torch.equal(token_logprobs(*given, config=config).logprobs, expected)
    assert torch.equal(token_logprobs(*given, config=config, temperature=0.7).logprobs, expected)
    per_row = torch.full(case.targets.shape, 0.7)
    assert rel_rms(token_logprobs(*given, config=config, temperature=per_row).logprobs, expected) <= 1e-6
    with pytest.raises(ValueError, match=r"temperature: expected that of config, 0\.7, or None; got 1\.0"):
        token_logprobs(*given, config=config, temperature=1.0)
    out = grpo_loss(*given, case.advantages, cu_seqlens=case.cu_seqlens, old_logprobs=expected, config=config)
    metrics = out.metrics.as_dict()
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1.0


# -- which tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_targets_are_masked_ones(backend: str) -> None:
    case = make_case(3, masked_fraction=0.3)
    mask = case.loss_mask
    expected, gradients = run(case, LossConfig(entropy_coef=0.1), backend=backend)
    ignored = torch.where(mask, case.targets, -100)
    for options in (
        {"targets": ignored},
        {"targets": ignored, "loss_mask": mask.float()},
        {"targets": torch.where(mask, case.targets, 7), "loss_mask": mask.double()},
        {"targets": torch.where(mask, case.targets, -1), "ignore_index": -1},
        {"targets": ignored.int(), "loss_mask": mask.long(), "ignore_index": None},
    ):
        leaves = case.leaves()
        out = grpo_loss(
            leaves["hidden"], leaves["weight"], advantages=case.advantages, cu_seqlens=case.cu_seqlens,
            old_logprobs=case.old_logprobs, config=LossConfig(entropy_coef=0.1), backend=backend, **options,
        )  # fmt: skip
        out.loss.backward()
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(out.computed, mask)
        assert torch.equal(leaves["weight"].grad, gradients["weight"])
    found = token_logprobs(case.hidden, case.weight, ignored, backend=backend)
    assert not found.logprobs[~mask].any()
    assert torch.equal(found.logprobs[mask], expected.logprobs[mask])


def test_advantages_of_either_shape() -> None:
    case = make_case(4)
    given = {"cu_seqlens": case.cu_seqlens, "old_logprobs": case.old_logprobs}
    lengths = case.cu_seqlens.diff()
    expected = grpo_loss(case.hidden, case.weight, case.targets, case.advantages, **given).loss
    per_token = case.advantages.repeat_interleave(lengths)
    for advantages in (case.advantages[:, None], per_token, per_token[None]):
        loss = grpo_loss(case.hidden, case.weight, case.targets, advantages, **given).loss
        assert rel_rms(loss, expected) <= 1e-6
        assert rel_rms(policy_loss(case.logprobs, advantages, **given).loss, expected) <= 1e-5
    shape = (3, 4)
    hidden, targets = torch.randn(*shape, 8), torch.zeros(shape, dtype=torch.int64)
    weight, advantages = torch.randn(9, 8), torch.tensor([1.0, -1.0, 0.5])
    padded = [grpo_loss(hidden, weight, targets, a).loss for a in (advantages, advantages[:, None])]
    assert torch.equal(*padded)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_sequences_as_tokens(backend: str) -> None:
    """B11: four tokens in four sequences, one of them empty: whose are the advantages?"""
    hidden, weight, targets = torch.randn(4, 8), torch.randn(9, 8), torch.arange(4)
    cu_seqlens, advantages = torch.tensor([0, 1, 1, 3, 4]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    given = {"cu_seqlens": cu_seqlens, "config": LossConfig(loss_type="reinforce"), "backend": backend}
    with pytest.raises(
        ValueError, match=r"advantages: \[4\] is one a sequence as well as one a token here; expected \[4, 1\]"
    ):
        grpo_loss(hidden, weight, targets, advantages, **given)
    logprobs = token_logprobs(hidden, weight, targets).logprobs
    by_token = grpo_loss(hidden, weight, targets, advantages[None], **given)
    by_sequence = grpo_loss(hidden, weight, targets, advantages[:, None], **given)
    assert rel_rms(by_token.loss, -(advantages * logprobs).mean()) <= 1e-6
    assert rel_rms(by_sequence.loss, -(advantages[[0, 2, 2, 3]] * logprobs).mean()) <= 1e-6
    alone = given | {"cu_seqlens": torch.arange(5)}  # of one token each: no question
    assert torch.equal(grpo_loss(hidden, weight, targets, advantages, **alone).loss, by_token.loss)


def test_sequences_that_matter_must_be_said() -> None:
    hidden, weight, targets = torch.randn(6, 8), torch.randn(9, 8), torch.arange(6)
    advantages = torch.randn(6)
    message = (
        r"cu_seqlens: expected \[S\+1\], as the loss looks at whole sequences .*got None \(\[0, 6\] is one sequence\)"
    )
    for config in (GSPO, LossConfig(loss_type="grpo"), LossConfig(off_policy_mask_threshold=0.1)):
        with pytest.raises(ValueError, match=message):
            grpo_loss(hidden, weight, targets, advantages, config=config)
        grpo_loss(hidden, weight, targets, advantages, config=config, cu_seqlens=torch.tensor([0, 6]))
        grpo_loss(hidden, weight, targets, advantages[:1], config=config)  # one sequence, it says
    grpo_loss(hidden, weight, targets, advantages)  # dapo's tokens stand alone


# -- denominators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("quantile", [1.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_with_a_bonus_add_up(backend: str, quantile: float, as_tensor: bool) -> None:
    """B4, B10: with both denominators, losses, gradients and merged metrics are the undivided step's."""
    case = make_case(5, dtype=torch.float32)
    config = LossConfig(entropy_coef=0.3, beta=0.1, top_entropy_quantile=quantile)
    count, bounds = int(case.loss_mask.sum()), case.cu_seqlens.tolist()
    denominators: dict[str, Any] = {"normalizer": count, "entropy_normalizer": 0.5 * count}
    if as_tensor:
        denominators = {name: torch.tensor(float(value)) for name, value in denominators.items()}
    given = {name: t for name, t in case.policy_inputs(config).items() if t is not None and name != "cu_seqlens"}
    whole = case.leaves()
    out = grpo_loss(
        whole["hidden"], whole["weight"], case.targets, case.advantages, cu_seqlens=case.cu_seqlens, config=config,
        backend=backend, **denominators, **given,
    )  # fmt: skip
    out.loss.backward()
    parts, total, metrics = case.leaves(), 0.0, []
    for first, last in ((0, 3), (3, 8), (8, 12)):
        rows = slice(bounds[first], bounds[last])
        part = grpo_loss(
            parts["hidden"][rows], parts["weight"], case.targets[rows], case.advantages[first:last],
            cu_seqlens=case.cu_seqlens[first : last + 1] - bounds[first], config=config, backend=backend,
            **denominators, **{name: t[rows] for name, t in given.items()},
        )  # fmt: skip
        part.loss.backward()
        total += part.loss.item()
        metrics.append(part.metrics)
    merged = Metrics.merge(metrics).as_dict()
    assert merged["loss"] == pytest.approx(total, rel=1e-5)
    if quantile == 1.0:  # which tokens are in a quantile depends on the others
        assert total == pytest.approx(out.loss.item(), rel=1e-5)
        assert rel_rms(parts["weight"].grad, whole["weight"].grad) <= 1e-5
        assert rel_rms(parts["hidden"].grad, whole["hidden"].grad) <= 1e-5
        assert merged == pytest.approx(out.metrics.as_dict(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_merged_loss_without_denominators_is_the_whole_batch_s(loss_type: str) -> None:
    """B10: not the mean, and not the sum, of the parts' losses."""
    case = make_case(6, dtype=torch.float64)
    config = LossConfig(loss_type=loss_type, entropy_coef=0.2, max_completion_length=20)
    bounds, metrics = case.cu_seqlens.tolist(), []
    for first, last in ((0, 2), (2, 9), (9, 12)):
        rows = slice(bounds[first], bounds[last])
        metrics.append(
            policy_loss(
                case.logprobs[rows], case.advantages[first:last], entropy=case.entropy[rows], config=config,
                cu_seqlens=case.cu_seqlens[first : last + 1] - bounds[first], loss_mask=case.loss_mask[rows],
                old_logprobs=case.old_logprobs[rows],
            ).metrics
        )  # fmt: skip
    whole = policy_loss(
        case.logprobs, case.advantages, entropy=case.entropy, config=config, cu_seqlens=case.cu_seqlens,
        loss_mask=case.loss_mask, old_logprobs=case.old_logprobs,
    )  # fmt: skip
    merged = Metrics.merge(metrics).as_dict()
    assert merged["loss"] == pytest.approx(whole.loss.item(), rel=1e-12)
    assert whole.metrics.as_dict()["loss"] == pytest.approx(whole.loss.item(), rel=1e-12)


def test_the_entropys_denominator_replaces_the_number_of_tokens() -> None:
    case = make_case(7, dtype=torch.float64)
    config = LossConfig(entropy_coef=0.2)
    plain, gradients = run(case, config)
    count = float(case.loss_mask.sum())
    same, same_gradients = run(case, config, entropy_normalizer=count)
    half, _ = run(case, config, entropy_normalizer=2 * count)
    assert same.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    assert all(rel_rms(same_gradients[name], gradients[name]) <= 1e-12 for name in gradients)
    bonus = 0.2 * case.entropy[case.loss_mask].mean().item()
    assert half.loss.item() - plain.loss.item() == pytest.approx(bonus / 2, rel=1e-9)
    expected, _ = oracle(case, config)
    assert plain.loss.item() == pytest.approx(expected.loss.item(), rel=1e-10)


@pytest.mark.parametrize("name", ["normalizer", "entropy_normalizer"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), torch.tensor(0.0), torch.ones(2)])
def test_bad_denominators(name: str, value: Any) -> None:
    case = make_case(7)
    with pytest.raises(ValueError, match=rf"{name}: expected (a finite number > 0|one number); got"):
        policy_loss(case.logprobs, case.advantages, cu_seqlens=case.cu_seqlens, **{name: value})


@pytest.mark.parametrize("plan", ["single_pass", "recompute"])
def test_denominators_get_no_gradient_in_any_plan(plan: str) -> None:
    case = make_case(7)
    leaves = case.leaves()
    counts = [torch.tensor(7.0, requires_grad=True) for _ in range(2)]
    out = grpo_loss(
        leaves["hidden"], leaves["weight"], case.targets, case.advantages, cu_seqlens=case.cu_seqlens, plan=plan,
        config=LossConfig(entropy_coef=0.1), normalizer=counts[0], entropy_normalizer=counts[1],
    )  # fmt: skip
    out.loss.backward()
    assert leaves["weight"].grad.abs().sum() > 0
    assert [count.grad for count in counts] == [None, None]


@pytest.mark.parametrize("plan", ["single_pass", "resident", "recompute", "lean"])
def test_a_rollout_in_inference_mode(plan: str) -> None:
    """What it hands over is not autograd's to save; every plan takes it."""
    case = make_case(7)
    leaves = case.leaves()
    with torch.inference_mode():
        given = {name: getattr(case, name).clone() for name in ("cu_seqlens", "loss_mask")}
        targets, advantages = case.targets.clone(), case.advantages.clone()
        temperature = torch.ones(targets.shape)
        old = token_logprobs(case.hidden, case.weight, targets, temperature=temperature).logprobs
    out = grpo_loss(
        leaves["hidden"], leaves["weight"], targets, advantages, old_logprobs=old, temperature=temperature, plan=plan,
        **given,
    )  # fmt: skip
    out.loss.backward()
    assert leaves["weight"].grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_entropies_are_floating_point(dtype: torch.dtype) -> None:
    case = make_case(7)
    with pytest.raises(ValueError, match="entropy: expected a floating-point dtype; got"):
        policy_loss(case.logprobs, case.advantages, cu_seqlens=case.cu_seqlens, entropy=case.entropy.to(dtype))
    with pytest.raises(ValueError, match=r"logprobs: expected a floating-point tensor .*; got \[86\] torch"):
        policy_loss(case.logprobs.to(dtype), case.advantages, cu_seqlens=case.cu_seqlens)


def test_quantile_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """B12: the entropies of the group's ranks are gathered, not the world's."""
    group, asked = object(), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda g=None: asked.append(g) or (2 if g is group else 8))

    def all_gather(into: list[Tensor], values: Tensor, group: Any = None) -> None:
        asked.append(group)
        into[0].copy_(values)
        into[1].copy_(values if values.dtype == torch.int64 else values + 100)  # another rank, of higher entropies

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    case = make_case(8, dtype=torch.float64)
    given = {"cu_seqlens": case.cu_seqlens, "entropy": case.entropy, "loss_mask": case.loss_mask}
    config = LossConfig(top_entropy_quantile=0.5, entropy_coef=0.1, loss_type="reinforce")
    out = policy_loss(case.logprobs, case.advantages, config=config, quantile_group=group, **given)
    assert asked
    assert all(g is group for g in asked)
    assert out.loss == 0  # the upper half is the other rank's
    hidden, weight = case.hidden, case.weight
    full = grpo_loss(
        hidden, weight, case.targets, case.advantages, config=config, quantile_group=group, cu_seqlens=case.cu_seqlens
    )
    assert full.loss == 0
