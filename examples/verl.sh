#!/usr/bin/env bash
# verl 0.9 with grpo-fast's LM head and objectives. Every worker imports what the variable names; further arguments are
# verl's own (data, model, rollout): bash examples/verl.sh data.train_files=... actor_rollout_ref.model.path=...
set -euo pipefail
export VERL_USE_EXTERNAL_MODULES=grpo_fast.integrations.verl
exec python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    actor_rollout_ref.model.use_fused_kernels=True \
    actor_rollout_ref.model.fused_kernel_options.impl_backend=torch \
    actor_rollout_ref.actor.policy_loss.loss_mode=grpo_fast_vespo \
    "$@"
