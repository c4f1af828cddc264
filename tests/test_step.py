"""The gradient of an optimiser step is exact, however it is cut into packs."""

from __future__ import annotations

import pytest
import torch

from grpo_fast.backends.base import get_backend
from grpo_fast.head import hidden_states
from grpo_fast.loss import LossConfig, grpo_loss, policy_loss
from grpo_fast.objectives import high_entropy_mask
from grpo_fast.packing import Support
from grpo_fast.trainer.batch import Experience, bounds
from grpo_fast.trainer.errors import ConfigError
from grpo_fast.trainer.loop import make_updater
from grpo_fast.trainer.step import Updater
from tests import tiny
from tests.stand_in import stand_in
from tests.tiny import configured

PROMPTS, COMPLETIONS = (3, 6), (5, 1, 4, 7, 2, 6, 6, 3)  # four a prompt


def experience(seed: int = 0) -> Experience:
    generator = torch.Generator().manual_seed(seed)
    total = sum(COMPLETIONS)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(3, tiny.VOCAB_SIZE, (count,), generator=generator)

    advantages = torch.randn(8, generator=generator)
    advantages[[1, 4]] = 0.0
    return Experience(
        num_generations=4,
        prompts=tokens(sum(PROMPTS)),
        prompt_bounds=bounds(PROMPTS),
        tokens=tokens(total),
        token_bounds=bounds(COMPLETIONS),
        sampling_logprobs=-torch.rand(total, generator=generator),
        advantages=advantages,
        in_loss=torch.tensor([True, True, True, False, True, True, True, True]),
        old_logprobs=-4 - torch.rand(total, generator=generator),
        ref_logprobs=-4 - torch.rand(total, generator=generator),
    )


def expected_gradients(model, data: Experience, loss: LossConfig) -> list[torch.Tensor]:
    """By autograd, from full logits of one plain forward a completion; -inf outside of the supports."""
    logprobs, entropies = [], []
    for number in range(8):
        span, prompt = data.span(number), data.prompt(number)
        own = data.tokens[span.start : span.stop]
        states = hidden_states(model, input_ids=torch.cat([prompt, own])[None])[0, prompt.numel() - 1 : -1]
        scores = states @ model.lm_head.weight.T / loss.temperature
        if data.support is not None:
            scores = scores.masked_fill(~_kept_words(data.support[span.start : span.stop]), -torch.inf)
        scores = scores.log_softmax(-1)
        logprobs.append(scores.gather(1, own[:, None])[:, 0])
        entropies.append(-(scores.exp() * scores.masked_fill(scores == -torch.inf, 0)).sum(-1))
    out = policy_loss(
        torch.cat(logprobs),
        data.advantages,
        entropy=torch.cat(entropies),
        cu_seqlens=data.token_bounds,
        loss_mask=data.token_mask(),
        old_logprobs=data.old_logprobs,
        ref_logprobs=data.ref_logprobs,
        sampling_logprobs=data.sampling_logprobs,
        config=loss,
    )
    return list(torch.autograd.grad(out.loss, list(model.parameters())))


def _kept_words(support: Support) -> torch.Tensor:
    """`[T, V]` bool."""
    kept = torch.zeros(support.num_rows, tiny.VOCAB_SIZE, dtype=torch.bool)
    kept[support.rows_of_ids(), support.token_ids.long()] = True
    kept[support.sizes == 0] = True
    return kept


def mixed_support(data: Experience) -> Support:
    """Rows of one word, of a few, of many, and whole ones."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(data.tokens.numel(), tiny.VOCAB_SIZE, generator=generator)
    scores.scatter_(1, data.tokens[:, None], 2)  # first
    sizes = torch.tensor([1, 2, 5, 8, 9, 40, tiny.VOCAB_SIZE])[torch.arange(data.tokens.numel()) % 7]
    return Support.from_mask(scores.argsort(1, descending=True).argsort(1) < sizes[:, None])


@pytest.fixture
def sparse_to_eight(monkeypatch):
    """Supports of up to eight words are sparse rows."""
    for backend in ("torch", "cpu"):
        monkeypatch.setattr(type(get_backend(backend)), "sparse_share", lambda *arguments: tiny.VOCAB_SIZE // 8)


@pytest.fixture(scope="module")
def updaters(tmp_path_factory):
    """One updater a set of options (loading a model takes longer than a step)."""
    folder = tmp_path_factory.mktemp("updaters")

    def make(**changes) -> Updater:
        return make_updater(configured(folder, max_grad_norm=0, **changes))

    return make


@pytest.mark.parametrize("max_tokens", [8, 20, 1000])
@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo", "max_completion_length": 9},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"loss_type": "grpo", "beta": 0.3, "epsilon_high": 0.4},
        {"loss_type": "dapo", "entropy_coef": 0.2},
        {"loss_type": "dapo", "importance_sampling_mode": "sequence_mask"},
        {"loss_type": "cispo", "epsilon_high": 1.25, "temperature": 0.7},
        {"loss_type": "gmpo"},
    ],
    ids=lambda loss: "-".join(map(str, loss.values())),
)
def test_gradients_do_not_depend_on_the_packs(updaters, loss, max_tokens):
    """Sums over packs, without masked and zero-advantage completions, equal the gradient of the whole batch."""
    rollout = {"rollout__temperature": loss["temperature"]} if "temperature" in loss else {}
    updater = updaters(loss=loss, max_tokens_per_microbatch=max_tokens, **rollout)
    data = experience()
    if updater._config.loss.beta == 0:
        data.ref_logprobs = None
    metrics = updater.gradients(data, range(8))
    assert (metrics["num_microbatches"] == 1) == (max_tokens == 1000)
    # What a mean over sequences counts: TRL counts masked ones too.
    expected = expected_gradients(updater.policy.model, data, updater._config.loss)
    ours = updater.weights.gradients()
    assert len(ours) == len(expected)
    for name, mine, theirs in zip(updater.weights.names, ours, expected, strict=True):
        assert float((mine - theirs).norm()) <= 2e-5 * float(theirs.norm()) + 1e-9, name


@pytest.mark.parametrize("max_tokens", [8, 20, 1000])
@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "dapo", "beta": 0.3},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "temperature": 0.7},
        {"loss_type": "dapo", "entropy_coef": 0.2},
    ],
    ids=lambda loss: "-".join(map(str, loss.values())),
)
def test_gradients_are_those_on_the_supports(updaters, sparse_to_eight, loss, max_tokens):
    """However rows of all kinds fall into packs."""
    rollout = {"rollout__temperature": loss["temperature"]} if "temperature" in loss else {}
    updater = updaters(loss=loss, max_tokens_per_microbatch=max_tokens, **rollout)
    data = experience()
    data.support = mixed_support(data)
    if updater._config.loss.beta == 0:
        data.ref_logprobs = None
    metrics = updater.gradients(data, range(8))
    assert metrics["bad_rows"] == 0
    for name, mine, theirs in zip(
        updater.weights.names,
        updater.weights.gradients(),
        expected_gradients(updater.policy.model, data, updater._config.loss),
        strict=True,
    ):
        assert float((mine - theirs).norm()) <= 2e-5 * float(theirs.norm()) + 1e-9, name


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_the_first_of_several_steps_has_ratio_one_on_supports(updaters, sparse_to_eight, lora):
    """And no KL, to the last bit: old, reference and current policy are on the same supports, in rows of all kinds."""
    updater = updaters(num_iterations=2, max_tokens_per_microbatch=20, loss__beta=0.3, model__lora=lora)
    data = experience()
    data.old_logprobs = data.ref_logprobs = None
    data.support = mixed_support(data)
    updater.prepare(data, [range(8)])
    scored = data.old_logprobs.isfinite()
    assert scored.any()
    assert (data.old_logprobs[scored & (data.support.sizes == 1)] == 0).all()
    metrics = updater.gradients(data, range(8))
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1
    assert metrics["kl"] == 0
    data.support = None  # with what was scored on it
    metrics = updater.gradients(data, range(8))
    assert metrics["ratio/min"] < 0.9
    assert metrics["kl"] != 0


def test_what_a_step_says_of_supports(updaters, sparse_to_eight):
    updater = updaters(max_tokens_per_microbatch=20)
    data = experience()
    data.old_logprobs = data.ref_logprobs = None
    dense = updater.gradients(data, range(4, 8))
    assert not any(name.startswith("support/") for name in dense)
    data.support = mixed_support(data)
    metrics = updater.gradients(data, range(4, 8))
    sizes = [(1, 2, 5, 8, 9, 40, tiny.VOCAB_SIZE)[n % 7] for n in range(sum(COMPLETIONS))]
    mine = sizes[sum(COMPLETIONS[:4]) :]  # those of zero advantage included
    assert metrics["support/mean"] == pytest.approx(sum(mine) / len(mine))
    assert metrics["support/median"] == sorted(mine)[(len(mine) - 1) // 2]
    assert metrics["support/max"] == max(mine) == tiny.VOCAB_SIZE
    assert metrics["support/singleton_fraction"] == pytest.approx(mine.count(1) / len(mine))
    assert metrics["support/sparse_fraction"] == pytest.approx(sum(1 < n <= 8 for n in mine) / len(mine))
    ids = sum(n for n in sizes if n < tiny.VOCAB_SIZE)
    assert metrics["support/host_mib"] * 2**20 == 4 * ids + 8 * (len(sizes) + 1)
    computed = sizes[sum(COMPLETIONS[:5]) :]  # whose gradient is not zero
    spared = sum(tiny.VOCAB_SIZE - (n if 1 < n <= 8 else 0) for n in computed if n <= 8)
    assert metrics["update_flops"] == dense["update_flops"] - 6 * 32 * spared
    data.advantages[:] = 0  # the sampler's numbers, even where no row is computed
    idle = updater.gradients(data, range(4, 8))
    assert idle["support/mean"] == metrics["support/mean"]
    assert idle["update_flops"] == 0


def test_a_plan_that_cannot_serve_supports_says_so_at_once(updaters):
    updaters(plan="resident", rollout__top_p=0.9, loss__support="off")
    with pytest.raises(ConfigError, match="resident"):
        updaters(plan="resident", rollout__top_p=0.9)


def test_zero_advantages_never_reach_the_model(updaters, monkeypatch):
    seen: list[int] = []
    forward = hidden_states

    def spy(model, **inputs):
        seen.append(inputs["input_ids"].numel())
        return forward(model, **inputs)

    updater, everything = updaters(), updaters(loss__all_token_metrics=True)
    monkeypatch.setattr("grpo_fast.trainer.batch.hidden_states", spy)
    data = experience()
    data.ref_logprobs = None
    data.advantages[:4] = 0
    metrics = updater.gradients(data, range(8))
    live = [number for number in range(8) if data.advantages[number] != 0]
    assert seen == [PROMPTS[1] + sum(COMPLETIONS[number] - 1 for number in live)]
    active = sum(COMPLETIONS[number] for number in live) / (sum(COMPLETIONS) - COMPLETIONS[3])
    assert metrics["active_row_fraction"] == pytest.approx(active)
    wanted = [gradient.clone() for gradient in updater.weights.gradients()]
    seen.clear()
    full = everything.gradients(data, range(8))
    assert seen == [sum(PROMPTS) + sum(n - 1 for n in COMPLETIONS) - (COMPLETIONS[3] - 1)]
    assert full["active_row_fraction"] == 1
    for mine, theirs in zip(everything.weights.gradients(), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-8)
    data.advantages[:] = 0
    seen.clear()
    assert updater.gradients(data, range(8))["grad_norm"] == 0
    assert seen == []


def test_gradient_checkpointing_changes_nothing(updaters):
    data = experience()
    data.ref_logprobs = None
    plain, checkpointed = updaters(), updaters(model__gradient_checkpointing=True)
    plain.gradients(data, range(8))
    checkpointed.gradients(data, range(8))
    for mine, theirs in zip(checkpointed.weights.gradients(), plain.weights.gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


def test_bfloat16_gradients_are_summed_in_float32(updaters):
    data = experience()
    data.ref_logprobs = None
    exact, rounded = updaters(), updaters(model__dtype="bfloat16", max_tokens_per_microbatch=8)
    exact.gradients(data, range(8))
    rounded.gradients(data, range(8))
    for mine, theirs in zip(rounded.weights.gradients(), exact.weights.gradients(), strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm()) < 0.05 * float(theirs.norm()) + 1e-6
    assert all(parameter.grad is None for parameter in rounded.policy.model.parameters())


def test_options_of_the_loss_that_cannot_run(updaters):
    with pytest.raises(ConfigError, match="backend: expected auto"):
        updaters(backend="fpga")
    with pytest.raises(ConfigError, match="plan"):
        updaters(plan="frozen_hat")


def test_every_pack_has_the_runs_loss_config(updaters, monkeypatch):
    """A backend keeps what it makes of a config: one a pack, as a coefficient by the pack's share is, adds up."""
    seen: list[LossConfig] = []

    def spy(*arguments, config, **options):
        seen.append(config)
        return grpo_loss(*arguments, config=config, **options)

    updater = updaters(loss={"loss_type": "dapo", "entropy_coef": 0.2}, max_tokens_per_microbatch=8)
    monkeypatch.setattr("grpo_fast.trainer.step.grpo_loss", spy)
    data = experience()
    data.ref_logprobs = None
    assert updater.gradients(data, range(8))["num_microbatches"] == len(seen) > 1
    assert all(config is updater._config.loss for config in seen)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", [{"loss_type": "dapo"}, {"loss_type": "cispo", "epsilon_high": 0.9}])
def test_shares_are_of_the_whole_step(updaters, loss, level):
    """Of clipped tokens or sequences: those left out for their zero advantage count as not clipped."""
    loss = loss | {"importance_sampling_level": level}
    data = experience()
    data.ref_logprobs = None
    found = updaters(loss=loss).gradients(data, range(8))
    everything = updaters(loss=loss | {"all_token_metrics": True}).gradients(data, range(8))
    shares = [name for name in everything if "clip_ratio" in name and not name.endswith("_min")]
    assert any(everything[name] for name in shares)
    assert [found[name] for name in shares] == pytest.approx([everything[name] for name in shares])


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_metrics_do_not_depend_on_the_packs(updaters, beta):
    loss = {"loss_type": "dapo", "entropy_coef": 0.2, "beta": beta}
    data = experience()
    data.ref_logprobs = data.ref_logprobs if beta else None
    expected = updaters(loss=loss, max_tokens_per_microbatch=1000).gradients(data, range(8))
    found = updaters(loss=loss, max_tokens_per_microbatch=8).gradients(data, range(8))
    assert found.pop("num_microbatches") > expected.pop("num_microbatches") == 1
    for name in found.keys() - {"padding_fraction", "update_flops"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("quantile", [1.0, 0.5, 0.3, 0.0])
def test_the_bonus_is_a_mean_over_the_tokens_it_acts_on(updaters, monkeypatch, quantile):
    seen: list[float] = []
    sizes: list[int] = []

    def spy(states, *arguments, entropy_normalizer, **options):
        seen.append(entropy_normalizer)
        sizes.append(states.shape[0])
        return grpo_loss(states, *arguments, entropy_normalizer=entropy_normalizer, **options)

    loss = {"loss_type": "dapo", "entropy_coef": 0.2, "top_entropy_quantile": quantile}
    updater = updaters(loss=loss, max_tokens_per_microbatch=20)
    monkeypatch.setattr("grpo_fast.trainer.step.grpo_loss", spy)
    data = experience()
    data.ref_logprobs = None
    updater.gradients(data, range(8))
    assert len(sizes) > 1
    kept = [high_entropy_mask(torch.rand(size), torch.ones(size, dtype=torch.bool), quantile) for size in sizes]
    assert seen == [float(sum(int(mask.sum()) for mask in kept))] * len(sizes)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_of_several_steps_has_ratio_one(updaters, temperature):
    """Scored at the loss's own temperature, in the same packs, to the last bit."""
    updater = updaters(rollout__temperature=temperature, num_iterations=2, max_tokens_per_microbatch=20)
    assert updater._config.loss.temperature == temperature
    data = experience()
    data.old_logprobs = data.ref_logprobs = None
    updater.prepare(data, [range(4), range(4, 8)])
    scored = data.old_logprobs.isfinite()
    assert scored.any()
    assert not scored.all()  # what no step will ask for
    for completions in (range(4), range(4, 8)):
        metrics = updater.gradients(data, completions)
        assert metrics["ratio/min"] == metrics["ratio/max"] == 1


@pytest.mark.parametrize("loss", [{"loss_type": "dapo", "entropy_coef": 0.2}, {"loss_type": "grpo", "beta": 0.3}])
def test_a_packs_step_never_makes_a_gpu_wait(updaters, monkeypatch, loss):
    """On the stand-in GPU, in bfloat16 with float32 buffers: forward, loss and backward of every pack."""
    updater = updaters(loss=loss, model__dtype="bfloat16", backend="torch", max_tokens_per_microbatch=20)
    data = experience()
    data.ref_logprobs = data.ref_logprobs if "beta" in loss else None
    expected = updater.gradients(data, range(8))
    wanted = [gradient.clone() for gradient in updater.weights.gradients()]
    normalizer = updater._normalizer(data, range(8))  # counted in the experience, on a CPU
    monkeypatch.setattr(updater, "_normalizer", lambda *arguments: normalizer)
    packs = updater._packs(data, range(8))
    assert len(packs) > 1
    updater.weights.start_step()
    with updater.policy.packing(), stand_in() as gpu:
        parts = [updater._backward(data, pack, packs, range(8)) for pack in packs]
    assert not gpu.waits
    assert updater._merge(data, range(8), parts)["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    for mine, theirs in zip(updater.weights.gradients(), wanted, strict=True):
        # bfloat16's own error is the limit: a GPU keeps the gradient of the logits in it.
        assert float((mine - theirs).norm()) <= 3e-2 * float(theirs.norm()) + 1e-6
