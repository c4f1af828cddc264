"""Packed attention is attention over the separate sequences, for every kind of model; anything else is noticed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from grpo_fast.head import hidden_states
from grpo_fast.trainer import attention
from grpo_fast.trainer.attention import (
    DECODE,
    NAME,
    PackLayout,
    attention_set_to,
    decode_attention,
    implementations,
    packed_attention,
    register,
)
from grpo_fast.trainer.batch import Experience, bounds, build_microbatches, check_packed_attention
from grpo_fast.trainer.config import ModelConfig
from grpo_fast.trainer.errors import ModelError
from grpo_fast.trainer.model import load_policy
from tests import tiny

CPU = torch.device("cpu")
PROMPTS, COMPLETIONS = (5, 1, 8), (9, 1, 4, 2, 7, 7)  # two completions a prompt, one of them a single token


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register()


def experience(prompts=PROMPTS, completions=COMPLETIONS, seed=0) -> Experience:
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(3, tiny.VOCAB_SIZE, (count,), generator=generator)

    return Experience(
        num_generations=len(completions) // len(prompts),
        prompts=tokens(sum(prompts)),
        prompt_bounds=bounds(prompts),
        tokens=tokens(sum(completions)),
        token_bounds=bounds(completions),
        sampling_logprobs=torch.zeros(sum(completions)),
        advantages=torch.randn(len(completions), generator=generator),
        in_loss=torch.ones(len(completions), dtype=torch.bool),
    )


def pack_of(data: Experience, implementation: str = "sdpa"):
    numbers = range(data.num_completions)
    (pack,) = build_microbatches(data, numbers, max_tokens=10_000, implementation=implementation, device=CPU)
    return pack


def separate_states(model, data: Experience, pack) -> torch.Tensor:
    """The states that predict the pack's targets, one plain forward a sequence."""
    parts = []
    for number in pack.completions.tolist():
        span, prompt = data.span(number), data.prompt(number)
        ids = torch.cat([prompt, data.tokens[span.start : span.stop]])[None]
        parts.append(hidden_states(model, input_ids=ids)[0, prompt.numel() - 1 : -1])
    return torch.cat(parts)


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("implementation", ["sdpa", "varlen"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_pack_equals_separate_sequences(kind, implementation, monkeypatch):
    monkeypatch.setitem(attention._KERNELS, "varlen", reference_varlen)
    model, data = tiny.model(kind, scale=0.3), experience()
    pack = pack_of(data, implementation)
    weights = torch.randn(pack.num_rows, 32, generator=torch.Generator().manual_seed(1))

    def run(states_of) -> tuple[torch.Tensor, list[torch.Tensor]]:
        states = states_of()
        return states, list(torch.autograd.grad((states * weights).sum(), model.model.parameters()))

    def packed() -> torch.Tensor:
        return pack.states(model)

    with attention_set_to(model, NAME):
        ours, our_gradients = run(packed)
    theirs, their_gradients = run(lambda: separate_states(model, data, pack))
    assert relative(ours, theirs) < 1e-5
    for ours, theirs in zip(our_gradients, their_gradients, strict=True):
        assert relative(ours, theirs) < 1e-4


def reference_varlen(q, k, v, layout, options):
    """What the GPU's varlen kernels compute, sequence by sequence."""
    parts = []
    for start, stop in zip(layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens[1:].tolist(), strict=True):
        one = dataclasses.replace(layout, num_sequences=1, max_length=stop - start, cu_seqlens=None)
        parts.append(attention._sdpa(q[start:stop], k[start:stop], v[start:stop], one, options))
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_plain_causal_mask_over_the_pack_is_noticed(kind):
    """The mutation check of the test above: one causal sequence of all tokens gives other states."""
    model, data = tiny.model(kind, scale=0.3), experience()
    pack = pack_of(data)
    size = pack.input_ids.shape[1]
    naive = dataclasses.replace(pack, layout=PackLayout.build([[range(size)]], size, implementation="sdpa"))
    with attention_set_to(model, NAME):
        states = naive.states(model)
    assert relative(states, separate_states(model, data, pack)) > 0.05
    running_on = dataclasses.replace(pack, position_ids=torch.arange(size)[None])
    with attention_set_to(model, NAME):
        states = running_on.states(model)
    assert relative(states, separate_states(model, data, pack)) > 0.01


def test_sharing_prompts_saves_their_tokens():
    data = experience(prompts=(20, 30), completions=(3, 4, 5, 6))
    pack = pack_of(data)
    # A prompt once, and of each completion all but the last token.
    assert pack.input_ids.shape[1] == 20 + 30 + sum((3, 4, 5, 6)) - 4
    assert pack.layout.source.numel() == 4 * (30 + 5)
    assert pack.layout.padding_fraction == pytest.approx(1 - (2 * 20 + 2 * 30 + 14) / 140)


def test_layout_places_every_token():
    layout = PackLayout.build(
        [[range(3), range(3, 5)], [range(3), range(5, 6)], [range(6, 8)]], 8, implementation="sdpa"
    )
    grid = layout.source.view(3, 5)
    assert grid.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0], [6, 7, 0, 0, 0]]
    assert layout.source[layout.place].tolist() == list(range(8))
    assert layout.shared.tolist() == [0, 1, 2]
    assert layout.source[layout.copies[layout.is_copy]].tolist() == [0, 1, 2]
    assert not set(layout.place.tolist()) & set(layout.copies[layout.is_copy].tolist())
    flat = PackLayout.build(
        [[range(3), range(3, 5)], [range(3), range(5, 6)], [range(6, 8)]], 8, implementation="varlen"
    )
    assert flat.cu_seqlens.tolist() == [0, 5, 9, 11]
    assert flat.source.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]


def test_gradients_of_shared_tokens_are_summed_in_float32():
    """In bfloat16, 256 + 1 is 256 again: 255 copies with gradient 1 after one with 256 must still count."""
    layout = PackLayout.build([[range(1)]] * 256, 1, implementation="sdpa")
    packed = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.ones(256, 1, 1, dtype=torch.bfloat16)
    gradient[layout.place] = 256
    attention._Unshare.apply(packed, layout).backward(gradient)
    assert packed.grad.item() == float(torch.tensor(256.0 + 255.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_check_accepts_what_can_be_packed(kind):
    check_packed_attention(tiny.model(kind, scale=0.3), implementation="sdpa", device=CPU)


def test_the_check_refuses_what_cannot():
    import transformers as hf

    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)).eval()
    for parameter in mamba.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(ModelError, match="gives other states in a pack"):
        check_packed_attention(mamba, implementation="sdpa", device=CPU)
    chunked = tiny.model()
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ModelError, match="chunked attention"):
        check_packed_attention(chunked, implementation="sdpa", device=CPU)


def test_a_layout_that_does_not_arrive_is_an_error():
    model = tiny.model()
    with attention_set_to(model, NAME), pytest.raises(ModelError, match="layout did not reach"):
        model(input_ids=torch.tensor([[3, 4, 5]]))
    layout = PackLayout.build([[range(2)]], 2, implementation="sdpa")
    states = torch.randn(1, 2, 2, 8)
    with pytest.raises(ModelError, match="does not support s_aux"):
        packed_attention(model, states, states, states, None, pack_layout=layout, s_aux=torch.zeros(2))


def test_the_attention_is_put_back():
    model = tiny.model()
    before = model.config._attn_implementation
    with attention_set_to(model, NAME):
        assert model.config._attn_implementation == NAME
        with pytest.raises(ModelError), attention_set_to(model, NAME):
            model(input_ids=torch.tensor([[3, 4, 5]]))
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("masked", [False, True])
def test_decode_attention_is_sdpa(masked):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 1, 8, generator=generator)
    key, value = (torch.randn(3, 2, 7, 8, generator=generator) for _ in range(2))
    mask = torch.rand(3, 1, 1, 7, generator=generator) > 0.3 if masked else None
    if mask is not None:
        mask[..., -1] = True
    ours, _ = decode_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    theirs = functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask, scale=0.3
    ).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_decoding_a_whole_prompt_falls_back_to_transformers():
    model = tiny.model()
    ids = torch.randint(3, tiny.VOCAB_SIZE, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    expected = model(input_ids=ids, attention_mask=mask).logits
    with attention_set_to(model, DECODE):
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_choosing_an_implementation():
    assert implementations("auto", CPU, torch.bfloat16) == ["sdpa"]
    for name in ("flash_attention_2", "varlen"):
        with pytest.raises(ModelError, match=f"{name} needs a GPU"):
            implementations(name, CPU, torch.bfloat16)


def test_auto_passes_over_what_does_not_work(monkeypatch, tmp_path, caplog):
    """A kernel that raises and one that is silently wrong; asked for by name, the failure is the user's to see."""

    def broken(q, k, v, layout, options):
        raise RuntimeError("head size 8 is not supported")

    def wrong(q, k, v, layout, options):
        return torch.zeros_like(q)

    monkeypatch.setitem(attention._KERNELS, "flash_attention_2", broken)
    monkeypatch.setitem(attention._KERNELS, "varlen", wrong)
    order = ["flash_attention_2", "varlen", "sdpa"]
    monkeypatch.setattr("grpo_fast.trainer.model.implementations", lambda name, *_: order if name == "auto" else [name])
    folder = str(tiny.save(tmp_path / "model"))
    assert load_policy(ModelConfig(path=folder, dtype="float32"), CPU).attention == "sdpa"
    assert "head size 8 is not supported" in caplog.text
    assert "varlen cannot be used: model: llama gives other states" in caplog.text
    with pytest.raises(ModelError, match="flash_attention_2 cannot be used: RuntimeError: head size 8"):
        load_policy(ModelConfig(path=folder, dtype="float32", attn_implementation="flash_attention_2"), CPU)
