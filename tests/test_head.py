"""head_of against the models themselves: tiny random ones of many architectures, as they are and through peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_fast.config import HeadConfig
from grpo_fast.head import Head, head_of, hidden_states
from grpo_fast.loss import token_logprobs

tf = pytest.importorskip("transformers")

VOCAB = 97
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8}
MLA |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

# fmt: off
# (stem of the class names, options, what is to be found, tied, biased)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], HeadConfig, bool, bool]] = {
    "llama": ("Llama", {}, HeadConfig(), False, False),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True}, HeadConfig(), True, False),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8}, HeadConfig(softcap=5.0), True, False),
    "gemma3-text": ("Gemma3Text", {"head_dim": 8}, HeadConfig(), True, False),
    "granite": ("Granite", {"logits_scaling": 8.0}, HeadConfig(logit_scale=0.125), False, False),
    "cohere": ("Cohere", {"logit_scale": 0.0625}, HeadConfig(logit_scale=0.0625), True, False),
    # Divides the states, not the logits, and by a quotient of two sizes: 32 / 16.
    "minicpm3": ("MiniCPM3", MLA | {"dim_model_base": 16}, HeadConfig(logit_scale=0.5), True, False),
    # Granite's attribute, but it multiplies.
    "hyperclovax": ("HyperCLOVAX", {"logits_scaling": 0.25}, HeadConfig(logit_scale=0.25), False, False),
    "nanochat": ("NanoChat", {}, HeadConfig(softcap=15.0), False, False),
    "phi-bias": ("Phi", {}, HeadConfig(), False, True),
    "gptj-bias": ("GPTJ", GPT, HeadConfig(), False, True),
    "gpt2": ("GPT2", GPT, HeadConfig(), True, False),
    # Its causal LM calls model.decoder past the backbone, and projects the states down.
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16}, HeadConfig(), True, False),
    "mamba": ("Mamba", {}, HeadConfig(), True, False),
}
# fmt: on


def randomised(model: nn.Module) -> nn.Module:
    """Float32, with every parameter random and logits of a few units: a bias or a cap left out must show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        head = model.get_output_embeddings()
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.add_(torch.randn(head.bias.shape, generator=generator))
    return model.float().eval()


def build(name: str) -> nn.Module:
    stem, options, *_ = ARCHITECTURES[name]
    irregular = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    model_class = irregular.get(stem, f"{stem}ForCausalLM")
    if not hasattr(tf, model_class):
        pytest.skip(f"transformers {tf.__version__} has no {model_class}")
    torch.manual_seed(0)
    return randomised(getattr(tf, model_class)(getattr(tf, f"{stem}Config")(**SIZES | options)))


def token_ids() -> Tensor:
    return torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))


def logits_of(head: Head, states: Tensor) -> Tensor:
    """The definition, written out."""
    logits = (states @ head.weight.T + (0 if head.bias is None else head.bias)) * head.config.logit_scale
    return logits if head.config.softcap is None else head.config.softcap * torch.tanh(logits / head.config.softcap)


def relative_rms(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    assert expected.abs().max() > 0
    return ((got - expected).square().mean() / expected.square().mean()).sqrt().item()


def assert_same_function(model: nn.Module, **inputs: Any) -> Head:
    """Head over hidden states = the model's own logits, and so are the gradients of everything trainable."""
    head = head_of(model)
    assert head.unverified is None
    inputs = inputs or {"input_ids": token_ids()}
    ours, theirs = logits_of(head, hidden_states(model, **inputs)), model(**inputs, use_cache=False).logits
    assert relative_rms(ours, theirs) < 1e-5
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    direction = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3))
    grads = [
        torch.autograd.grad((logits * direction).sum(), list(trained.values()), allow_unused=True)
        for logits in (ours, theirs)
    ]
    reached = 0
    for name, got, expected in zip(trained, *grads, strict=True):
        assert (got is None) == (expected is None), name
        if expected is not None and expected.abs().max() > 0:
            assert relative_rms(got, expected) < 1e-4, name
            reached += 1
    assert reached > 0
    return head


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_is_the_models_own(name: str) -> None:
    *_, config, tied, biased = ARCHITECTURES[name]
    model = build(name)
    head = assert_same_function(model)
    assert head.config == config
    assert head.weight is model.get_output_embeddings().weight
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert (head.bias is not None) == biased


def test_states_and_head_feed_the_loss() -> None:
    model, ids = build("gemma2"), token_ids()
    head, states = head_of(model), hidden_states(model, input_ids=ids)
    out = token_logprobs(states[:, :-1], head.weight, ids[:, 1:], bias=head.bias, head=head.config)
    expected = F.log_softmax(model(input_ids=ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(out.logprobs, expected, rtol=1e-5, atol=1e-5)


# --- vision-language models ---


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}


def llava() -> nn.Module:
    torch.manual_seed(0)
    text, vision = tf.LlamaConfig(**SIZES), tf.CLIPVisionConfig(**VISION, projection_dim=16)
    return randomised(
        tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=3))
    )


def test_vision_language_model_with_an_image() -> None:
    model = llava()
    assert assert_same_function(model).backbone is model.model
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    ids = torch.cat([torch.tensor([[7, 3, 3, 3, 3]]), token_ids()[:1]], dim=1)
    assert_same_function(model, input_ids=ids, pixel_values=pixels)


def test_a_cap_in_the_configuration_that_is_not_applied() -> None:
    # Gemma3ForConditionalGeneration leaves out the cap that its text model alone applies: measured, not believed.
    torch.manual_seed(0)
    text = tf.Gemma3TextConfig(**SIZES, head_dim=8, final_logit_softcapping=4.0)
    parts = {"text_config": text.to_dict(), "vision_config": tf.SiglipVisionConfig(**VISION).to_dict()}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 3, "eoi_token_index": 4}
    model = randomised(tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(**parts, **tokens)))
    inputs = {"input_ids": token_ids().clamp(min=6)}
    applied = relative_rms(
        4 * torch.tanh(model(**inputs).logits / 4), head_of(model).backbone(**inputs)[0] @ model.lm_head.weight.T
    )
    assert head_of(model).config == HeadConfig(softcap=4.0 if applied < 1e-5 else None)


# --- peft ---


def peft_model(base: nn.Module, **options: Any) -> nn.Module:
    """`base` with a LoRA adapter whose matrices are all random (peft starts with B = 0)."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_adapter_elsewhere_leaves_the_plain_weight() -> None:
    base = build("qwen3-tied")
    model = peft_model(base, target_modules=["q_proj", "down_proj"])
    head = assert_same_function(model)
    assert head.weight is base.get_output_embeddings().weight
    assert not head.weight.requires_grad


@pytest.mark.parametrize("name", ["llama", "phi-bias", "gemma2"])
def test_lora_on_the_head(name: str) -> None:
    model = peft_model(build(name), target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
    head = assert_same_function(model)  # gradients of A and B included
    base = model.get_base_model().lm_head.base_layer.weight
    assert relative_rms(head.weight, base) > 1e-3
    assert head.weight.requires_grad
    with model.disable_adapter():
        assert head_of(model).weight is base
    model.merge_adapter()
    assert head_of(model).weight is model.get_base_model().lm_head.base_layer.weight
    assert_same_logits(model)


def assert_same_logits(model: nn.Module) -> None:
    ours = logits_of(head_of(model), hidden_states(model, input_ids=token_ids()))
    assert relative_rms(ours, model(input_ids=token_ids()).logits) < 1e-5


def test_two_adapters_on_the_head_and_a_lora_bias() -> None:
    peft = pytest.importorskip("peft")
    model = peft_model(build("phi-bias"), target_modules=["lm_head"], lora_bias=True)
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_same_function(model)


def test_modules_to_save_gives_the_trainable_copy() -> None:
    model = peft_model(build("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapper = model.get_base_model().lm_head
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(1.5)
    assert assert_same_function(model).weight is wrapper.modules_to_save["default"].weight
    with model.disable_adapter():
        assert head_of(model).weight is wrapper.original_module.weight
        assert_same_logits(model)


def test_trainable_tokens_on_a_tied_head() -> None:
    model = peft_model(build("qwen3-tied"), target_modules=["q_proj"], trainable_token_indices=[6, 7])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    assert_same_function(model)


def test_dropout_on_the_head_is_refused_in_training_only() -> None:
    model = peft_model(build("llama"), target_modules=["lm_head"], lora_dropout=0.1)
    assert_same_function(model.eval())
    with pytest.raises(ValueError, match=r"lora_dropout=0 on the LM head; got 0\.1"):
        head_of(model.train())
    elsewhere = peft_model(build("llama"), target_modules=["q_proj"], lora_dropout=0.1)
    assert head_of(elsewhere.train()).unverified is None


def test_other_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="expected plain LoRA on the LM head; got Dora"):
        head_of(peft_model(build("llama"), target_modules=["lm_head"], use_dora=True))
    loha = peft.get_peft_model(build("llama"), peft.LoHaConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"on the LM head; got peft\.tuners\.loha"):
        head_of(loha)
    prompts = peft.get_peft_model(build("llama"), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="PromptTuningConfig"):
        head_of(prompts)


# --- arithmetic that nothing announces ---


class OddLlama(tf.LlamaForCausalLM):
    """A Llama whose logits go through `odd` and whose states go through `odd_states` on their way to the head."""

    odd = staticmethod(lambda logits: logits)
    odd_states = staticmethod(lambda states: states)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        states = self.odd_states(self.model(input_ids=input_ids, **kwargs).last_hidden_state)
        return tf.modeling_outputs.CausalLMOutputWithPast(logits=self.odd(self.lm_head(states)))


def odd_llama(**functions: Any) -> OddLlama:
    torch.manual_seed(0)
    model = OddLlama(tf.LlamaConfig(**SIZES))  # as initialised: logits near 0.1
    for name, function in functions.items():
        setattr(model, name, function)
    return model.eval()


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"odd": lambda z: 0.25 * z}, "They look like 0.25 times what the head gives"),
        ({"odd": lambda z: 30 * torch.tanh(z / 30)}, "none exceeds 30: a soft cap"),
        ({"odd": lambda z: 0.5 * z.clamp(max=40)}, "a soft cap"),
        ({"odd": lambda z: z - z.mean(-1, keepdim=True) + 1}, "differ by a relative RMS"),
        ({"odd": lambda z: z.index_fill(-1, torch.tensor([11, 12]), -1e4)}, "differ by a relative RMS"),
        ({"odd": lambda z: z[..., :-1]}, r"to return logits \(2, 97\) for two tokens; got 1 calls and \(1, 2, 96\)"),
        ({"odd_states": lambda h: F.normalize(h, dim=-1)}, "differ by a relative RMS"),
        ({"odd_states": lambda h: h.roll(1, dims=1)}, "differ by a relative RMS"),
        ({"odd_states": lambda h: h[:, :, :-1]}, "cannot run on two text tokens"),
    ],
)
def test_unknown_head_arithmetic_raises(functions: dict[str, Any], message: str) -> None:
    model = odd_llama(**functions)
    with pytest.raises(ValueError, match=message):
        head_of(model)
    assert head_of(model, verify=False).unverified == "verify=False"


def test_arithmetic_said_by_hand_is_measured_too() -> None:
    model = odd_llama(odd=lambda z: 30 * torch.tanh(0.25 * z / 30))
    config = HeadConfig(logit_scale=0.25, softcap=30.0)
    head = head_of(model, config=config)
    assert head.config == config
    assert head.unverified is None
    with pytest.raises(ValueError, match="differ"):
        head_of(model, config=HeadConfig(logit_scale=0.25, softcap=50.0))
    with pytest.raises(ValueError, match="differ"):
        head_of(odd_llama(odd=lambda z: 31 * torch.tanh(0.25 * z / 31)), config=config)


# --- the probe leaves no trace, and is skipped where it cannot run ---


def test_probe_runs_once_and_leaves_no_trace() -> None:
    model = build("llama")
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head_of(model)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    head_of(model)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gemma2", "minicpm3"])
def test_other_dtypes_pass_the_probe(name: str, dtype: torch.dtype) -> None:
    head = head_of(build(name).to(dtype))
    assert head.weight.dtype == dtype
    assert head.config == ARCHITECTURES[name][2]


def test_meta_parameters_are_not_probed() -> None:
    with torch.device("meta"):
        model = tf.GraniteForCausalLM(tf.GraniteConfig(**SIZES, logits_scaling=8.0))
    head = head_of(model)
    assert head.unverified == "parameters are on the meta device"
    assert head.config == HeadConfig(logit_scale=0.125)


def test_wrappers_are_seen_through() -> None:
    model = build("llama")
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        head = head_of(wrapped)
        assert head.weight is model.lm_head.weight
        assert head.backbone is model.model


def quantised() -> nn.Module:
    model = build("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 32, dtype=torch.int8), requires_grad=False)
    return model


def headless() -> nn.Module:
    return tf.LlamaModel(tf.LlamaConfig(**SIZES))


def encoder_decoder() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCAB, **sizes))


def nested() -> nn.Module:
    wrapper = nn.Module()
    wrapper.language_model = build("llama")
    wrapper.lm_head = wrapper.language_model.lm_head
    return wrapper


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "gpt2", "expected a torch.nn.Module; got str"),
        (headless, "got LlamaModel without one"),
        (encoder_decoder, "expected a decoder-only language model; got T5ForConditionalGeneration"),
        (quantised, "got torch.int8"),
        (nested, "model.language_model"),
    ],
    ids=["str", "headless", "encoder-decoder", "quantised", "nested"],
)
def test_models_without_a_usable_head(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_of(make())
