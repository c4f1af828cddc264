"""grpo-fast as NeMo-RL's `LossFunction`, on log-probabilities.

    from grpo_fast.integrations.nemo_rl import GRPOFastLoss
    loss_fn = GRPOFastLoss(LossConfig(loss_type="vespo"))       # where a recipe makes its ClippedPGLossFn

Shaped after `nemo_rl.algorithms.loss`; it was not run with NeMo-RL itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.loss import policy_loss
from grpo_fast.objectives import reads_sampling


class GRPOFastLoss:
    """A loss of the family; losses that average over tokens are token level, the others sequence level.

    Raises:
        ValueError: dr_grpo, whose denominator NeMo-RL has no place for.
    """

    def __init__(self, config: LossConfig = LossConfig()) -> None:
        if config.record.aggregation == "constant_length":
            expected = "one that averages over NeMo-RL's tokens or sequences"
            raise ValueError(f"loss_type: expected {expected}; got {config.loss_type!r}")
        self.config = config
        self.token_level = config.record.aggregation == "token_mean"

    @property
    def loss_type(self) -> Any:
        """NeMo-RL's `LossType`."""
        from nemo_rl.algorithms.loss.interfaces import LossType

        return LossType.TOKEN_LEVEL if self.token_level else LossType.SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        """NeMo-RL's `LossInputType`."""
        from nemo_rl.algorithms.loss.interfaces import LossInputType

        return LossInputType.LOGPROB

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        **unused: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss, metrics) of a micro-batch: its share of the global batch's loss.

        Args:
            next_token_logprobs: `[B, S-1]`. data: `token_mask`, `advantages`, `prev_logprobs`, `generation_logprobs`
                and, with beta, `reference_policy_logprobs`, each `[B, S]`; `sample_mask` `[B]`.
        """
        config = self.config
        mask = (data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)) != 0
        out = policy_loss(
            next_token_logprobs,
            data["advantages"][:, 1:],
            loss_mask=mask,
            old_logprobs=data["prev_logprobs"][:, 1:],
            ref_logprobs=data["reference_policy_logprobs"][:, 1:] if config.beta != 0 else None,
            sampling_logprobs=data["generation_logprobs"][:, 1:] if reads_sampling(config) else None,
            config=config,
            normalizer=global_valid_toks if self.token_level else global_valid_seqs,
        )
        return out.loss, out.metrics.as_dict() | {"num_valid_samples": data["sample_mask"].sum().item()}
