"""grpo-fast: the GRPO family of losses straight from hidden states and LM head, and a thin trainer.

The rooms are imported by name (`from grpo_fast.loss import grpo_loss`): importing the package itself loads nothing, and
a trainer that only wants the loss never loads transformers.
"""

__version__ = "0.1.0"
