"""Sampling: what is recorded is what was sampled, with the probability it was sampled with."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from grpo_fast.packing import Support
from grpo_fast.trainer.attention import register
from grpo_fast.trainer.config import RolloutConfig
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.rollout import Completion, HFRollout, TopP, _inverse_cdf, _kept, _Sampler
from tests import tiny

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14], [9, 8, 7, 6]]


def policy(kind: str = "llama", **changes) -> Policy:
    register()
    words = tiny.tokenizer()
    return Policy(
        model=tiny.model(kind, scale=0.3, **changes),
        tokenizer=words,
        generation_config=None,
        eos_token_ids=[words.eos_token_id],
        device=torch.device("cpu"),
        attention="sdpa",
        is_lora=False,
    )


def logits_of(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """`[len(completion), V]` logits that predict the completion's tokens."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()


@pytest.mark.parametrize("generations", [1, 3])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_logprobs_are_those_of_a_plain_forward(kind, generations):
    """Through left padding, the shared prefill, sliding windows shorter than the prompt, and the decode attention."""
    sampled_from = policy(kind)
    engine = HFRollout(sampled_from, RolloutConfig(max_completion_length=7))
    completions = engine.generate(PROMPTS, generations, seed=3)
    assert len(completions) == len(PROMPTS) * generations
    for number, completion in enumerate(completions):
        prompt = PROMPTS[number // generations]
        expected = logits_of(sampled_from.model, prompt, completion.token_ids).log_softmax(-1)
        expected = expected.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-4)
        assert len(completion.logprobs) == len(completion.token_ids)


def test_completions_end_with_their_end_of_text_token():
    sampled_from = policy(seed=1)
    with torch.no_grad():  # end-of-text becomes likely
        sampled_from.model.lm_head.weight[1] *= 0
        sampled_from.model.lm_head.weight[1] += 0.05
    completions = HFRollout(sampled_from, RolloutConfig(max_completion_length=8)).generate(PROMPTS, 16, seed=0)
    ended = [completion for completion in completions if completion.finished]
    cut = [completion for completion in completions if not completion.finished]
    assert ended
    assert cut
    for completion in ended:
        assert completion.token_ids[-1] == 1
        assert 1 not in completion.token_ids[:-1]
    for completion in cut:
        assert len(completion.token_ids) == 8
        assert 1 not in completion.token_ids
    assert min(len(completion.token_ids) for completion in ended) < 8


def test_stop_strings_end_completions():
    sampled_from = policy()
    letters = list("abcdefghijklm")
    engine = HFRollout(sampled_from, RolloutConfig(max_completion_length=12, stop_strings=letters))
    stopped = 0
    for completion in engine.generate(PROMPTS, 8, seed=0):
        text = sampled_from.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert not any(letter in text[:-1] for letter in letters)
        if any(letter in text for letter in letters):
            assert completion.finished
            assert 0 not in completion.token_ids  # what generate pads with
            stopped += 1
    assert stopped > 4


def test_the_seed_decides_and_nothing_else():
    engine = HFRollout(policy(), RolloutConfig(max_completion_length=6))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = engine.generate(PROMPTS, 4, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert engine.generate(PROMPTS, 4, seed=7) == first
    assert engine.generate(PROMPTS, 4, seed=8) != first
    assert len({tuple(completion.token_ids) for completion in first[:4]}) > 1


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 9])
def test_batches_keep_prompts_and_completions_together(batch_size):
    """Greedy, so that the batch must not matter."""
    sampled_from = policy()
    whole = HFRollout(sampled_from, RolloutConfig(max_completion_length=5), temperature=0)
    parts = HFRollout(sampled_from, RolloutConfig(max_completion_length=5, batch_size=batch_size), temperature=0)
    expected = [completion.token_ids for completion in whole.generate(PROMPTS, 4, seed=0)]
    assert [completion.token_ids for completion in parts.generate(PROMPTS, 4, seed=0)] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


def test_temperature_zero_takes_the_likeliest():
    sampled_from = policy()
    for number, completion in enumerate(
        HFRollout(sampled_from, RolloutConfig(max_completion_length=4), temperature=0).generate(PROMPTS, 1, seed=0)
    ):
        best = logits_of(sampled_from.model, PROMPTS[number], completion.token_ids).argmax(-1)
        assert best.tolist() == completion.token_ids


@pytest.mark.parametrize(
    ("options", "warp"),
    [
        ({"temperature": 0.5}, lambda logits: logits / 0.5),
        ({"top_k": 3}, lambda logits: logits.masked_fill(logits < logits.topk(3).values[..., -1:], -torch.inf)),
        ({"temperature": 2.0, "top_k": 5}, lambda z: (z / 2).masked_fill(z < z.topk(5).values[..., -1:], -torch.inf)),
    ],
    ids=["temperature", "top_k", "both"],
)
def test_logprobs_are_after_the_warpers(options, warp):
    sampled_from = policy()
    engine = HFRollout(sampled_from, RolloutConfig(max_completion_length=5, **options))
    for number, completion in enumerate(engine.generate(PROMPTS, 2, seed=0)):
        warped = warp(logits_of(sampled_from.model, PROMPTS[number // 2], completion.token_ids)).log_softmax(-1)
        expected = warped.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"min_p": 0.5}, {"repetition_penalty": 1.5}])
def test_other_warpers_change_the_distribution(options):
    sampled_from = policy()
    plain = HFRollout(sampled_from, RolloutConfig(max_completion_length=5)).generate(PROMPTS, 4, seed=0)
    warped = HFRollout(sampled_from, RolloutConfig(max_completion_length=5, **options)).generate(PROMPTS, 4, seed=0)
    assert [c.logprobs for c in warped] != [c.logprobs for c in plain]
    if "repetition_penalty" not in options:  # fewer tokens share the probability
        mean = [sum(sum(c.logprobs) for c in cs) / sum(len(c.logprobs) for c in cs) for cs in (plain, warped)]
        assert mean[1] > mean[0]


def test_the_models_own_sampling_advice_does_not_leak_in():
    sampled_from = policy()
    expected = HFRollout(sampled_from, RolloutConfig(max_completion_length=5)).generate(PROMPTS, 4, seed=0)
    # `load_policy` neutralises the config; even one set later by hand changes no draw.
    sampled_from.model.generation_config.temperature = 0.1
    sampled_from.model.generation_config.top_k = 1
    assert HFRollout(sampled_from, RolloutConfig(max_completion_length=5)).generate(PROMPTS, 4, seed=0) == expected


def test_training_mode_and_cache_flag_are_put_back():
    sampled_from = policy()
    sampled_from.model.train()
    sampled_from.model.config.use_cache = False
    HFRollout(sampled_from, RolloutConfig(max_completion_length=2)).generate(PROMPTS, 2, seed=0)
    assert sampled_from.model.training
    assert sampled_from.model.config.use_cache is False


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.0, 0.5, 0.125, 0.0, 0.25, 0.125, 0.0])
    scores = probabilities.log().expand(40_000, -1)
    sampler = _Sampler(torch.Generator().manual_seed(0))
    drawn = sampler(torch.zeros(40_000, 1), scores).argmax(1)
    shares = torch.bincount(drawn, minlength=7) / 40_000
    assert shares[probabilities == 0].sum() == 0
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=0.01)  # four standard deviations
    torch.testing.assert_close(sampler.logprobs[:, 0], probabilities.log()[drawn])


def test_a_draw_on_the_edge_of_two_spans_has_a_probability():
    """The sums of spans round: what is sought must not fall below the second span, to a word that was cut."""
    probabilities = torch.zeros(1, 512)
    probabilities[0, 255], probabilities[0, 511] = (float.fromhex(x) for x in ("0x1.9adfa6p-2", "0x1.32902cp-1"))
    edge = torch.tensor([[float.fromhex("0x1.9adfa6p-2")]])
    assert _inverse_cdf(probabilities, edge).item() == 511


# -- supports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.99, 1 - 1e-7])
@pytest.mark.parametrize("few", [1, 4, 256])
def test_top_p_is_transformers(top_p, few, monkeypatch):
    """Rows of every sharpness, also after a top-k: the same words, but where rounding decides about one."""
    from transformers import TopPLogitsWarper

    monkeypatch.setattr("grpo_fast.trainer.rollout._FEW", few)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 1000, generator=generator) * torch.linspace(0.01, 12, 40)[:, None]
    scores[::5] = scores[::5].masked_fill(scores[::5] < scores[::5].topk(30).values[:, -1:], -torch.inf)
    scores[3] = 0.0  # all alike
    before = scores.clone()
    found, expected = TopP(top_p)(None, scores), TopPLogitsWarper(top_p)(None, scores)
    assert torch.equal(scores, before)
    kept = found > -torch.inf
    assert kept.any(1).all()
    assert torch.equal(found[kept], scores[kept])
    p = scores.double().softmax(1)
    for row in range(40):
        mass, size = p[row][kept[row]].sum(), kept[row].sum()
        assert kept[row].all() or p[row][kept[row]].min() >= p[row][~kept[row]].max()
        assert mass > top_p - 1e-6 or size == 1000
        assert mass - p[row][kept[row]].min() < top_p + 1e-6
        theirs = expected[row] > -torch.inf
        if row == 3:  # any of the words that are all alike
            assert abs(kept[row].sum() - theirs.sum()) <= 1
        else:  # rounding of a sum over the vocabulary
            assert p[row][kept[row] != theirs].sum() <= 2e-6 + p[row][kept[row]].min(), row


CUTS = [{"top_p": 0.6}, {"top_k": 5}, {"min_p": 0.3}, {"top_p": 0.8, "top_k": 20, "temperature": 0.7}]


def ending() -> Policy:
    """A policy whose completions end after different numbers of tokens: many words end them."""
    return dataclasses.replace(policy(), eos_token_ids=list(range(1, 20)))


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("options", CUTS, ids=lambda options: "-".join(options))
def test_supports_are_what_the_warpers_left(options, batch_size):
    """The likeliest words, as many as the option keeps; their renormalised probability is the recorded one."""
    sampled_from = ending()
    config = RolloutConfig(max_completion_length=8, batch_size=batch_size, **options)
    completions = HFRollout(sampled_from, config, supports=True).generate(PROMPTS, 8, seed=0)
    assert len({len(completion.token_ids) for completion in completions}) > 3
    for number, completion in enumerate(completions):
        support, ids = completion.support, torch.tensor(completion.token_ids)
        assert (support.num_rows, support.token_ids.dtype) == (len(ids), torch.int32)
        logits = logits_of(sampled_from.model, PROMPTS[number // 8], completion.token_ids) / config.temperature
        for row, (scores, token, logprob) in enumerate(zip(logits, ids, completion.logprobs, strict=True)):
            words = support[row : row + 1].token_ids.long()
            kept = torch.zeros(tiny.VOCAB_SIZE, dtype=torch.bool)
            kept[words] = True
            assert kept[token]
            assert scores[token] - scores[kept].logsumexp(0) == pytest.approx(logprob, abs=1e-4)
            assert scores[kept].min() > scores[~kept].max() - 1e-4
            p = scores.softmax(0)
            if "top_k" in options:
                assert len(words) == 5 if options["top_k"] == 5 else len(words) <= 20
                p = p.where(p >= p.sort().values[-options["top_k"]], 0) / p.topk(options["top_k"]).values.sum()
            if "top_p" in options:  # with the last of them, but not without it
                mass = p[kept].sum()
                assert mass > options["top_p"] - 1e-4
                assert mass - p[kept].min() < options["top_p"] + 1e-4
            if "min_p" in options:
                assert (p[kept] > options["min_p"] * p.max() - 1e-4).all()
                assert (p[~kept] < options["min_p"] * p.max() + 1e-4).all()


@pytest.mark.parametrize("options", CUTS, ids=lambda options: "-".join(options))
def test_recording_changes_no_draw(options):
    sampled_from, config = ending(), RolloutConfig(max_completion_length=8, **options)
    plain = HFRollout(sampled_from, config).generate(PROMPTS, 4, seed=0)
    recorded = HFRollout(sampled_from, config, supports=True).generate(PROMPTS, 4, seed=0)
    assert all(completion.support is None for completion in plain)
    assert [(c.token_ids, c.logprobs) for c in recorded] == [(c.token_ids, c.logprobs) for c in plain]


@pytest.mark.parametrize(
    ("options", "temperature"), [({}, None), ({"repetition_penalty": 1.5}, None), ({"min_p": 0.0}, None), (CUTS[0], 0)]
)
def test_nothing_is_recorded_where_nothing_is_cut(options, temperature):
    config = RolloutConfig(max_completion_length=3, **options)
    engine = HFRollout(policy(), config, temperature=temperature, supports=True)
    assert all(completion.support is None for completion in engine.generate(PROMPTS, 2, seed=0))


def test_rows_that_are_whole_or_have_ended_are_empty():
    scores = torch.randn(5, 7)
    scores[[1, 4], 3] = scores[4, 0] = -torch.inf
    scores[2] = torch.nan
    scores[3, 1:] = -torch.inf
    kept = _kept(scores, torch.tensor([False, True, False, False, False]))
    assert kept.sizes.tolist() == [0, 0, 0, 1, 5]
    assert kept.token_ids.tolist() == [0, 1, 2, 4, 5, 6]


def test_a_support_of_another_completion_is_refused():
    with pytest.raises(ValueError, match="support: expected 3 rows, one a token of the completion; got 2"):
        Completion([1, 2, 3], [0.0] * 3, True, Support.from_padded(torch.tensor([[1], [2]])))
    with pytest.raises(ValueError, match="support: expected a Support; got list"):
        Completion([1], [0.0], True, [[1]])
