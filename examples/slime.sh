#!/usr/bin/env bash
# slime with grpo-fast's objectives; further arguments are slime's own (model, rollout, parallelism).
set -euo pipefail
exec python train.py \
    --loss-type custom_loss \
    --custom-loss-function-path grpo_fast.integrations.slime.policy_loss \
    --advantage-estimator gspo --eps-clip 3e-4 --eps-clip-high 4e-4 \
    "$@"
