"""Experiences and how they are cut into packs."""

from __future__ import annotations

import pytest
import torch

from grpo_fast.trainer.batch import Experience, bounds, build_microbatches

CPU = torch.device("cpu")
PROMPTS = (4, 7, 3)
COMPLETIONS = (5, 1, 8, 2, 6, 6, 3, 9, 1, 4, 4, 4)  # four a prompt


@pytest.fixture
def data() -> Experience:
    count = sum(COMPLETIONS)
    return Experience(
        num_generations=4,
        prompts=torch.arange(100, 100 + sum(PROMPTS)),
        prompt_bounds=bounds(PROMPTS),
        tokens=torch.arange(1000, 1000 + count),
        token_bounds=bounds(COMPLETIONS),
        sampling_logprobs=torch.arange(count) / 100,
        advantages=torch.arange(12.0),
        in_loss=torch.arange(12) % 3 != 0,
    )


def build(data: Experience, numbers, max_tokens: int):
    return build_microbatches(data, numbers, max_tokens=max_tokens, implementation="sdpa", device=CPU)


@pytest.mark.parametrize("max_tokens", [1, 20, 30, 45, 1000])
def test_every_target_is_predicted_once_by_its_predecessor(data, max_tokens):
    numbers = [0, 1, 2, 3, 5, 6, 9, 10, 11]
    packs = build(data, numbers, max_tokens)
    assert sorted(number for pack in packs for number in pack.completions.tolist()) == numbers
    for pack in packs:
        ids, positions = pack.input_ids[0], pack.position_ids[0]
        for sequence, number in enumerate(pack.completions.tolist()):
            rows = slice(int(pack.cu_seqlens[sequence]), int(pack.cu_seqlens[sequence + 1]))
            span, prompt = data.span(number), data.prompt(number)
            own = data.tokens[span.start : span.stop]
            assert torch.equal(pack.targets[rows], own)
            assert torch.equal(pack.token_index[rows], torch.arange(span.start, span.stop))
            # What predicts token t is the prompt's last token, then the completion's token before it.
            assert torch.equal(ids[pack.rows[rows]], torch.cat([prompt[-1:], own[:-1]]))
            start = prompt.numel() - 1
            assert torch.equal(positions[pack.rows[rows]], torch.arange(start, start + own.numel()))
        assert torch.equal(pack.take(data.sampling_logprobs), data.sampling_logprobs[pack.token_index])
        assert pack.take(None) is None


@pytest.mark.parametrize("max_tokens", [20, 30, 45, 1000])
def test_packs_keep_to_the_budget(data, max_tokens):
    packs = build(data, range(12), max_tokens)
    assert max(pack.input_ids.numel() for pack in packs) <= max_tokens
    assert len(packs) == 1 or max_tokens < 1000
    # Prompts are in a pack once: 14 prompt tokens and all but the last token of each completion.
    assert sum(pack.input_ids.numel() for pack in packs) >= sum(PROMPTS) + sum(COMPLETIONS) - 12
    if max_tokens == 1000:
        assert packs[0].input_ids.numel() == sum(PROMPTS) + sum(COMPLETIONS) - 12


def test_a_sequence_beyond_the_budget_has_a_pack_of_its_own(data):
    packs = build(data, range(12), 1)
    assert [pack.completions.numel() for pack in packs] == [1] * 12


def test_no_completions_no_packs(data):
    assert build(data, [], 100) == []


def test_empty_completions_have_no_rows(data):
    lengths = (0, 3, 0, 0, *COMPLETIONS[4:])
    data.token_bounds = bounds(lengths)
    (pack,) = build(data, range(4), 100)
    assert pack.cu_seqlens.tolist() == [0, 0, 3, 3, 3]
    assert pack.num_rows == 3


def test_masks_and_tensors(data):
    assert data.token_mask().tolist() == [bool(number % 3) for number, n in enumerate(COMPLETIONS) for _ in range(n)]
    again = Experience.from_tensors(data.tensors())
    assert again.num_generations == 4
    assert again.old_logprobs is None
    for name, value in data.tensors().items():
        assert torch.equal(again.tensors()[name], value)
