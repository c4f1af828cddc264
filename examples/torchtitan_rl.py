"""torchtitan's experiments/rl with grpo-fast's objectives: a loss for its trainer's configuration.

config.trainer.loss = grpo_fast_loss()        # in a config of torchtitan/experiments/rl/config_registry.py
"""

from typing import Any

from grpo_fast.config import LossConfig


def grpo_fast_loss() -> Any:
    """A `BaseLoss.Config`: CISPO, which has no clipped tokens without gradient."""
    from grpo_fast.integrations.torchtitan import GRPOFastLoss

    return GRPOFastLoss.Config(objective=LossConfig(loss_type="cispo", epsilon_high=2.0))


if __name__ == "__main__":
    print(grpo_fast_loss())
