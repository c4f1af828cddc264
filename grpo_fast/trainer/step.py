"""One optimiser step: packs through the backbone, `grpo_loss` on their rows, gradients summed exactly, AdamW.

The denominator of the loss is the whole step's, so the gradient does not depend on how the step is cut into packs, nor
on completions whose gradient is known to be zero, which never reach the model. (One exception: `top_entropy_quantile`
takes its quantile within a pack.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from grpo_fast.config import LossConfig
from grpo_fast.loss import Metrics, grpo_loss, sparse_limit, token_logprobs
from grpo_fast.losses import CLIP_METRICS
from grpo_fast.objectives import needs_every_row, sequence_share
from grpo_fast.packing import Support
from grpo_fast.trainer.batch import Experience, MicroBatch, build_microbatches
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.errors import ConfigError
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.optim import MasterWeights, Optimizer
from grpo_fast.trainer.support import support_metrics, words_multiplied


class NonFiniteUpdate(Exception):  # noqa: N818 - the loop turns it into NonFiniteError, once the batch is saved
    """The loss or the gradient norm is NaN or infinite; nothing was applied.

    Attributes:
        metrics: of the step, as far as known.
    """

    def __init__(self, what: str, metrics: dict[str, float]) -> None:
        super().__init__(what)
        self.metrics = metrics


class Updater:
    """Trains `policy` on experiences.

    Args:
        policy: the model to train.
        config: of the run.
        reference: the frozen reference policy; None if `loss.beta` is 0 or under LoRA (adapter switched off).
    """

    def __init__(self, policy: Policy, config: TrainConfig, reference: Policy | None = None) -> None:
        self.policy = policy
        self.reference = reference
        self.weights = MasterWeights(policy.model, enabled=config.model.master_weights)
        self.optimizer = Optimizer(self.weights, config)
        self._config = config
        # Names of a recipe, which the loss checks.
        self._scoring: dict[str, Any] = {"backend": config.backend, "workspace_bytes": config.workspace_bytes}
        self._updating: dict[str, Any] = {**self._scoring, "plan": config.plan}
        self._try_loss()

    def prepare(self, experience: Experience, minibatches: Sequence[Sequence[int]]) -> None:
        """Fill in the logprobs that the experience's steps need besides the current ones.

        Those of the policy before its first step, if there will be several: with one step the current policy is the
        old one. Those of the reference, if `loss.beta` is not 0. Packs and supports are those of the updates, so that
        the numbers are comparable to the last bit.
        """
        num_steps = len(minibatches) * self._config.num_iterations
        if num_steps > 1:
            experience.old_logprobs = self._score(self.policy, experience, minibatches)
        if self._config.loss.beta != 0:
            if self.reference is not None:
                experience.ref_logprobs = self._score(self.reference, experience, minibatches)
            else:
                with self.policy.as_reference():
                    experience.ref_logprobs = self._score(self.policy, experience, minibatches)

    def gradients(self, experience: Experience, completions: Sequence[int]) -> dict[str, float]:
        """Compute the step's clipped gradients on some completions of `experience`; returns the step's metrics.

        Raises:
            NonFiniteUpdate: the loss or the gradient norm is not finite.
        """
        self.weights.start_step()
        packs = self._packs(experience, completions)
        self.policy.model.train()
        with self.policy.packing():
            parts = [self._backward(experience, pack, packs, completions) for pack in packs]
        self.policy.model.eval()
        metrics = self._merge(experience, completions, parts)
        metrics["padding_fraction"] = _weighted(
            [pack.layout.padding_fraction for pack in packs], [pack.layout.source.numel() for pack in packs]
        )
        metrics["num_microbatches"] = float(len(packs))
        metrics["update_flops"] = self._flops(experience, packs)
        metrics |= self._support_metrics(experience, completions)
        metrics["learning_rate"] = self.optimizer.learning_rate
        metrics["grad_norm"] = self.optimizer.clip()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise NonFiniteUpdate(f"{name} is {metrics[name]}", metrics)
        return metrics

    def apply(self) -> None:
        """Take the step whose gradients were computed last."""
        self.optimizer.step()

    def _flops(self, experience: Experience, packs: Sequence[MicroBatch]) -> float:
        """Floating-point operations of the matrix products of a step, attention not counted: 6 a weight and token, or
        4 where weights are frozen; of the head's weights those that a token's row is multiplied with."""
        factor = 4.0 if self.policy.is_lora else 6.0
        vocab, width = self.policy.head().weight.shape
        body = self.policy.num_parameters - vocab * width
        words = sum(pack.num_rows for pack in packs) * vocab
        if experience.support is not None:
            sizes, limit = experience.support.sizes_in(vocab), self._sparse_limit()
            words = sum(words_multiplied(sizes[pack.token_index], vocab, limit) for pack in packs)
        return factor * (body * sum(pack.input_ids.numel() for pack in packs) + width * words)

    def _sparse_limit(self) -> int:
        return sparse_limit(self.policy.head().weight, self._scoring["backend"])

    def _support_metrics(self, experience: Experience, completions: Sequence[int]) -> dict[str, float]:
        """Of the supports of some completions' tokens, and the host's memory that all take; none without supports."""
        support, spans = experience.support, [experience.span(number) for number in completions]
        if support is None or not any(spans):
            return {}
        index = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        sizes = support.sizes_in(self.policy.head().weight.shape[0])[index]
        return support_metrics(sizes, self._sparse_limit()) | {"support/host_mib": support.nbytes / 2**20}

    def _packs(self, experience: Experience, completions: Sequence[int]) -> list[MicroBatch]:
        """Micro-batches of the completions that can have a gradient."""
        every = needs_every_row(self._config.loss)
        kept = [
            number
            for number in completions
            if bool(experience.in_loss[number]) and (every or float(experience.advantages[number]) != 0)
        ]
        return build_microbatches(
            experience,
            kept,
            max_tokens=self._config.max_tokens_per_microbatch,
            implementation=self.policy.attention,
            device=self.policy.device,
        )

    def _backward(
        self, experience: Experience, pack: MicroBatch, packs: Sequence[MicroBatch], completions: Sequence[int]
    ) -> Metrics:
        """Forward and backward of one pack; the loss's metrics."""
        states = pack.states(self.policy.model)
        head = self.policy.head()
        output = grpo_loss(
            states,
            head,
            pack.targets,
            cu_seqlens=pack.cu_seqlens,
            **pack.loss_inputs(experience),
            support=pack.support,
            config=self._config.loss,
            normalizer=self._normalizer(experience, completions),
            entropy_normalizer=self._entropy_normalizer(packs),
            ignore_index=None,  # a pack's rows are completion tokens, all of them: nothing to wait for
            main_grad=self.weights.main_grad(head.weight),
            **self._updating,
        )
        output.loss.backward()
        return output.metrics

    def _try_loss(self) -> None:
        """Run the loss on one token and eight words, so that a backend or plan that cannot serve says so now.

        Where there will be supports: on two tokens and more words, one of either kind that supports make of rows.

        Raises:
            ConfigError: it cannot.
        """
        head, num_words, support = self.policy.head(), 8, None
        device = head.weight.device
        if self._config.records_support:
            num_words = min(1024, head.weight.shape[0])
            ids = torch.cat([torch.arange(2), torch.arange(num_words - 1)]).int()
            support = Support(ids, torch.tensor([0, 2, num_words + 1])).to(device)
        num_tokens = 1 if support is None else support.num_rows
        weight = head.weight.detach()[:num_words].clone().requires_grad_(head.weight.requires_grad)
        zero = torch.zeros(num_tokens, device=device)
        try:
            grpo_loss(
                torch.zeros(num_tokens, weight.shape[1], dtype=weight.dtype, device=device, requires_grad=True),
                weight,
                torch.zeros(num_tokens, dtype=torch.int64, device=device),
                torch.ones(1, device=device),
                cu_seqlens=torch.tensor([0, num_tokens], device=device),
                ref_logprobs=zero,
                sampling_logprobs=zero,
                support=support,
                bias=None if head.bias is None else head.bias.detach()[:num_words],
                head=head.config,
                config=self._config.loss,
                **self._updating,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _normalizer(self, experience: Experience, completions: Sequence[int]) -> float:
        """The loss type's denominator over the whole step, completions without a gradient included."""
        loss: LossConfig = self._config.loss
        if loss.record.aggregation == "token_mean":
            return float(max(_num_tokens(experience, completions), 1))
        return float(len(completions) * sequence_share(loss))

    def _entropy_normalizer(self, packs: Sequence[MicroBatch]) -> float | None:
        """What the entropy bonus divides by: the tokens of the step that it acts on.

        With a quantile these are, in each pack, the tokens from the (n - 1)(1 - quantile)th smallest entropy on; those
        that equal it, as completions' first tokens may, are more than are counted here.
        """
        loss: LossConfig = self._config.loss
        if loss.entropy_coef == 0:
            return None
        below = 1 - loss.top_entropy_quantile
        return float(max(sum(pack.num_rows - math.ceil((pack.num_rows - 1) * below) for pack in packs), 1))

    def _merge(self, experience: Experience, completions: Sequence[int], parts: Sequence[Metrics]) -> dict[str, float]:
        """The loss's metrics of all packs; shares are of all the step's tokens, means of those computed."""
        if not parts:  # every advantage is zero
            return {"loss": 0.0, "active_row_fraction": 0.0}
        metrics = Metrics.merge(list(parts)).as_dict()
        num_tokens, num_sequences = metrics.pop("num_active_tokens"), metrics.pop("num_sequences")
        if self._config.loss.importance_sampling_level == "sequence":
            clip_share = num_sequences / len(completions)
        else:
            clip_share = num_tokens / max(_num_tokens(experience, completions), 1)
        for name in CLIP_METRICS[self._config.loss.record.clip]:
            if not name.endswith(("_min", "_max")):
                metrics[name] *= clip_share
        metrics["active_row_fraction"] *= num_tokens / max(_num_tokens(experience, completions), 1)
        return metrics

    @torch.no_grad()
    def _score(self, policy: Policy, experience: Experience, minibatches: Sequence[Sequence[int]]) -> torch.Tensor:
        """`[N]` logprobs of the experience's tokens under `policy`; NaN where no step will ask."""
        index, found = [], []
        with policy.packing():
            for completions in minibatches:
                for pack in self._packs(experience, completions):
                    states = pack.states(policy.model)
                    result = token_logprobs(
                        states,
                        policy.head(),
                        pack.targets,
                        config=self._config.loss,
                        support=pack.support,
                        ignore_index=None,
                        entropy=False,
                        **self._scoring,
                    )
                    index.append(pack.token_index)
                    found.append(result.logprobs)
        scored = torch.full_like(experience.sampling_logprobs, torch.nan)
        if found:
            scored[torch.cat(index)] = torch.cat(found).to(scored.device)  # the device's results in one copy
        return scored


def _num_tokens(experience: Experience, completions: Sequence[int]) -> int:
    """Tokens of the completions that may carry loss."""
    lengths = experience.token_bounds.diff() * experience.in_loss
    return int(lengths[torch.tensor(list(completions), dtype=torch.int64)].sum())


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else 0.0
