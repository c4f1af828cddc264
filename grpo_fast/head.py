"""The LM head of a Hugging Face model as `grpo_loss` takes it: weight, bias, `HeadConfig` and the backbone before it.

    states = backbone(input_ids)                    # [B, T, H], what enters the head
    logits = transform(states @ weight.T + bias)    # [B, T, V], transform: `HeadConfig`

What a model does around its head is read from the attributes that transformers' models keep it in (`_SCALES`,
`_SOFTCAPS`), and then measured: a two-token probe compares the model's own logits with this arithmetic, so a model that
does anything else is refused instead of trained on wrong log-probabilities. Dimensions: H hidden size, V vocabulary.

Imports torch only. transformers and peft are met through their attributes.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from grpo_fast.config import HeadConfig
from grpo_fast.head_probe import BY_HAND, describe_misfit, fits, probe, text_config

# Where models keep what they do to their logits: (owner, attribute, exponent of the factor). Surveyed in transformers
# 5.17 to 5.23.
_SCALES = (
    ("config", "logits_scaling", -1),  # Granite, MiniCPM3
    ("config", "logits_mup_width_multiplier", -1),  # Inkling
    ("config", "output_multiplier", 1),  # Muse
    ("model", "logit_scale", 1),  # Cohere
    ("backbone", "lm_head_multiplier", 1),  # Falcon-H1
)
_INVERSE_MODEL_TYPES = ("hyperclovax",)  # multiplies by its `logits_scaling`
_SOFTCAPS = (
    ("config", "final_logit_softcapping"),  # Gemma 2, 3, 3n, 4, NanoChat, PaliGemma
    ("config", "logits_soft_cap"),  # RecurrentGemma
    ("config", "output_logit_soft_cap"),  # xLSTM
    ("model", "final_logit_softcapping"),  # Mistral Large 4
)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Probed once per model and head state: what was found.
_measured: weakref.WeakKeyDictionary[nn.Module, dict[object, HeadConfig]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Head:
    """The arguments of `grpo_loss` that come from the model.

    Attributes:
        weight: [V, H]; the parameter itself, or a tensor computed from parameters (LoRA on the head) through which
            gradients flow. In the latter case take a new `Head` in every step.
        bias: [V] or None.
        config: what happens between `states @ weight.T + bias` and the logits.
        backbone: the module whose `last_hidden_state` enters the head.
        unverified: why the arithmetic was not compared with the model's own logits; None if it was.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    config: HeadConfig
    backbone: nn.Module
    unverified: str | None = None


def head_of(model: nn.Module, *, config: HeadConfig | None = None, verify: bool = True) -> Head:
    """Find the LM head of a causal language model and what it computes.

    Tied and untied heads, bias, soft caps and scales; wrapped by DDP, torch.compile or peft (adapters elsewhere; on the
    head itself plain LoRA, `modules_to_save` or trainable tokens); vision-language models with the head at their top.

    Args:
        model: a Hugging Face causal LM, or a wrapper of one.
        config: what the model does to its logits, where its attributes do not tell.
        verify: compare with the model's own logits on two tokens, once per model. Skipped, and the reason kept in
            `Head.unverified`, where parameters are not there to be used (meta device, sharded).

    Raises:
        ValueError: no head or backbone is found, the head is quantised or carries an adapter other than those above,
            LoRA dropout on the head is active, or the model's logits are not what the head gives.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    lm = unwrap(model)
    module, backbone = _head_module(lm), _backbone(lm)
    weight, bias = _effective_weight(module)
    if weight.dtype not in _FLOATS:
        raise ValueError(
            f"model: expected an LM head in bfloat16, float16, float32 or float64; got {weight.dtype} "
            f"({type(module).__name__}). A quantised head has to be dequantised: keep it out of the quantisation."
        )
    used_rows = getattr(text_config(lm), "unpadded_vocab_size", None)
    if used_rows and used_rows < weight.shape[0]:  # Inkling: the rows after these are padding, cut off the logits
        weight, bias = weight[:used_rows], None if bias is None else bias[:used_rows]
    candidates = [config] if config is not None else _candidates(lm, backbone)
    unverified = _why_not_probed(lm, weight) if verify else "verify=False"
    if unverified is None and weight.dim() != 2:
        raise ValueError(f"model: expected an LM head weight of shape [V, H]; got {tuple(weight.shape)}")
    found = candidates[0] if unverified else _measure_once(lm, module, weight, bias, candidates)
    return Head(weight=weight, bias=bias, config=found, backbone=backbone, unverified=unverified)


def hidden_states(model: nn.Module, **inputs: Any) -> torch.Tensor:
    """The states that enter the LM head, [B, T, H]: the backbone's forward, without the head's.

    The backbone is called directly: hooks on wrappers (DDP's gradient reduction, FSDP's gathering) do not run.
    """
    inputs.setdefault("use_cache", False)
    output = _backbone(unwrap(model))(**inputs)
    states = getattr(output, "last_hidden_state", None)
    return states if states is not None else output[0]


def unwrap(model: nn.Module) -> nn.Module:
    """The causal LM inside torch.compile, DDP-like and peft wrappers, adapters included.

    Raises:
        ValueError: the peft method acts in the wrapper's own forward (prompt learning, activated LoRA), which calling
            the backbone would leave out.
    """
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif callable(getattr(model, "get_base_model", None)):
            for name, adapter in getattr(model, "peft_config", {}).items():
                if getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "alora_invocation_tokens", None):
                    raise ValueError(
                        f"model: expected a peft method that lives in the layers; got {type(adapter).__name__} as "
                        f"adapter {name!r}, which acts in the wrapper's forward, where hidden states would miss it"
                    )
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(getattr(model, "module", None), nn.Module) and not hasattr(model, "get_output_embeddings"):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def _head_module(lm: nn.Module) -> nn.Module:
    """The module at the place of the LM head, wrappers of peft included."""
    get_output_embeddings = getattr(lm, "get_output_embeddings", None)
    module = get_output_embeddings() if callable(get_output_embeddings) else getattr(lm, "lm_head", None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"model: expected a causal language model with an LM head (get_output_embeddings() or .lm_head); "
            f"got {type(lm).__name__} without one"
        )
    return module


def _backbone(lm: nn.Module) -> nn.Module:
    """The module whose last_hidden_state enters the head."""
    if getattr(getattr(lm, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder-only language model; got {type(lm).__name__}, an encoder-decoder")
    backbone = getattr(lm, "base_model", getattr(lm, "model", None))
    if not isinstance(backbone, nn.Module) or backbone is lm:
        raise ValueError(
            f"model: expected a causal language model whose backbone is a module of its own; got {type(lm).__name__}. "
            "If it wraps a whole language model (model.language_model) and you train on text only, pass that."
        )
    return backbone


# --- weight and bias, through peft ---


def _effective_weight(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias that `module` applies, differentiable in the parameters that peft trains."""
    active = [] if getattr(module, "disable_adapters", False) else list(getattr(module, "active_adapters", None) or [])
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        copies: Any = module.modules_to_save
        trained = bool(active) and active[0] in copies
        return _effective_weight(copies[active[0]] if trained else module.original_module)  # type: ignore[arg-type]
    if hasattr(module, "token_adapter"):
        return _effective_weight(module.token_adapter)  # type: ignore[arg-type]
    if hasattr(module, "base_layer"):
        return _adapted_weight(module, active)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"model: expected an LM head with a weight; got {type(module).__name__}. {BY_HAND}")
    return weight, bias


def _adapted_weight(layer: Any, active: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a peft tuner layer around the LM head."""
    weight, bias = _effective_weight(layer.base_layer)
    merged = bool(getattr(layer, "merged", False))
    if merged and not active:
        raise ValueError("model: adapters on the LM head are merged and disabled; unmerge them first (unmerge_adapter)")
    if merged or not active:
        return weight, bias
    if hasattr(layer, "trainable_tokens_delta"):
        return layer.get_merged_weights(active), None  # peft's own forward leaves the bias out
    if not hasattr(layer, "lora_A"):
        raise ValueError(
            f"model: expected plain LoRA, modules_to_save or trainable tokens on the LM head; got "
            f"{type(layer).__module__}.{type(layer).__name__}"
        )
    for adapter in active:
        if adapter in layer.lora_A:
            weight, bias = _add_lora(layer, adapter, weight, bias)
    return weight, bias


def _add_lora(
    layer: Any, adapter: str, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """weight + scaling B A and bias + scaling b_B, in weight's dtype: [V, H] and [V]."""
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None or getattr(layer, "use_dora", {}).get(adapter, False):
        kind = "DoRA" if variant is None else type(variant).__name__
        raise ValueError(f"model: expected plain LoRA on the LM head; got {kind} in adapter {adapter!r}")
    if getattr(layer, "fan_in_fan_out", False):
        raise ValueError("model: expected LoRA on a linear LM head; got fan_in_fan_out=True (a transposed weight)")
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0)
    if dropout and layer.training:
        raise ValueError(
            f"model: expected lora_dropout=0 on the LM head; got {dropout} in adapter {adapter!r}. Dropout there "
            "is no change of the weight: leave the head out of the adapter, or set the dropout to 0 (eval mode is fine)"
        )
    lora_a, lora_b, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter], layer.scaling[adapter]
    with torch.autocast(weight.device.type, enabled=False):
        # One GEMM with the addition in its epilogue: no [V, H] temporary, one rounding to weight's dtype.
        weight = torch.addmm(weight, lora_b.weight.to(weight.dtype), lora_a.to(weight.dtype), alpha=scaling)
    if lora_b.bias is not None:
        extra = scaling * lora_b.bias.to(weight.dtype)
        bias = extra if bias is None else bias + extra
    return weight, bias


# --- what happens to the logits: read, then measured ---


def _candidates(lm: nn.Module, backbone: nn.Module) -> list[HeadConfig]:
    """HeadConfigs that the model's attributes suggest, the likeliest first.

    A scale or cap may stand in a configuration without being applied (vision-language wrappers of a scaled text model),
    hence the ones without it.
    """
    text = text_config(lm)
    owners = {"config": text, "model": lm, "backbone": backbone}
    scales, softcaps = [1.0], [None]
    for owner, name, exponent in _SCALES:
        value = getattr(owners[owner], name, None)
        if isinstance(value, (int, float)) and value > 0 and value != 1:
            flip = name == "logits_scaling" and str(getattr(text, "model_type", "")).startswith(_INVERSE_MODEL_TYPES)
            scales.insert(0, scales[0] * float(value) ** (-exponent if flip else exponent))
    for owner, name in _SOFTCAPS:
        value = getattr(owners[owner], name, None)
        if isinstance(value, (int, float)) and value > 0:
            softcaps.insert(0, float(value))  # type: ignore[arg-type]
    return [HeadConfig(logit_scale=scale, softcap=cap) for scale, cap in product(scales, softcaps)]


def _why_not_probed(lm: nn.Module, weight: torch.Tensor) -> str | None:
    """The reason why the model cannot run two tokens here, or None."""
    for parameter in (weight, *lm.parameters()):
        if parameter.is_meta:
            return "parameters are on the meta device"
        if hasattr(parameter, "ds_id") or hasattr(parameter, "placements"):
            return f"parameters are sharded ({type(parameter).__name__})"
    return None


def _measure_once(
    lm: nn.Module, module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, candidates: list[HeadConfig]
) -> HeadConfig:
    """The first candidate that gives the model's own logits; remembered for this model, head and set of adapters."""
    known = _measured.setdefault(lm, {})
    state = (id(module), bias is None, str(getattr(module, "active_adapters", None)), tuple(candidates))
    if state not in known:
        raw, logits = probe(lm, module, weight, bias, candidates[0], states_of=hidden_states)
        fitting = [config for config in candidates if fits(config, raw, logits, dtype=weight.dtype)]
        if not fitting:
            raise ValueError(describe_misfit(lm, candidates[0], raw, logits))
        known[state] = fitting[0]
    return known[state]
