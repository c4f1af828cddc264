"""Measure what a causal language model does between its LM head's input and its logits.

Two tokens run through the model. What its logits are is compared with what a `HeadConfig` makes of
`states @ weight.T + bias`, by a relative RMS difference per token. Reading attributes (`head.py`) can only suggest what
that `HeadConfig` is; this decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from grpo_fast.config import HeadConfig

# The second token is amplified to logits of this size: a soft cap is invisible on the logits of a small or freshly
# initialised model, |z - c tanh(z / c)| = |z|^3 / 3c^2, and plain here.
_LARGE_LOGIT = 200.0
BY_HAND = (
    "Say what the model does with head_of(model, config=HeadConfig(logit_scale=..., softcap=...)) or, where that "
    "cannot express it, give grpo_loss the states, weight and bias yourself."
)


def probe(
    lm: nn.Module,
    module: nn.Module,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    guess: HeadConfig,
    *,
    states_of: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tokens through the model: (states @ weight.T + bias, the model's logits), both [2, V] float32.

    The state of the second token is amplified where it enters the head module. `states_of(lm, input_ids=...)` is the
    backbone's forward; `guess` only sets the amplification.

    Raises:
        ValueError: the model cannot run on two tokens, or does not call its head as a module.
    """
    gain = torch.ones(2, 1, dtype=weight.dtype, device=weight.device)
    calls = 0

    def amplify(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        return (args[0] * gain.to(args[0].dtype), *args[1:])

    token_ids = _ordinary_tokens(lm, weight.shape[0]).to(weight.device)
    with _quietly_evaluating(lm, weight.device) as stack:
        try:
            states = states_of(lm, input_ids=token_ids).to(weight.device, weight.dtype).reshape(2, -1)
            reached = F.linear(states[1], weight).float().abs().max().item() * abs(guess.logit_scale)
            # A power of two: exact in the states' own dtype, which may be coarser than the weight's.
            gain[1] = 2.0 ** math.ceil(math.log2(max(1.0, _LARGE_LOGIT / reached))) if reached > 0 else 1.0
            raw = F.linear(states * gain, weight, bias).float()
            stack.callback(module.register_forward_pre_hook(amplify).remove)
            logits = lm(input_ids=token_ids, use_cache=False).logits.float()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"model: {type(lm).__name__} cannot run on two text tokens, so what it does to its logits cannot be "
                f"checked ({type(error).__name__}: {error}). head_of(model, verify=False) goes without the check."
            ) from error
    if calls != 1 or logits.numel() != raw.numel():
        raise ValueError(
            f"model: expected {type(lm).__name__} to call its {type(module).__name__} head once and to return logits "
            f"{tuple(raw.shape)} for two tokens; got {calls} calls and {tuple(logits.shape)}. {BY_HAND}"
        )
    return raw, logits.to(raw.device).reshape(raw.shape)


@contextmanager
def _quietly_evaluating(lm: nn.Module, device: torch.device) -> Iterator[ExitStack]:
    """Eval mode, no gradient, no autocast; afterwards training flags and random states are as before."""
    training = [module for module in lm.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        try:
            for module in training:
                module.training = False
            yield stack
        finally:
            for module in training:
                module.training = True


def _ordinary_tokens(lm: nn.Module, vocab_size: int) -> torch.Tensor:
    """Two token ids [1, 2] without a meaning of their own (padding, end, image placeholder)."""
    special = {
        value
        for config in (getattr(lm, "config", None), text_config(lm))
        for name, value in getattr(config, "__dict__", {}).items()
        if "token" in name and isinstance(value, int)
    }
    ordinary = [token for token in range(min(vocab_size, len(special) + 2)) if token not in special]
    return torch.tensor([ordinary[:2]])


def text_config(lm: nn.Module) -> Any:
    """The language model's part of the Hugging Face configuration, or None."""
    config: Any = getattr(lm, "config", None)
    return config.gettext_config() if hasattr(config, "gettext_config") else config


def _transform(config: HeadConfig, raw: torch.Tensor) -> torch.Tensor:
    """The logits that `config` makes of `states @ weight.T + bias`."""
    logits = config.logit_scale * raw
    return logits if config.softcap is None else config.softcap * torch.tanh(logits / config.softcap)


def _misfit(config: HeadConfig, raw: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Relative RMS difference between `config` and the model's logits, per token: [2]."""
    size = logits.square().mean(-1).sqrt()
    difference = (_transform(config, raw) - logits).square().mean(-1).sqrt()
    return torch.where(difference == 0, difference, difference / size)


def fits(config: HeadConfig, raw: torch.Tensor, logits: torch.Tensor, *, dtype: torch.dtype) -> bool:
    """Whether `config` explains the model's logits up to the rounding of `dtype` (TF32 included)."""
    tolerance = 3e-2 if dtype in (torch.bfloat16, torch.float16) else 3e-3
    return bool(_misfit(config, raw, logits).max() <= tolerance)


def describe_misfit(lm: nn.Module, config: HeadConfig, raw: torch.Tensor, logits: torch.Tensor) -> str:
    """What was expected, what came, and what it looks like."""
    plain, large = _misfit(config, raw, logits).tolist()
    ratio = ((raw * logits).sum(-1) / raw.square().sum(-1)).tolist()
    scaled = _misfit(HeadConfig(logit_scale=ratio[0] or 1.0), raw, logits).tolist()
    tolerance = 1e-2
    if scaled[0] <= tolerance and scaled[1] <= tolerance:
        looks_like = f" They look like {ratio[0]:.6g} times what the head gives."
    elif min(plain, scaled[0]) <= tolerance:
        largest = logits[1].abs().max().item()
        looks_like = f" Small logits agree and large ones do not, none exceeds {largest:.4g}: a soft cap?"
    else:
        looks_like = ""
    return (
        f"model: expected the logits of {type(lm).__name__} to be those of its LM head with {config}; they differ by a "
        f"relative RMS of {plain:.3g} (plain states) and {large:.3g} (logits near {_LARGE_LOGIT:g}).{looks_like} "
        f"{BY_HAND}"
    )
