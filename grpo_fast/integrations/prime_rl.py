"""grpo-fast as prime-rl's custom loss: one sequence at a time, log-probabilities in.

    [trainer.loss]
    type = "custom"
    import_path = "grpo_fast.integrations.prime_rl.loss"
    kwargs = { loss_type = "cispo", epsilon_high = 2.0 }

prime-rl sums over sequences and divides by the step's tokens, so `loss_type` has to be one that averages over tokens.
Shaped after prime-rl's documentation of `LossInputs` and `LossOutputs`; it was not run with prime-rl itself.
"""

from __future__ import annotations

import sys
from typing import Any

from grpo_fast.config import LossConfig
from grpo_fast.integrations.terms import masked_mean
from grpo_fast.loss import policy_loss
from grpo_fast.losses import LOSSES


def loss(inputs: Any, **options: Any) -> Any:
    """The summed loss of one sequence, as prime-rl's `LossOutputs`.

    Args:
        inputs: `trainer_logprobs`, `inference_logprobs`, `advantages`, `loss_mask`, each `[seq]`; `ref_logprobs` for
            beta.
        options: fields of `LossConfig`.

    Raises:
        ValueError: an option `LossConfig` does not take, or a loss type that does not average over tokens.
    """
    config = LossConfig(**options)
    if config.record.aggregation != "token_mean":
        known = ", ".join(name for name, record in LOSSES.items() if record.aggregation == "token_mean")
        raise ValueError(f"loss_type: expected one of {known}, as prime-rl divides by tokens; got {config.loss_type!r}")
    if getattr(inputs, "loss_weights", None) is not None:
        raise ValueError("loss_weights: expected None, as the objectives have no weights a token; got a tensor")
    logprobs, sampled, mask = inputs.trainer_logprobs, inputs.inference_logprobs, inputs.loss_mask.bool()
    out = policy_loss(
        logprobs,
        inputs.advantages,
        loss_mask=mask,
        old_logprobs=sampled,
        ref_logprobs=getattr(inputs, "ref_logprobs", None) if config.beta != 0 else None,
        config=config,
        normalizer=1.0,
    )
    drift = (sampled - logprobs).detach()
    metrics = {"ratio": masked_mean((-drift).exp(), mask), "mismatch_kl": masked_mean(drift.exp() - drift - 1, mask)}
    outputs = sys.modules[type(inputs).__module__].LossOutputs  # where prime-rl keeps it, beside LossInputs
    return outputs(loss=out.loss, metrics=metrics)
