"""Names that mypy knows: what it accepts, and what it has to refuse (`warn_unused_ignores`: else `make lint` fails).

Nothing here runs.
"""

from __future__ import annotations

from dataclasses import replace

from grpo_fast import Loss, LossConfig, Parameter, register_loss
from grpo_fast.config import ImportanceSamplingLevel, ImportanceSamplingMode, KlEstimator, LossType


def accepted(loss: Loss, kind: LossType, mode: ImportanceSamplingMode, level: ImportanceSamplingLevel) -> None:
    kl: KlEstimator = "k2"
    LossConfig(loss_type="dapo", importance_sampling_level="sequence", kl_estimator="k1")
    LossConfig(loss_type=kind, importance_sampling_mode=mode, importance_sampling_level=level, kl_estimator=kl)
    LossConfig(loss_type=register_loss(loss), parameters={"tau": 2.0}, importance_sampling_mode=None)
    replace(loss, aggregation="token_mean", reads=("importance",), kernel="sapo", couples="sequence", clip="none")


def refused(loss: Loss, name: str) -> None:
    LossConfig(loss_type="dap")  # type: ignore[arg-type]
    LossConfig(loss_type=name)  # type: ignore[arg-type]
    LossConfig(loss_type=loss)  # type: ignore[arg-type]
    LossConfig(importance_sampling_level="sentence")  # type: ignore[arg-type]
    LossConfig(kl_estimator="k4")  # type: ignore[arg-type]
    LossConfig(importance_sampling_mode="token")  # type: ignore[arg-type]
    LossConfig(parameters={"tau": "2"})  # type: ignore[dict-item]
    LossConfig(loss_typ="dapo")  # type: ignore[call-arg]
    LossConfig().loss_type = "dapo"  # type: ignore[misc]
    replace(loss, aggregation="mean")  # type: ignore[arg-type]
    replace(loss, reads=("entropy",))  # type: ignore[arg-type]
    replace(loss, couples="tokens")  # type: ignore[arg-type]
    replace(loss, clip="both")  # type: ignore[arg-type]
    replace(loss, kernel="dapo")  # type: ignore[arg-type]
    replace(loss, importance_sampling_modes=("token",))  # type: ignore[arg-type]
    Loss(name="forgetful")  # type: ignore[call-arg]
    Parameter(name="tau", doc="")  # type: ignore[call-arg]
    register_loss("dapo")  # type: ignore[arg-type]
