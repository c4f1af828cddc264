"""Errors that a user can mend: the command line prints them as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program is wrong; the message says what was expected, what came, and what to do."""


class ConfigError(UserError, ValueError):
    """A recipe or an override: unknown key, wrong type, value out of range, options that contradict each other."""


class ModelError(UserError):
    """The model or its tokenizer cannot be found, loaded or used."""


class DataError(UserError, ValueError):
    """The data set is missing, empty, or has not the columns asked for."""


class RewardError(UserError):
    """A reward function cannot be found, raised, or returned something other than one number a completion."""


class CheckpointError(UserError):
    """A checkpoint is missing or incomplete, or belongs to another run."""


class NonFiniteError(UserError):
    """The loss or the gradient is NaN or infinite; the step and its batch were saved where the message says."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop and its state is saved
    """The run was stopped by SIGINT or SIGTERM after its state had been saved.

    Attributes:
        resume: the `key=value` override that continues the run.
        step: the last completed step.
    """

    def __init__(self, step: int, resume: str) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
        self.resume = resume
