"""grpo-fast inside the trainers people already run: one module a framework, each imported by its own name.

    grpo_fast.integrations.lm_head         any Hugging Face model, inside its own (wrapped) forward
    grpo_fast.integrations.trl             TRL 1.13 to 1.16: GRPOTrainer, accelerate_trainer
    grpo_fast.integrations.verl            verl 0.9: VERL_USE_EXTERNAL_MODULES=grpo_fast.integrations.verl
    grpo_fast.integrations.prime_rl        a custom loss, over log-probabilities
    grpo_fast.integrations.nemo_rl         a LossFunction, over log-probabilities
    grpo_fast.integrations.torchtitan      a loss config, over log-probabilities
    grpo_fast.integrations.slime           a custom loss, over log-probabilities
    grpo_fast.integrations.openrlhf        a PolicyLoss, over log-probabilities

Importing this package loads none of them. What was run with which versions stands in the README's table.
"""
