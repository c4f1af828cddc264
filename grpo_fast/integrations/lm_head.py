"""A Hugging Face language model whose own forward gives log-probabilities, or the loss, instead of logits.

    fuse_lm_head(model)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)      # out.log_probs, .entropy
    out = model(..., labels=labels, fused_lm_head=Objective(advantages, mask, config=...))  # out.loss besides

Everything happens inside the model's forward, so wrappers do their work around it: DDP reduces gradients, FSDP gathers
parameters, autocast is in force, peft's adapters and prompts are in place. Without `fused_lm_head` the forward is the
one it was. A head sharded on its own (an FSDP2 DTensor, DeepSpeed ZeRO-3) is gathered for the call.

`support=Support(...)` beside it says which tokens each label was sampled from: rows as in `labels`, flattened, or as
many of the last ones of every sequence; the others' are the whole vocabulary.

The keyword `fused_lm_head` and the fields of the output are those of TRL's `add_fused_lm_head` (1.15 and later), so
what calls that works with this. Legend: B sequences, L their length, C the last positions that carry a loss.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.head import head_of
from grpo_fast.loss import LossOutput, grpo_loss, token_logprobs
from grpo_fast.packing import Support, offsets_of, require_support

IGNORED = -100


@dataclass
class FusedHeadOutput(ModelOutput):
    """What a model with a fused head returns. Tokens are predicted by the position before: `[B, L-1]`.

    Attributes:
        loss: of the `Objective`; without one, the mean negative log-likelihood of the labels.
        log_probs, entropy: float32, in nats; 0 where the label is -100. Detached where an `Objective` was given.
        label_mask: where the label is not -100.
        aux_loss: the router's load-balancing loss, where `output_router_logits` asks for it.
        log_sum_sq_probs, mean_logits, is_top1: None; TRL's output has them for other trainers.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


class Objective:
    """What `grpo_loss` needs besides the model's states, for the last C positions of each sequence.

    A plain class, so that wrappers which cast or copy a forward's tensors (FSDP) leave these float32 ones alone.

    Args:
        advantages: `[B]` or `[B, C]`.
        loss_mask: `[B, C]`.
        config: the objective, its temperature included.
        old_logprobs, ref_logprobs, sampling_logprobs: `[B, C]` or None.
        normalizer, entropy_normalizer: as in `grpo_loss`.
    """

    def __init__(
        self,
        advantages: Tensor,
        loss_mask: Tensor,
        *,
        config: LossConfig,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        sampling_logprobs: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        entropy_normalizer: Tensor | float | None = None,
    ) -> None:
        self.advantages = advantages
        self.loss_mask = loss_mask
        self.options: dict[str, Any] = {
            "config": config,
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "sampling_logprobs": sampling_logprobs,
            "normalizer": normalizer,
            "entropy_normalizer": entropy_normalizer,
        }

    def loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, support: Support | None = None, **head: Any
    ) -> LossOutput:
        """`grpo_loss` of the last C of `hidden` `[B, L-1, H]` and `targets` `[B, L-1]`; `support` as in `forward`."""
        length, device = self.loss_mask.shape[1], hidden.device
        everything: dict[str, Any] = dict(head)
        for name, value in self.options.items():
            everything[name] = value.to(device) if isinstance(value, Tensor) else value
        return grpo_loss(
            hidden[:, -length:],
            weight,
            targets[:, -length:],
            self.advantages.to(device),
            loss_mask=self.loss_mask.to(device).bool(),
            support=fit_support(support, self.loss_mask.shape, device),
            **everything,
        )


class FusedHead:
    """The LM head of one model, and how it is to be run. `fuse_lm_head` makes it.

    Attributes:
        config: what happens between the head's product and the logits, measured once (`grpo_fast.head`).
        unverified: why it could not be measured, or None.
        last: the `LossOutput` of the latest call with an `Objective`.
    """

    def __init__(
        self,
        lm: nn.Module,
        *,
        config: HeadConfig | None,
        temperature: float,
        cast_to_fp32: bool,
        backend: str,
        workspace_bytes: int | None,
    ) -> None:
        head = head_of(lm) if config is None else None
        self.config: HeadConfig = config or head.config  # type: ignore[union-attr]
        self.unverified = "config was given" if head is None else head.unverified
        self.temperature = float(temperature)
        self.cast_to_fp32 = cast_to_fp32
        self.options: dict[str, Any] = {"backend": backend, "workspace_bytes": workspace_bytes}
        self.last: LossOutput | None = None

    def run(
        self,
        lm: Any,
        request: bool | Objective,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        support: Support | None,
    ) -> FusedHeadOutput:
        """The backbone's forward and, from its states, what was asked for."""
        if labels is None and shift_labels is None:
            raise ValueError("labels: expected a tensor [B, L] of token ids, -100 where none is scored; got None")
        text_config = lm.config.get_text_config()
        kwargs["use_cache"] = False
        if getattr(text_config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        # Looked up in every call: FSDP and peft replace modules and parameters.
        head = head_of(lm, config=self.config, verify=False)
        outputs = head.backbone(*args, **kwargs)
        weight, bias = whole(head.weight), whole(head.bias)
        hidden = outputs.last_hidden_state.to(weight.device)  # a model split by device_map may end elsewhere
        if shift_labels is None:
            assert labels is not None
            hidden, targets = hidden[:, :-1], labels[:, 1:].to(weight.device)
        else:
            targets = shift_labels.to(weight.device)
        mask = targets != IGNORED
        result = self._score(request, hidden, weight, bias, targets.clamp(min=0), mask, support)
        if result.loss is None:
            assert result.log_probs is not None
            count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            result.loss = -result.log_probs.sum() / count
        result.label_mask = mask
        if kwargs.get("output_router_logits"):
            result.aux_loss = _router_loss(lm, text_config, outputs.router_logits, kwargs.get("attention_mask"))
        return result

    def _score(
        self,
        request: bool | Objective,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        mask: Tensor,
        support: Support | None,
    ) -> FusedHeadOutput:
        context: Any = nullcontext()
        if self.cast_to_fp32:
            hidden, context = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        # As a linear layer would: the states' dtype, or under autocast (inside the loss) autocast's.
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        head: dict[str, Any] = {"bias": bias, "head": self.config, **self.options}
        with context:
            if not isinstance(request, Objective):
                head |= {"loss_mask": mask, "support": fit_support(support, targets.shape, hidden.device)}
                scores = token_logprobs(hidden, weight, targets, temperature=self.temperature, **head)
                assert scores.entropy is not None
                # Copies: FSDP2 warns of outputs that are views.
                return FusedHeadOutput(log_probs=scores.logprobs.clone(), entropy=scores.entropy.clone())
            out = self.last = request.loss(hidden, weight, targets, support=support, **head)
        assert out.entropy is not None
        before = targets.shape[1] - out.logprobs.shape[1]
        return FusedHeadOutput(
            loss=out.loss, log_probs=F.pad(out.logprobs, (before, 0)), entropy=F.pad(out.entropy, (before, 0))
        )


def fit_support(support: Support | None, shape: Sequence[int], device: torch.device) -> Support | None:
    """Rows of `shape` `[B, L]`, on `device`: the last L of each sequence, after empty ones where there are fewer.

    Raises:
        ValueError: not a Support, or not as many rows for each sequence.
    """
    if support is None:
        return None
    require_support("support", support)
    count, length = shape
    given, rest = divmod(support.num_rows, max(count, 1))
    if rest:
        raise ValueError(f"support: expected as many rows for each of {count} sequences; got {support.num_rows}")
    if given > length:
        rows = torch.arange(support.num_rows, device=support.offsets.device).view(count, given)
        support = support[rows[:, given - length :].reshape(-1)]
    elif given < length:
        sizes = F.pad(support.sizes.view(count, given), (length - given, 0))
        support = Support.trusted(support.token_ids, offsets_of(sizes.reshape(-1)))
    return support.to(device)


def fuse_lm_head(
    model: nn.Module,
    *,
    config: HeadConfig | None = None,
    temperature: float = 1.0,
    cast_to_fp32: bool = False,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> FusedHead:
    """Teach `model.forward` the keyword `fused_lm_head`: True for log-probabilities, an `Objective` for its loss.

    Do it before the model is wrapped (DDP, FSDP, torch.compile, `accelerator.prepare`), but for peft.

    Args:
        config: what the model does to its logits; None: measured on two tokens, which a model that is sharded already
            does not allow.
        temperature: logits are divided by it.
        cast_to_fp32: run the head in float32, outside of autocast.
        backend, workspace_bytes: as in `grpo_loss`.

    Raises:
        ValueError: the model's head cannot be expressed (`grpo_fast.head.head_of` says why and what to do).
    """
    base = getattr(model, "get_base_model", None)
    lm: Any = base() if callable(base) and hasattr(model, "peft_config") else model
    forward = lm.forward
    # accelerate's wrapper, if it came first, computes in autocast, where logits are too coarse to be told apart, and
    # would take itself and this off together; it stays inside.
    lm.forward = vars(lm).pop("_original_forward", forward)
    try:
        head = FusedHead(
            lm,
            config=config,
            temperature=temperature,
            cast_to_fp32=cast_to_fp32,
            backend=backend,
            workspace_bytes=workspace_bytes,
        )
    finally:
        lm.forward = forward
    lm.forward = types.MethodType(_with_fused_head(forward, head), lm)
    return head


def _with_fused_head(original: Callable[..., Any], head: FusedHead) -> Callable[..., Any]:
    def forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool | Objective = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        support: Support | None = None,
        **kwargs: Any,
    ) -> Any:
        if fused_lm_head is not False:
            return head.run(self, fused_lm_head, args, kwargs, labels, shift_labels, num_items_in_batch, support)
        if support is not None:
            raise ValueError("support: expected None without fused_lm_head, as logits are of the whole vocabulary")
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        return original(*args, **kwargs, **{name: value for name, value in given.items() if value is not None})

    # `generate` checks its arguments against the signature. No __wrapped__: accelerate follows it when it unwraps.
    signature = inspect.signature(original)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    rest = [p.replace(kind=_not_positional_only(p.kind)) for p in signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=[first, *rest])  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    return forward


def _not_positional_only(kind: Any) -> Any:
    return inspect.Parameter.POSITIONAL_OR_KEYWORD if kind is inspect.Parameter.POSITIONAL_ONLY else kind


def _router_loss(lm: Any, text_config: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss that transformers' mixtures of experts share."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(text_config, "num_experts", None) or getattr(text_config, "num_local_experts", None)
    experts = experts or lm.num_experts
    top_k: int = getattr(text_config, "num_experts_per_tok", None) or lm.num_experts_per_tok
    loss = load_balancing_loss_func(router_logits, experts, top_k, attention_mask)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"model: expected router logits from {type(lm).__name__}, as an auxiliary loss needs; got none"
        )
    return loss


# -- sharded heads ----------------------------------------------------------------------------------------------------


def whole(parameter: Any) -> Any:
    """`parameter` on every rank, differentiable: gathered if FSDP2 or DeepSpeed ZeRO-3 keep it in shards."""
    if parameter is None:
        return None
    if hasattr(parameter, "full_tensor"):  # a DTensor
        from torch.distributed.tensor import Partial

        # Each rank's gradient is of its own tokens: the shards' is their mean, as FSDP reduces the others'.
        return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    if hasattr(parameter, "ds_id"):
        return _from_zero3(parameter)
    return parameter


def _from_zero3(parameter: Any) -> Tensor:
    """A copy of a ZeRO-3 parameter: DeepSpeed frees the parameter's own memory before the backward wants it."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    here = parameter.ds_status == ZeroParamStatus.AVAILABLE  # tied to embeddings in use: not ours to free again
    with nullcontext() if here else deepspeed.zero.GatheredParameters([parameter]):
        return _Copy.apply(parameter)  # type: ignore[no-any-return]


class _Copy(torch.autograd.Function):
    """A copy whose gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:  # type: ignore[override]
        return parameter.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad
