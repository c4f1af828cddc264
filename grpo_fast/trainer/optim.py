"""AdamW on float32 master weights, with gradients summed in float32 while the model computes in 16 bit.

A 16-bit weight cannot take small updates: bfloat16 keeps 8 bits, so a relative change below 1/256 is lost, and at
lr 1e-6 nearly all of them are. Hence a float32 master per 16-bit parameter. A hook moves each micro-batch's 16-bit
gradient into the master's float32 gradient as soon as autograd has it and frees it; the LM head's gradient never is
16 bit: `grpo_loss(main_grad=...)` adds it to the same buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.errors import ConfigError


class MasterWeights:
    """The trainable parameters of `model`, their masters and their gradients.

    Parameters of 32 bits, and all of them with `enabled=False`, are their own masters.

    Args:
        model: its parameters with `requires_grad` are trained.
        enabled: keep float32 masters of 16-bit parameters.
    """

    def __init__(self, model: nn.Module, *, enabled: bool) -> None:
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self.masters: list[Tensor] = []
        self._of: dict[int, Tensor] = {}
        # Gradient buffers are kept from step to step. A buffer outside this set holds the last step's sum: the first
        # gradient of a step is written over it, which saves zeroing and re-reading 4 bytes a weight.
        self._written: set[int] = set()
        self._hooks: list[Any] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            self.names.append(name)
            self.parameters.append(parameter)
            if enabled and parameter.dtype in (torch.bfloat16, torch.float16):
                master = parameter.detach().float()
                master.grad = torch.zeros_like(master)
                self._of[id(parameter)] = master
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._collect))
            else:
                master = parameter
            self.masters.append(master)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and masters, in the model's order."""
        return iter(zip(self.names, self.masters, strict=True))

    def main_grad(self, parameter: Tensor) -> Tensor | None:
        """The float32 buffer into which gradients of `parameter` may be added directly; None if it has no master."""
        master = self._of.get(id(parameter))
        if master is None:
            return None
        assert master.grad is not None
        if id(parameter) not in self._written:
            master.grad.zero_()
            self._written.add(id(parameter))
        return master.grad

    def start_step(self) -> None:
        """Forget all gradients."""
        self._written.clear()
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """All gradients, once the step's last micro-batch is done. Parameters that got none have zero: AdamW would
        skip them, and a batch whose rewards are all equal is no reason for its momentum to stop."""
        found = []
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            elif id(parameter) in self._of and id(parameter) not in self._written:
                master.grad.zero_()
            found.append(master.grad)
        return found

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's parameters."""
        pairs = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    def _collect(self, parameter: Tensor) -> None:
        master = self._of[id(parameter)]
        assert master.grad is not None
        assert parameter.grad is not None
        if id(parameter) in self._written:
            _add_widened(master.grad, parameter.grad)
        else:
            master.grad.copy_(parameter.grad)
            self._written.add(id(parameter))
        parameter.grad = None


def _add_widened(total: Tensor, part: Tensor) -> None:
    """total float32 += part. A CPU first widens `part` into a temporary: by pieces none is as large as a gradient."""
    if total.device.type != "cpu" or total.numel() <= _PIECE:
        total.add_(part)
        return
    for whole, piece in zip(total.flatten().split(_PIECE), part.flatten().split(_PIECE), strict=True):
        whole.add_(piece)


_PIECE = 2**18


class Optimizer:
    """AdamW with clipping and a learning-rate schedule over `MasterWeights`.

    Raises:
        ConfigError: the schedule's name is not known, or no parameter is trainable.
    """

    def __init__(self, weights: MasterWeights, config: TrainConfig) -> None:
        if not weights.masters:
            raise ConfigError("model: expected trainable parameters; got none")
        self.weights = weights
        self.max_grad_norm = config.max_grad_norm
        decayed = [master for master in weights.masters if master.dim() >= 2]
        other = [master for master in weights.masters if master.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": other, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        self.schedule = _schedule(self.adamw, config)

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        return float(self.schedule.get_last_lr()[0])

    def clip(self) -> float:
        """Scale the gradients down to `max_grad_norm`; returns their norm before that (one device sync)."""
        gradients = self.weights.gradients()
        norm = torch.nn.utils.get_total_norm(gradients)
        value = float(norm)
        if 0 < self.max_grad_norm < value and math.isfinite(value):
            torch._foreach_mul_(gradients, self.max_grad_norm / (value + 1e-6))
        return value

    def step(self) -> None:
        """One AdamW step with the gradients as they are; the model's weights follow."""
        self.adamw.step()
        self.schedule.step()
        self.weights.publish()

    def tensors(self) -> dict[str, Tensor]:
        """Masters and moments, named `<kind>/<parameter>`, kinds `weight`, `exp_avg`, `exp_avg_sq`, `step`."""
        found: dict[str, Tensor] = {}
        for name, master in self.weights:
            found[f"weight/{name}"] = master.detach()
            for kind, value in self.adamw.state.get(master, {}).items():
                found[f"{kind}/{name}"] = value
        return found

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors()`.

        Raises:
            ValueError: names or shapes are not this model's.
        """
        kinds = ("exp_avg", "exp_avg_sq", "step")
        for name, master in self.weights:
            saved = tensors.get(f"weight/{name}")
            if saved is None or saved.shape != master.shape:
                came = "none" if saved is None else list(saved.shape)
                raise ValueError(f"{name}: expected a tensor of shape {list(master.shape)}; got {came}")
            master.copy_(saved)
            state = {kind: tensors[f"{kind}/{name}"] for kind in kinds if f"{kind}/{name}" in tensors}
            if state:
                # The fused AdamW keeps its step counter where the weights are.
                self.adamw.state[master] = {
                    kind: torch.empty_like(value, device=master.device).copy_(value) for kind, value in state.items()
                }
        self.weights.publish()

    def go_to(self, step: int) -> None:
        """Set the schedule to where it is after `step` steps."""
        rates = [
            base * scale(step) for base, scale in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        ]
        self.schedule.last_epoch = step
        self.schedule._step_count = step + 1
        self.schedule._last_lr = rates
        for group, rate in zip(self.adamw.param_groups, rates, strict=True):
            group["lr"] = rate


def _schedule(adamw: torch.optim.Optimizer, config: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule named `lr_scheduler_type` over `max_steps`."""
    from transformers import get_scheduler
    from transformers.trainer_utils import SchedulerType

    names = [kind.value for kind in SchedulerType]
    if config.lr_scheduler_type not in names:
        raise ConfigError(f"lr_scheduler_type: expected one of {', '.join(names)}; got {config.lr_scheduler_type!r}")
    try:
        schedule = get_scheduler(
            config.lr_scheduler_type,
            adamw,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=max(config.max_steps, 1),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lr_scheduler_type: {config.lr_scheduler_type} cannot be used here: {error}") from error
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        raise ConfigError(f"lr_scheduler_type: {config.lr_scheduler_type} is not a function of the step alone")
    return schedule
