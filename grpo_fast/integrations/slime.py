"""grpo-fast's objectives as slime's custom loss.

    --loss-type custom_loss --custom-loss-function-path grpo_fast.integrations.slime.policy_loss

The options are slime's own (`--eps-clip`, `--eps-clip-high`, `--eps-clip-c`, `--use-kl-loss`, `--kl-loss-coef`,
`--entropy-coef`, `--advantage-estimator gspo`). For another objective, name a function of your own:

    loss = custom_loss(LossConfig(loss_type="vespo"))

Shaped after slime's `policy_loss_function`; it was not run with slime itself. slime's logits are Megatron's, sharded
over the vocabulary; log-probabilities and entropies are slime's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.integrations.terms import token_terms
from grpo_fast.objectives import slope_scope

Loss = Callable[[Any, Any, Tensor, Callable[[Tensor], Tensor]], tuple[Tensor, dict[str, Tensor]]]


def loss_config(args: Any) -> LossConfig:
    """The `LossConfig` of slime's own options."""
    dual = getattr(args, "eps_clip_c", None)
    options: dict[str, Any] = {} if dual is None else {"dual_clip": dual}
    return LossConfig(
        loss_type="grpo" if dual is None else "ppo_dual",
        importance_sampling_level="sequence" if args.advantage_estimator == "gspo" else "token",
        epsilon=args.eps_clip,
        epsilon_high=args.eps_clip_high,
        beta=args.kl_loss_coef if args.use_kl_loss else 0.0,
        use_bias_correction_kl=False,
        entropy_coef=args.entropy_coef,
        **options,
    )


def custom_loss(config: LossConfig | None = None) -> Loss:
    """A loss with slime's signature; None: `loss_config` of slime's options.

    Raises:
        ValueError: (when called) an objective that couples a sequence's tokens under context parallelism.
    """

    def loss(
        args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        options = loss_config(args) if config is None else config
        parallel = getattr(args, "context_parallel_size", 1)
        if parallel > 1 and slope_scope(options, has_old=True) != "row":
            raise ValueError(
                f"context_parallel_size: expected 1, as {options.loss_type} at level "
                f"{options.importance_sampling_level!r} needs whole sequences; got {parallel}"
            )
        logprobs, entropy = _scores(args, batch, logits)
        old = batch["rollout_log_probs" if getattr(args, "use_rollout_logprobs", False) else "log_probs"]
        starts = torch.tensor([0, *map(len, logprobs)], device=logits.device).cumsum(0)
        packed, advantages = torch.cat(logprobs), torch.cat(list(batch["advantages"]))
        terms, found = token_terms(
            packed,
            advantages,
            config=options,
            # slime's reducer masks too; under context parallelism its masks are of whole sequences, and not needed here
            loss_mask=None if parallel > 1 else torch.cat(list(batch["loss_masks"])).bool(),
            cu_seqlens=starts,
            old_logprobs=torch.cat(list(old)),
            ref_logprobs=torch.cat(list(batch["ref_log_probs"])) if options.beta != 0 else None,
        )
        total, bonus = sum_of_sample_mean(terms), sum_of_sample_mean(torch.cat(entropy))
        total = total - options.entropy_coef * bonus
        drift = (torch.cat(list(old)) - packed).detach()
        metrics = {
            "loss": total,
            "entropy_loss": bonus,
            "ppo_kl": sum_of_sample_mean(drift),
            "ratio": sum_of_sample_mean(found.ratio),
        }
        return total, {name: value.clone().detach() for name, value in metrics.items()}

    return loss


def _scores(args: Any, batch: Any, logits: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """slime's log-probabilities and entropies of each response, a list of `[R]`."""
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy

    found = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
    )
    scores = found[-1] if isinstance(found, tuple) else found  # newer releases return (loss, scores)
    return list(scores["log_probs"]), list(scores["entropy"])


policy_loss: Loss = custom_loss()
