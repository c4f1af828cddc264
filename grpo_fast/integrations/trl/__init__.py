"""grpo-fast inside TRL's `GRPOTrainer`, versions 1.13 to 1.16.

    from grpo_fast.integrations.trl import GRPOTrainer          # in place of: from trl import GRPOTrainer
    trainer = accelerate_trainer(trainer)                       # or: a trainer, or subclass, that you already have

Sampling, rewards, advantages, logging, checkpoints and every option stay TRL's. What changes is the LM head, at one of
two depths (`trainer.grpo_fast.depth` and `.reason`, also logged once):

- `logprobs`: log-probabilities and entropies of policy, old policy and reference come from `token_logprobs`, inside the
  model's forward. Always; under it TRL's loss, or a subclass's, is what it was.
- `loss`: in training steps the gradient is `grpo_loss`'s: three products where `logprobs` needs four, as it computes
  the logits again in the backward. TRL's `_compute_loss` still runs, on the resulting log-probabilities and entropies,
  for the metrics and the loss's value. Taken where nothing of TRL's loss is overridden.

Where TRL's sampling truncates (`top_p`, `top_k`, `min_p` and the like) and transformers' `generate` does it, the tokens
kept at each place are recorded; log-probabilities, entropies and the loss are then of the distribution on them
(`docs/support.md`), the one that was sampled from. `accelerate_trainer(trainer, support="off")`, or
`trainer.grpo_fast.support = "off"`, scores over the whole vocabulary, as TRL does. Nothing is recorded of vLLM, of
continuous batching, or in a subclass with scoring of its own; a batch in which a tool led to another turn is scored
over the whole vocabulary. The log has `support/mean` and the like. An engine that knows what it kept says it through
TRL's `rollout_func`, under "support":

    def rollout(prompts, trainer):                                      # an entry a completion: id lists, a bool mask
        ...                                                             # [n, V], ids padded with -1, or a Support
        return {"prompt_ids": ..., "completion_ids": ..., "logprobs": ..., "support": supports}

TRL 1.13 and 1.14 with `use_liger_kernel=True` are refused: there it replaces the very head and loss this replaces.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch

from grpo_fast.integrations.lm_head import FusedHead, Objective, fuse_lm_head
from grpo_fast.integrations.trl.inputs import model_inputs
from grpo_fast.integrations.trl.options import loss_config, neutral_where_masked, objective_of
from grpo_fast.integrations.trl.support import COLUMN, Supports, measures, padded, recorded
from grpo_fast.integrations.versions import release, require

VERSION = require("trl", at_least="1.13", below="1.17")

from trl.extras.profiling import profiling_decorator  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer as _TRLTrainer  # noqa: E402

__all__ = ["Acceleration", "GRPOTrainer", "accelerate_trainer"]

logger = logging.getLogger("grpo_fast")

_SCORING = "_get_per_token_logps_and_entropies"
# What the fused loss takes the place of: a subclass with its own keeps it, at depth `logprobs`.
_LOSS_METHODS = ("_compute_loss", _SCORING, "get_off_policy_mask", "get_gamma_weights", "get_high_entropy_mask")


class Acceleration:
    """What grpo-fast does in a trainer; `trainer.grpo_fast`.

    Attributes:
        depth: "loss" or "logprobs". reason: why.
        policy, reference: the models' heads; `policy.last` tells plan and backend of the latest fused loss.
        support: "auto": log-probabilities are on what the sampler kept, where that is known; "off": they never are.
            May be changed between steps.
    """

    def __init__(
        self, trainer: Any, *, backend: str, workspace_bytes: int | None, support: Literal["auto", "off"] = "auto"
    ) -> None:
        if support not in ("auto", "off"):
            raise ValueError(f"support: expected auto or off; got {support!r}")
        if getattr(trainer, "use_liger_kernel", False):
            raise ValueError(
                f"use_liger_kernel: expected False, as in TRL {VERSION} it replaces the LM head and the loss that "
                "grpo-fast replaces; got True. TRL 1.15 and later can have both."
            )
        options: dict[str, Any] = {
            "temperature": trainer.temperature,
            "cast_to_fp32": trainer.args.cast_lm_head_to_fp32,
            "backend": backend,
            "workspace_bytes": workspace_bytes,
        }
        unwrap = trainer.accelerator.unwrap_model
        self.lm: Any = unwrap(trainer.model)
        self.policy: FusedHead = fuse_lm_head(self.lm, **options)
        if hasattr(self.lm, "peft_config"):
            self.lm = self.lm.get_base_model()
        self.reference: FusedHead | None = None
        if getattr(trainer, "ref_model", None) is not None:  # the same model, but wrapped, maybe sharded already
            self.reference = fuse_lm_head(unwrap(trainer.ref_model), config=self.policy.config, **options)
        obstacle = _obstacle(trainer)
        self.depth = "loss" if obstacle is None else "logprobs"
        self.reason = obstacle or "nothing of TRL's loss is overridden, and grpo_loss knows all of its options"
        self.objective: Objective | None = None  # of the loss being computed
        self.loss: torch.Tensor | None = None
        scoring = _own(trainer, [_SCORING])  # which would not pass supports on
        self.support = "off" if scoring else support
        self.supports = Supports()
        logger.info("TRL %s, %s: depth %r, as %s", VERSION, type(trainer).__name__, self.depth, self.reason)


class _Accelerated:
    """The methods of TRL's trainer that grpo-fast replaces: two that score, three that watch what is sampled."""

    grpo_fast: Acceleration
    accelerator: Any
    model: Any
    use_vllm: bool
    _metrics: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grpo_fast = Acceleration(self, backend="auto", workspace_bytes=None)

    @profiling_decorator
    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(log-probabilities, entropies, router loss) of the last `logits_to_keep` tokens, `[B, C]`; see TRL."""
        state, total = self.grpo_fast, input_ids.shape[0]
        size = batch_size or total
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :-logits_to_keep] = -100
        supports = state.supports.current
        if supports is not None and len(supports) != total:
            raise ValueError(f"support: expected {total} entries, one a completion; got {len(supports)}")
        outputs = []
        for start in range(0, total, size):
            end = min(start + size, total)
            inputs = model_inputs(multimodal, start, end, total)
            inputs |= {"input_ids": input_ids[start:end], "attention_mask": attention_mask[start:end]}
            if compute_aux_loss:
                inputs["output_router_logits"] = True
            if supports is not None:
                inputs["support"] = padded(supports[start:end], logits_to_keep)
            with self.accelerator.autocast():
                outputs.append(model(**inputs, labels=labels[start:end], fused_lm_head=state.objective or True))
        if state.objective is not None:
            state.loss = outputs[0].loss
        logprobs = torch.cat([output.log_probs[:, -logits_to_keep:] for output in outputs])
        entropies = torch.cat([output.entropy[:, -logits_to_keep:] for output in outputs]) if compute_entropy else None
        aux_loss = torch.stack([output.aux_loss for output in outputs]).mean() if compute_aux_loss else None
        return logprobs, entropies, aux_loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        state = getattr(self, "grpo_fast", None)
        if state is None:  # called unbound, on a stand-in for a trainer
            return _TRLTrainer._compute_loss(self, model, inputs)  # type: ignore[no-any-return]
        state.supports.current = inputs.get(COLUMN)
        try:
            return self._supported_loss(model, inputs)
        finally:
            state.supports.clear()

    def _supported_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        state = self.grpo_fast
        if state.depth != "loss" or not (self.model.training and torch.is_grad_enabled()):
            return super()._compute_loss(model, inputs)  # type: ignore[misc,no-any-return]
        inputs = neutral_where_masked(inputs)
        state.objective, state.loss = objective_of(self, inputs, temperature=state.policy.temperature), None
        try:
            value = super()._compute_loss(model, inputs)  # type: ignore[misc]
        finally:
            state.objective, loss, state.loss = None, state.loss, None
        assert loss is not None
        # TRL's own number; where it has a gradient that is the router's. The policy's is ours.
        return value + (loss - loss.detach()).to(value.device)  # type: ignore[no-any-return]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        state = self.grpo_fast
        with recorded(state.lm) if self._records() else nullcontext() as recorder:
            result = super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]
        if recorder is not None:
            state.supports.add_turn(result[0], recorder)
        return result

    def _generate(self, prompts: Any) -> Any:
        state = self.grpo_fast
        state.supports.clear()
        result = super()._generate(prompts)  # type: ignore[misc]
        told = [fields.pop(COLUMN) for fields in result if isinstance(fields, dict) and COLUMN in fields]
        if state.support == "auto":
            state.supports.settle(result[1], told[0] if told else None)
        if state.supports.current is not None:
            sizes = measures(state.supports.current, state.lm.config.get_text_config().vocab_size)
            for name, value in sizes.items():
                self._metrics["train" if self.model.training else "eval"][name].append(value)
        return result

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        state = getattr(self, "grpo_fast", None)
        if state is None:
            return _TRLTrainer._generate_and_score_completions(self, inputs)
        state.supports.clear()
        try:
            output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
            return output if state.supports.current is None else output | {COLUMN: state.supports.current}
        finally:
            state.supports.clear()

    def _records(self) -> bool:
        """Whether `generate` is watched: it is transformers' own, which makes its tokens one step after another."""
        batching = ("use_transformers_continuous_batching", "use_transformers_paged")  # its name, and an older one
        others = self.use_vllm or any(getattr(self, name, False) for name in batching)
        return self.grpo_fast.support == "auto" and not others


class GRPOTrainer(_Accelerated, _TRLTrainer):  # type: ignore[misc]
    """TRL's `GRPOTrainer` with grpo-fast's LM head and loss; arguments, options and logs are TRL's.

    Raises:
        ValueError: the model's LM head cannot be expressed, or an option contradicts (the message names it).
    """


def accelerate_trainer(
    trainer: Any,
    *,
    backend: str = "auto",
    workspace_bytes: int | None = None,
    support: Literal["auto", "off"] = "auto",
) -> Any:
    """Give an existing TRL `GRPOTrainer`, of whatever subclass, grpo-fast's LM head and, where it may, loss.

    Call it before `train()`, as wrappers that training puts around the model have to see the new forward.

    Args:
        trainer: an instance, which is changed, or a class, of which a subclass is returned.
        backend, workspace_bytes: as in `grpo_loss`; for instances.
        support: "off" leaves aside what the sampler kept (see the module); for instances.

    Returns:
        The trainer (or class).

    Raises:
        ValueError: not a GRPOTrainer, one that cannot be accelerated (the message says why), or as `GRPOTrainer`.
    """
    cls = trainer if isinstance(trainer, type) else type(trainer)
    if not issubclass(cls, _TRLTrainer):
        raise ValueError(f"trainer: expected a trl.GRPOTrainer or a class derived from it; got {cls.__name__}")
    if issubclass(cls, _Accelerated):
        return trainer
    own: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    if _owner(cls, _SCORING) is not _TRLTrainer:
        if release(VERSION) < (1, 15):
            raise ValueError(
                f"trainer: {cls.__name__} has its own {_SCORING}, which in TRL {VERSION} works on logits that this "
                "would not make. Derive it from grpo_fast.integrations.trl.GRPOTrainer, or use TRL 1.15 or later."
            )
        own[_SCORING] = getattr(cls, _SCORING)  # asks the model's forward, which is ours
    accelerated = type(cls.__name__, (_Accelerated, cls), own)
    if isinstance(trainer, type):
        return accelerated
    trainer.grpo_fast = Acceleration(trainer, backend=backend, workspace_bytes=workspace_bytes, support=support)
    trainer.__class__ = accelerated
    return trainer


def _owner(cls: type, name: str) -> type | None:
    """The class that defines `name`, `_Accelerated` left out."""
    return next((base for base in cls.__mro__ if name in vars(base) and base is not _Accelerated), None)


def _own(trainer: Any, names: Iterable[str]) -> str | None:
    """The first of `names` that a subclass, or the instance, has in place of TRL's method."""
    return next(
        (name for name in names if _owner(type(trainer), name) is not _TRLTrainer or name in vars(trainer)), None
    )


def _obstacle(trainer: Any) -> str | None:
    """Why the loss stays TRL's, or None."""
    cls = type(trainer)
    names = list(_LOSS_METHODS)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        names.append("_generate_and_score_completions")  # grpo_loss computes the correction itself
    own = _own(trainer, names)
    if own is not None:
        return f"{cls.__name__} has its own {own}"
    try:
        loss_config(trainer, temperature=1.0)
    except ValueError as error:
        return f"grpo_loss does not take these options ({error})"
    return None
