"""NeMo-RL with grpo-fast's objectives: what a copy of `examples/run_grpo.py` does after its `setup`.

The loss takes the place of the ClippedPGLossFn that `setup` returns; everything else is NeMo-RL's script.
"""

from grpo_fast.config import LossConfig
from grpo_fast.integrations.nemo_rl import GRPOFastLoss

loss_fn = GRPOFastLoss(LossConfig(loss_type="cispo", epsilon_high=2.0))

if __name__ == "__main__":
    print(f"pass loss_fn to nemo_rl.algorithms.grpo.grpo_train: {loss_fn.config}, token level: {loss_fn.token_level}")
