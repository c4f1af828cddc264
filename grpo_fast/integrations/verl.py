"""grpo-fast inside verl 0.9: its fused LM head, and objectives for `actor.policy_loss.loss_mode`.

    VERL_USE_EXTERNAL_MODULES=grpo_fast.integrations.verl python -m verl.trainer.main_ppo \\
        actor_rollout_ref.model.use_fused_kernels=True \\
        actor_rollout_ref.model.fused_kernel_options.impl_backend=torch \\
        actor_rollout_ref.actor.policy_loss.loss_mode=grpo_fast_vespo ...

verl imports the modules that the variable names in every worker; imported so, this one installs itself (`install`):

- The head: `FusedLinearForPPO`, which verl's fused forward of every model family calls with the last states, becomes
  grpo-fast's. It is the one of `impl_backend` torch and liger; triton keeps verl's kernel. Like verl's it knows neither
  a bias nor a soft cap of the head.
- Supports (`docs/support.md`): a rollout that samples with top-p or top-k and knows what it kept puts ids `[B, R, K]`
  int32, padded with -1, into its `DataProto` beside `responses`, as batch["rollout_support"]; verl reorders, splits and
  moves it like any tensor. verl's forward passes no more than labels to its head, so the engine says which rows:

      class Engine(FSDPEngineWithLMHead):
          def forward_step(self, micro_batch, loss_function, forward_only):
              ids, mask = micro_batch["rollout_support"], micro_batch["attention_mask"]
              with on_support(packed_support(ids, micro_batch["input_ids"].values(), mask)):
                  return super().forward_step(micro_batch, loss_function, forward_only)
- The objectives, registered with `register_policy_loss` as grpo_fast_<name>, `OBJECTIVES`. verl aggregates them by its
  `loss_agg_mode` and adds entropy bonus and KL itself; clip bounds, dual clip and SAPO's temperatures are the actor's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_fast.config import LossConfig
from grpo_fast.integrations.terms import clipped_share, masked_mean, token_terms
from grpo_fast.integrations.versions import require
from grpo_fast.loss import token_logprobs
from grpo_fast.losses import LOSSES
from grpo_fast.packing import Support

logger = logging.getLogger("grpo_fast")

_support: ContextVar[Support | None] = ContextVar("support", default=None)

OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dual": {"loss_type": "ppo_dual"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence_token"},
    "cispo": {"loss_type": "cispo"},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "gmpo": {"loss_type": "gmpo"},
    "dppo": {"loss_type": "dppo"},
    "reinforce": {"loss_type": "reinforce"},
}
"""Names after `grpo_fast_`, and what they are; `dual` is verl's own `vanilla`."""


def fused_linear(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Any = 1.0, support: Support | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) of `targets` `[...]`, float32, from `hidden` `[..., H]` and `weight` `[V, H]`.

    Args:
        support: the tokens that each target was sampled from, rows as in `targets`, flattened.
    """
    if isinstance(temperature, Tensor):
        temperature = temperature.item() if temperature.numel() == 1 else temperature.reshape(targets.shape)
    scores = token_logprobs(hidden, weight.to(hidden.dtype), targets, temperature=temperature, support=support)
    assert scores.entropy is not None
    return scores.logprobs, scores.entropy


class FusedLinearForPPO(nn.Module):
    """In place of verl's class of this name; `chunk_size` and `impl_backend` have no meaning here."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy) in the shape of input_ids; on the support that `on_support` gives."""
        from grpo_fast.integrations.lm_head import whole

        return fused_linear(hidden_states, whole(vocab_weights), input_ids, temperature, _support.get())


@contextmanager
def on_support(support: Support | None) -> Iterator[None]:
    """The fused head's forwards in this block are on `support`, rows as in verl's rolled labels."""
    token = _support.set(support)
    try:
        yield
    finally:
        _support.reset(token)


def packed_support(ids: Tensor, tokens: Tensor, attention_mask: Tensor) -> Support:
    """Responses' supports in the layout of verl's labels: padding removed, rolled by one.

    A prompt's tokens get themselves as a support: log-probability and entropy 0, and not computed.

    Args:
        ids: `[B, R, K]` integers, of the last R columns, -1 where a token has fewer than K; a token without any was
            drawn from the whole vocabulary.
        tokens: `[T]`, the batch's tokens without padding.
        attention_mask: `[B, L]`, prompts and responses.

    Returns:
        `[T]` rows; row t is of token t + 1, the last of the first.

    Raises:
        ValueError: shapes that do not go together, or as `Support.from_padded`.
    """
    mask = attention_mask.bool()
    prompt = mask.shape[1] - ids.shape[1]
    if ids.dim() != 3 or len(ids) != len(mask) or prompt < 0 or tokens.shape != (int(mask.sum()),):
        raise ValueError(
            f"ids, tokens: expected [B, R, K], R <= L, and [{int(mask.sum())}], for attention_mask [B, L] = "
            f"{list(mask.shape)}; got {list(ids.shape)} and {list(tokens.shape)}"
        )
    packed = F.pad(ids, (0, int(ids.shape[2] == 0), prompt, 0), value=-1)[mask]
    in_prompt = (torch.arange(mask.shape[1], device=mask.device) < prompt).expand_as(mask)[mask]
    packed[:, 0] = torch.where(in_prompt, tokens.to(ids.dtype), packed[:, 0])
    return Support.from_padded(packed.roll(-1, 0))


def loss_config(name: str, actor: Any) -> LossConfig:
    """The `LossConfig` of an objective with the bounds of verl's `ActorConfig`."""
    low = actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low
    high = actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high
    options = OBJECTIVES[name]
    return LossConfig(
        **options,
        epsilon=low,
        epsilon_high=1 + high if LOSSES[options["loss_type"]].clip == "upper" else high,
        dual_clip=actor.clip_ratio_c,
        sapo_temperature_pos=actor.tau_pos,
        sapo_temperature_neg=actor.tau_neg,
    )


def policy_loss_of(name: str, aggregate: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """An objective with the signature of verl's policy losses; `aggregate` is verl's `agg_loss`."""

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if config is None:
            raise ValueError("config: expected verl's ActorConfig, whose clip bounds the loss takes; got None")
        options, mask = loss_config(name, config), response_mask.bool()
        terms, found = token_terms(log_prob, advantages, config=options, loss_mask=mask, old_logprobs=old_log_prob)
        if rollout_is_weights is not None:
            terms = terms * rollout_is_weights
        total = aggregate(loss_mat=terms, loss_mask=mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
        metrics = {
            "actor/pg_clipfrac": clipped_share(found, advantages, mask, options),
            "actor/ppo_kl": masked_mean(old_log_prob - log_prob, mask),
        }
        return total, {name: value.item() for name, value in metrics.items()}

    loss.__name__ = f"grpo_fast_{name}"
    return loss


def install() -> None:
    """Register the objectives and put the head in place of verl's.

    Raises:
        ImportError: verl is missing, or its version is not 0.9.
    """
    version = require("verl", at_least="0.9", below="0.10")
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
    from verl.utils.experimental import torch_functional

    for name in OBJECTIVES:
        register_policy_loss(f"grpo_fast_{name}")(policy_loss_of(name, agg_loss))
    torch_functional.FusedLinearForPPO = FusedLinearForPPO
    logger.info(
        "verl %s: the fused head of impl_backend torch and liger is grpo-fast's; policy losses grpo_fast_{%s}",
        version,
        ",".join(OBJECTIVES),
    )


if "verl" in sys.modules:  # verl is importing this, as VERL_USE_EXTERNAL_MODULES told it to
    install()
