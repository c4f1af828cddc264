"""grpo-fast: the GRPO family of losses straight from hidden states and LM head, and a thin trainer.

    from grpo_fast import grpo_loss, token_logprobs, policy_loss, LossConfig, HeadConfig, Head, Support, Loss

Importing the package loads nothing; a name brings its room, and these need torch only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fast.config import HeadConfig, LossConfig, register_loss
    from grpo_fast.head import Head, head_of
    from grpo_fast.loss import grpo_loss, policy_loss, token_logprobs
    from grpo_fast.losses import Loss, Parameter, TermInputs
    from grpo_fast.packing import Support

__version__ = "0.1.0"
__all__ = [
    "Head",
    "HeadConfig",
    "Loss",
    "LossConfig",
    "Parameter",
    "Support",
    "TermInputs",
    "grpo_loss",
    "head_of",
    "policy_loss",
    "register_loss",
    "token_logprobs",
]

_ROOMS = {
    **dict.fromkeys(("Head", "head_of"), "head"),
    **dict.fromkeys(("HeadConfig", "LossConfig", "register_loss"), "config"),
    **dict.fromkeys(("Loss", "Parameter", "TermInputs"), "losses"),
    "Support": "packing",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'loss')}"), name)
