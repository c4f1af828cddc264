"""One LM head, one call: which rows to run, the operands in the operators' form, and the chosen plan.

Legend: T packed tokens, S sequences, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_fast.backends.base import get_backend
from grpo_fast.backends.devices import traits
from grpo_fast.backends.groups import ActiveRows
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.objectives import Tokens
from grpo_fast.ops.functions import FusedObjective, HeadArgs, Logprobs, forward_op
from grpo_fast.ops.planner import Demand, choose_plan, default_workspace_bytes, report, row_budget
from grpo_fast.ops.workspace import active_rows


def computed_tokens(tokens: Tokens, active: Tensor) -> Tokens:
    """The tokens with only the computed ones unmasked; the rest must not reach an exponential."""
    return replace(tokens, mask=active, **tokens.optional(lambda values: torch.where(active, values, 0.0)))


@dataclass
class HeadLaunch:
    """The LM head's operands in the operators' form, and the plan once `choose` has run."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    args: HeadArgs
    active: ActiveRows | None
    plan: str = ""

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        active: ActiveRows | None,
        temperature: float | Tensor,
        head: HeadConfig,
        backend: str,
        workspace_bytes: int | None,
    ) -> HeadLaunch:
        """Args: backend: its name, resolved. temperature: a float, or `[T]`."""
        row_temperature = _savable(temperature.reshape(-1)) if isinstance(temperature, Tensor) else None
        args = HeadArgs(
            targets=_savable(targets),
            row_temperature=row_temperature,
            active=None if active is None else active.mask,
            rows=None,
            temperature=1.0 if isinstance(temperature, Tensor) else float(temperature),
            logit_scale=float(head.logit_scale),
            softcap=None if head.softcap is None else float(head.softcap),
            backend=backend,
            workspace_bytes=default_workspace_bytes(hidden.device) if workspace_bytes is None else workspace_bytes,
        )
        return HeadLaunch(hidden.reshape(-1, hidden.shape[-1]), weight, bias, args, active)

    def row_counts(self, tokens: Tokens) -> list[int] | None:
        """Computed rows of each sequence, on the host (a GPU is waited for once); None while compiling."""
        if torch.compiler.is_compiling():
            return None
        counts: list[int] = tokens.segments.sum(tokens.mask if self.active is None else self.active.mask).tolist()
        if self.active is not None:
            self.args = self.args._replace(rows=self._listed(self.active, sum(counts)))
        return counts

    @staticmethod
    def _listed(active: ActiveRows, num_rows: int = -1) -> Tensor | None:
        """Indices `[n]` of the rows; a GPU is waited for, once, unless the host knows how many there are.

        None where the operators may as well find them: they need not wait for a CPU.
        """
        if active.listed is not None:
            index, count = active.listed
            return index[: int(count) if num_rows < 0 else num_rows]
        if not traits(active.mask.device).asynchronous:
            return None
        return active_rows(active.mask, int(active.mask.sum()) if num_rows < 0 else num_rows)

    def choose(
        self, plan: str, *, couples_tokens: bool, couples_sequences: bool, entropy_grad: bool, longest: int | None
    ) -> None:
        """Set `plan`."""
        grad = torch.is_grad_enabled()
        needs_weight = grad and (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad))
        demand = Demand(
            needs_grad=grad and (needs_weight or self.hidden.requires_grad),
            needs_weight_grad=needs_weight,
            couples_tokens=couples_tokens,
            couples_sequences=couples_sequences,
            entropy_grad=entropy_grad,
            longest=longest,
            fused_forward=plan == "fused_forward" and get_backend(self.args.backend).has_fused_forward,
        )
        weight = self.weight
        budget = row_budget(self.args.backend, *weight.shape, weight.dtype, weight.device, self.args.workspace_bytes)
        self.plan = choose_plan(plan, demand, budget)
        if not torch.compiler.is_compiling():
            report(self.plan, self.args.backend, weight, budget)
            if self.active is not None and self.args.rows is None:
                self.args = self.args._replace(rows=self._listed(self.active))

    def logprobs(self, main_grad: Tensor | None) -> tuple[Tensor, Tensor]:
        """(logprobs, entropy) `[T]`, differentiable unless the plan is `forward` or `fused_forward`."""
        if self.plan.endswith("forward"):
            weight, bias = self.weight.detach(), _detached(self.bias)
            return forward_op(self.hidden.detach(), weight, bias, *self.args, self.plan)[:2]
        result: tuple[Tensor, Tensor] = Logprobs.apply(
            self.hidden, self.weight, self.bias, main_grad, self.plan, *self.args
        )
        return result

    def fused(
        self,
        tokens: Tokens,
        weights: Tensor,
        config: LossConfig,
        row_counts: list[int] | None,
        main_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logprobs, entropy), with the gradients computed on the way."""
        result: tuple[Tensor, Tensor, Tensor] = FusedObjective.apply(
            self.hidden,
            self.weight,
            self.bias,
            main_grad,
            *self.args,
            config.key,
            weights,
            tokens.advantages,
            tokens.bonus_count,
            tokens.segments.cu_seqlens,
            row_counts,
            tokens.old_logprobs,
            tokens.ref_logprobs,
            tokens.sampling_logprobs,
            tokens.importance,
        )
        return result


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _savable(tensor: Tensor) -> Tensor:
    """A rollout's tensors may be of `torch.inference_mode`, which autograd does not save: then a copy."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()
