"""Adapters for frameworks that hand over log-probabilities: their call shapes, against the formulas written out.

verl's own fused head is compared where verl is installed (one file of it, which needs torch only). What each adapter
was run with beyond that stands in the README's table.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.integrations import nemo_rl, openrlhf, prime_rl, slime, torchtitan, verl
from grpo_fast.integrations.versions import release, require

B, L = 4, 7


@dataclass
class Batch:
    logprobs: Tensor
    old: Tensor
    sampling: Tensor
    ref: Tensor
    advantages: Tensor
    mask: Tensor


@pytest.fixture
def batch() -> Batch:
    """[B, L] float64, ratios that clip on both sides, one sequence without tokens."""
    gen = torch.Generator().manual_seed(0)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(B, L, generator=gen, dtype=torch.float64)

    old = -2 * torch.rand(B, L, generator=gen, dtype=torch.float64)
    advantages = torch.randn(B, 1, generator=gen, dtype=torch.float64).expand(B, L).contiguous()
    mask = torch.rand(B, L, generator=gen) > 0.3
    mask[2] = False
    logprobs = (old + noise(0.3)).requires_grad_()
    return Batch(logprobs, old, old + noise(0.2), old + noise(0.2), advantages, mask)


def clipped(b: Batch, low: float = 0.2, high: float = 0.2, *, old: Tensor | None = None) -> Tensor:
    """The clipped term, by its formula."""
    ratio = (b.logprobs - (b.old if old is None else old)).exp()
    return -torch.min(ratio * b.advantages, ratio.clamp(1 - low, 1 + high) * b.advantages) * b.mask


def agree(actual: Tensor, expected: Tensor, b: Batch) -> None:
    """Values and gradients in the log-probabilities."""
    assert expected.item() != 0
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)
    (mine,) = torch.autograd.grad(actual, b.logprobs)
    (other,) = torch.autograd.grad(expected, b.logprobs)
    assert other.any()
    torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


# -- prime-rl ---------------------------------------------------------------------------------------------------------


@dataclass
class LossInputs:
    """As prime-rl documents it."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    teacher_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def test_prime_rl(batch: Batch) -> None:
    rows = [
        prime_rl.loss(LossInputs(p, o, None, a, m), loss_type="dapo", epsilon_high=0.28)
        for p, o, a, m in zip(batch.logprobs, batch.old, batch.advantages, batch.mask, strict=True)
    ]
    assert all(isinstance(row, LossOutputs) for row in rows)
    agree(torch.stack([row.loss for row in rows]).sum(), clipped(batch, high=0.28).sum(), batch)
    assert set(rows[0].metrics) == {"ratio", "mismatch_kl"}
    inputs = LossInputs(batch.logprobs[0], batch.old[0], None, batch.advantages[0], batch.mask[0])
    with pytest.raises(ValueError, match="loss_type"):
        prime_rl.loss(inputs, loss_type="grpo")


# -- NeMo-RL ----------------------------------------------------------------------------------------------------------


def nemo_data(b: Batch) -> dict[str, Tensor]:
    """`[B, S]` with the first position unused, as NeMo-RL pads it."""
    wide = {"prev_logprobs": b.old, "generation_logprobs": b.sampling, "reference_policy_logprobs": b.ref}
    wide |= {"advantages": b.advantages, "token_mask": b.mask.long()}
    data = {name: torch.cat([torch.full((B, 1), 9, dtype=x.dtype), x], dim=1) for name, x in wide.items()}
    return data | {"sample_mask": torch.tensor([1, 1, 1, 0])}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_nemo_rl(batch: Batch, loss_type: str) -> None:
    loss = nemo_rl.GRPOFastLoss(LossConfig(loss_type=loss_type, beta=0.1, use_bias_correction_kl=False))
    actual, metrics = loss(
        next_token_logprobs=batch.logprobs,
        data=nemo_data(batch),
        global_valid_seqs=torch.tensor(6.0),
        global_valid_toks=torch.tensor(41.0),
    )
    batch.mask[3] = False  # its sample is masked
    drift = batch.ref - batch.logprobs
    terms = clipped(batch) + 0.1 * (drift.exp() - drift - 1) * batch.mask
    means = terms.sum(1) / batch.mask.sum(1).clamp(min=1)
    agree(actual, terms.sum() / 41 if loss_type == "dapo" else means.sum() / 6, batch)
    assert metrics["num_valid_samples"] == 3
    assert loss.token_level == (loss_type == "dapo")
    with pytest.raises(ValueError, match="dr_grpo"):
        nemo_rl.GRPOFastLoss(LossConfig(loss_type="dr_grpo", max_completion_length=8))


# -- torchtitan -------------------------------------------------------------------------------------------------------


def test_torchtitan(batch: Batch) -> None:
    config = LossConfig(loss_type="dapo", epsilon_high=0.28)
    batch.old[0, 3] = -torch.inf  # the generator did not say
    batch.mask[0, 3] = True
    data = {"generator_logprobs": batch.old, "advantages": batch.advantages, "loss_mask": batch.mask}
    loss, metrics = torchtitan.token_loss(config, batch.logprobs, torch.ones(B, L), 30.0, **data)
    known = batch.old.isfinite()
    batch.old[0, 3], batch.mask[0, 3] = -1.0, False
    agree(loss, clipped(batch, high=0.28).sum() / 30, batch)
    assert metrics["trainer/entropy/mean"].item() == pytest.approx((batch.mask & known).sum().item() / 30)
    for refused in (LossConfig(loss_type="vespo"), LossConfig(beta=0.1), LossConfig(entropy_coef=0.1)):
        with pytest.raises(ValueError, match="objective"):
            torchtitan.check_objective(refused)
    torchtitan.check_objective(config)


# -- slime ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
def test_slime(batch: Batch, monkeypatch: pytest.MonkeyPatch, estimator: str) -> None:
    lengths = [3, 7, 2]  # responses of different lengths, as lists

    def listed(x: Tensor) -> list[Tensor]:
        return [row[:n] for row, n in zip(x, lengths, strict=False)]

    entropy = batch.logprobs.detach().abs()
    fake = ModuleType("slime.backends.megatron_utils.loss")
    fake.get_log_probs_and_entropy = lambda logits, **kw: {  # type: ignore[attr-defined]
        "log_probs": listed(batch.logprobs),
        "entropy": listed(entropy),
    }
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    masks = [row.float() for row in listed(batch.mask)]
    masks[2][:] = 1.0

    def sum_of_sample_mean(flat: Tensor) -> Tensor:
        parts = zip(flat.split(lengths), masks, strict=True)
        return torch.stack([(x * m).sum() / m.sum().clamp(min=1) for x, m in parts]).sum()

    data: dict[str, Any] = {
        "advantages": listed(batch.advantages),
        "log_probs": listed(batch.old),
        "ref_log_probs": listed(batch.ref),
        "loss_masks": masks,
        "unconcat_tokens": None,
        "total_lengths": None,
        "response_lengths": lengths,
    }
    args = SimpleNamespace(
        eps_clip=0.2,
        eps_clip_high=0.28,
        advantage_estimator=estimator,
        use_kl_loss=estimator == "grpo",
        kl_loss_coef=0.1,
        entropy_coef=0.01,
    )
    loss, metrics = slime.policy_loss(args, data, torch.zeros(1), sum_of_sample_mean)
    expected = torch.zeros((), dtype=torch.float64)
    for row, n in enumerate(lengths):
        p, o, a, m = batch.logprobs[row, :n], batch.old[row, :n], batch.advantages[row, :n], masks[row]
        drift = p - o
        log_w = drift if estimator == "grpo" else ((drift * m).sum() / m.sum()).expand(n)
        terms = -torch.min(log_w.exp() * a, log_w.exp().clamp(0.8, 1.28) * a)
        if estimator == "grpo":
            gap = batch.ref[row, :n] - p
            terms = terms + 0.1 * (gap.exp() - gap - 1)
        expected = expected + ((terms - 0.01 * entropy[row, :n]) * m).sum() / m.sum()
    agree(loss, expected, batch)
    assert not any(value.requires_grad for value in metrics.values())
    if estimator == "gspo":
        args.context_parallel_size = 2
        with pytest.raises(ValueError, match="context_parallel_size"):
            slime.policy_loss(args, data, torch.zeros(1), sum_of_sample_mean)


# -- OpenRLHF ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": 9.0}])
@pytest.mark.parametrize("token_level", [True, False])
def test_openrlhf(batch: Batch, token_level: bool, counts: dict[str, Any]) -> None:
    loss = openrlhf.PolicyLoss(0.2, 0.28, token_level_loss=token_level)
    actual, clip_ratio, kl, *rest = loss(
        batch.logprobs, batch.old, batch.advantages, action_mask=batch.mask, rollout_log_probs=None, **counts
    )
    terms, lengths = clipped(batch, high=0.28), batch.mask.sum(1)
    if token_level:
        expected = terms.sum() / lengths.sum() if not counts else terms.sum() / 50 * 2
    else:
        total = (terms.sum(1) / lengths.clamp(min=1)).sum()
        expected = total / 3 if not counts else total / 9 * 2
    agree(actual, expected, batch)
    assert rest == [None, None]
    assert 0 < clip_ratio < 1
    assert kl.item() == pytest.approx(((batch.old - batch.logprobs) * batch.mask).sum().item() / lengths.sum().item())


def test_openrlhf_correction(batch: Batch) -> None:
    loss = openrlhf.PolicyLoss(is_correction_level="token", is_correction_threshold=[0.8, 1.25])
    actual, _, _, vllm_kl, filtered = loss(
        batch.logprobs, batch.old, batch.advantages, batch.mask, rollout_log_probs=batch.sampling
    )
    weight = (batch.old - batch.sampling).exp()
    kept = (weight >= 0.8) & (weight <= 1.25)
    agree(actual, (clipped(batch) * weight * kept).sum() / batch.mask.sum(), batch)
    assert filtered.item() == pytest.approx((~kept & batch.mask).sum().item() / batch.mask.sum().item())
    assert vllm_kl is not None
    with pytest.raises(ValueError, match="is_correction_level"):
        openrlhf.PolicyLoss(is_correction_level="seq")
    with pytest.raises(ValueError, match="policy_loss_type"):
        openrlhf.PolicyLoss(policy_loss_type="reinforce")


# -- verl -------------------------------------------------------------------------------------------------------------


def test_verl_policy_loss(batch: Batch) -> None:
    seen: dict[str, Any] = {}

    def aggregate(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, **info: Any) -> Tensor:
        seen.update(info, mode=loss_agg_mode)
        return (loss_mat * loss_mask).sum() / info["batch_num_tokens"]

    actor = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, clip_ratio_c=3.0)
    actor.tau_pos, actor.tau_neg, actor.global_batch_info = 1.0, 1.05, {"batch_num_tokens": 50}
    weights = torch.rand(B, L, dtype=torch.float64)
    loss, metrics = verl.policy_loss_of("grpo", aggregate)(
        old_log_prob=batch.old,
        log_prob=batch.logprobs,
        advantages=batch.advantages,
        response_mask=batch.mask,
        loss_agg_mode="token-mean",
        config=actor,
        rollout_is_weights=weights,
    )
    agree(loss, (clipped(batch, high=0.28) * weights).sum() / 50, batch)
    assert seen == {"batch_num_tokens": 50, "mode": "token-mean"}
    assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl"}
    assert all(isinstance(value, float) for value in metrics.values())


def test_verl_cispo_without_a_bound_of_its_own(batch: Batch) -> None:
    """verl's bound is 1 + clip_ratio where there is no clip_ratio_high; the clipped are those above it."""
    actor = SimpleNamespace(clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=3.0)
    actor.tau_pos, actor.tau_neg, actor.global_batch_info = 1.0, 1.05, {}
    assert verl.loss_config("cispo", actor).epsilon_high == 1.1
    batch.advantages[0] = 0.5
    loss, metrics = verl.policy_loss_of("cispo", lambda loss_mat, **info: loss_mat.sum())(
        old_log_prob=batch.old,
        log_prob=batch.logprobs,
        advantages=batch.advantages,
        response_mask=batch.mask,
        config=actor,
    )
    ratio = (batch.logprobs - batch.old).exp().detach()
    agree(loss, (-(ratio.clamp(max=1.1) * batch.advantages * batch.logprobs) * batch.mask).sum(), batch)
    clipped_tokens = (ratio > 1.1) & (batch.advantages > 0) & batch.mask
    assert 0 < clipped_tokens.sum() < batch.mask.sum()
    share = clipped_tokens.sum().item() / batch.mask.sum().item()
    assert metrics["actor/pg_clipfrac"] == pytest.approx(share)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_verl_fused_head(temperature: float) -> None:
    """verl's own torch path, to 1e-5 in float32: log-probabilities, entropies and gradients."""
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs verl (pip install --no-deps verl)")
    path = Path(next(iter(spec.submodule_search_locations))) / "utils/experimental/torch_functional.py"
    theirs = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location("verl_head", path))
    found.loader.exec_module(theirs)
    gen = torch.Generator().manual_seed(0)
    shapes = {"hidden": (2, 9, 16), "weight": (50, 16), "g": (2, 9), "e": (2, 9)}
    values = {name: torch.randn(shape, generator=gen) for name, shape in shapes.items()}
    targets = torch.randint(0, 50, (2, 9), generator=gen)
    results = []
    for module in (theirs, verl):
        hidden, weight = (values[name].clone().requires_grad_() for name in ("hidden", "weight"))
        head = module.FusedLinearForPPO(impl_backend="torch")
        logprobs, entropy = head(hidden, weight, targets, temperature)
        # verl's class marks its inputs' leaves: gradients are taken from the results alone
        ((values["g"] * logprobs).sum() + (values["e"] * entropy).sum()).backward()
        results.append((logprobs.detach(), entropy.detach(), hidden.grad, weight.grad))
    for mine, other in zip(results[1], results[0], strict=True):
        assert ((mine - other).norm() / other.norm()).item() < 1e-5


def test_verl_supports() -> None:
    """verl's layout, padding removed and labels rolled: responses are scored on their supports, prompts not at all."""
    gen = torch.Generator().manual_seed(0)
    prompt, response, vocab = 3, 4, 50
    input_ids = torch.randint(0, vocab, (2, prompt + response), generator=gen)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])  # prompts end, and responses begin, at 3
    kept = [[{int(input_ids[b, prompt + r]), 1, 7 + r, 30 + b} for r in range(response)] for b in range(2)]
    kept[0][2] = set()  # drawn from the whole vocabulary
    ids = torch.full((2, response, 5), -1, dtype=torch.int32)
    for b in range(2):
        for r in range(response):
            ids[b, r, : len(kept[b][r])] = torch.tensor(sorted(kept[b][r]), dtype=torch.int32)
    tokens = input_ids[mask.bool()]
    hidden, weight = (torch.randn(n, 16, generator=gen).requires_grad_() for n in (len(tokens), vocab))
    head, labels = verl.FusedLinearForPPO(), tokens.roll(-1).unsqueeze(0)
    with verl.on_support(verl.packed_support(ids, tokens, mask)):
        logprobs, entropy = head(hidden.unsqueeze(0), weight, labels, 0.7)
    places = mask.nonzero()[:, 1] - prompt
    owners = mask.nonzero()[:, 0]
    scores = (hidden.double() @ weight.double().t()) / 0.7
    expected = []
    for t in range(len(tokens)):
        b, r = int(owners[(t + 1) % len(tokens)]), int(places[(t + 1) % len(tokens)])
        if r < 0:
            expected.append(0 * scores[t, 0])
            assert entropy[0, t] == logprobs[0, t] == 0
            continue
        allowed = torch.tensor(sorted(kept[b][r]) or list(range(vocab)))
        expected.append(scores[t, tokens[(t + 1) % len(tokens)]] - scores[t, allowed].logsumexp(0))
    wanted = torch.stack(expected)
    assert (wanted != 0).sum() == 6
    torch.testing.assert_close(logprobs[0].double(), wanted, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(logprobs.square().sum(), (hidden, weight))
    for got, want in zip(mine, torch.autograd.grad(wanted.square().sum(), (hidden, weight)), strict=True):
        assert ((got - want).norm() / want.norm()).item() < 1e-5
    whole = head(hidden.unsqueeze(0), weight, labels, 0.7)[0]
    assert (whole[0] < -0.1).all(), "without the block the head is over the whole vocabulary again"
    with verl.on_support(verl.packed_support(ids[..., :0], tokens, mask)):  # nothing was cut anywhere
        cut = head(hidden.unsqueeze(0), weight, labels, 0.7)[0][0]
    torch.testing.assert_close(cut, torch.where(logprobs[0] == 0, 0.0, whole[0]))
    with pytest.raises(ValueError, match=r"ids, tokens: expected \[B, R, K\]"):
        verl.packed_support(ids, tokens[1:], mask)
    moved = verl.packed_support(ids.roll(1, 0), tokens, mask)
    with verl.on_support(moved), pytest.raises(ValueError, match="support: expected the target"):
        head(hidden.unsqueeze(0), weight, labels, 0.7)


# -- versions ---------------------------------------------------------------------------------------------------------


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"no-such-package: .* not installed\. pip install 'no-such-package>=1,<2'"):
        require("no-such-package", at_least="1", below="2")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.12.3")
    with pytest.raises(ImportError, match=r"found 1\.12\.3"):
        require("trl", at_least="1.13", below="1.17")
    assert require("trl", at_least="1.12", below="1.13") == "1.12.3"
    assert release("1.16.0.dev1") == (1, 16, 0)
    with pytest.raises(ImportError, match="torchtitan: expected"):
        _ = torchtitan.GRPOFastLoss
