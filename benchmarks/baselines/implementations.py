"""How each contender is called: as its own trainer does, with its best settings.

Every function does the work of a batch's scenario: log-probabilities (and entropies, where it has any), the GRPO loss,
and gradients left in `batch.hidden.grad` and `batch.weight.grad`. Those that give log-probabilities only get the eager
O(T) objective below, the same for all. Competitors are imported when first called.

Legend: T packed tokens, H hidden size, V vocabulary, S sequences, L padded length.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Batch
from benchmarks.supports import mask_of
from grpo_fast.backends.base import get_backend, resolve_backend
from grpo_fast.loss import grpo_loss, token_logprobs


@dataclass
class Outcome:
    """What a run returns besides gradients: detached, in the batch's layout; None where a contender has none.

    `computed` is False on rows that were skipped as they have no gradient (None: all were computed).
    """

    loss: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    computed: Tensor | None = None


# -- the objective, for those who give log-probabilities only ---------------------------------------------------------


def eager_loss(batch: Batch, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
    """The clipped objective on `[T]` or `[S, L]` log-probabilities, in float32 (dapo and grpo aggregation).

    ratio w = exp(p - old), or of its sequence mean; term = -min(w A, clip(w) A) + beta w k3(p, ref)
    """
    config, ids, mask = batch.config, batch.sequence_ids, batch.mask.float()
    lengths = batch.cu_seqlens.diff().float()
    p = logprobs.float()
    log_w = p - batch.old
    if config.importance_sampling_level == "sequence":
        sums = log_w.new_zeros(len(lengths)).index_add(0, ids.reshape(-1), (log_w * mask).reshape(-1))
        log_w = (sums / lengths)[ids]
    w, advantages = log_w.exp(), batch.advantages[ids]
    term = -torch.minimum(w * advantages, w.clamp(1 - config.epsilon, 1 + config.upper_epsilon) * advantages)
    if config.beta != 0:
        gap = batch.ref - p
        term = term + config.beta * w * (gap.exp() - gap - 1)
    weights = mask / mask.sum() if config.loss_type == "dapo" else mask / lengths[ids] / len(lengths)
    loss = (term * weights).sum()
    if config.entropy_coef != 0:
        assert entropy is not None
        loss = loss - config.entropy_coef * (entropy.float() * mask).sum() / mask.sum()
    return loss


def _finish(batch: Batch, logprobs: Tensor, entropy: Tensor | None) -> Outcome:
    """Loss and backward, if the scenario has any."""
    if not batch.case.scenario.gradient:
        return Outcome(None, logprobs, entropy)
    loss = eager_loss(batch, logprobs, entropy)
    loss.backward()
    return Outcome(loss.detach(), logprobs.detach(), None if entropy is None else entropy.detach())


def _gradient_mode(batch: Batch) -> torch.set_grad_enabled:
    return torch.set_grad_enabled(batch.case.scenario.gradient)


def _entropy_mode(batch: Batch) -> torch.set_grad_enabled:
    """Trainers compute the entropy metric without a graph, unless there is a bonus."""
    return torch.set_grad_enabled(batch.case.scenario.gradient and batch.config.entropy_coef != 0)


# -- this library -----------------------------------------------------------------------------------------------------


def own(batch: Batch, backend: str, **options: Any) -> Outcome:
    """options: `plan`, `workspace_bytes`."""
    head: dict[str, Any] = {"head": batch.head, "backend": backend, "support": batch.support, **options}
    if not batch.case.scenario.gradient:
        with torch.no_grad():
            scored = token_logprobs(batch.hidden, batch.weight, batch.targets, **head)
        return Outcome(None, scored.logprobs, scored.entropy)
    out = grpo_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        batch.advantages,
        cu_seqlens=batch.cu_seqlens,
        old_logprobs=batch.old,
        ref_logprobs=batch.ref if batch.config.beta != 0 else None,
        config=batch.config,
        **head,
    )
    out.loss.backward()
    return Outcome(out.loss.detach(), out.logprobs, out.entropy, out.computed)


def forced(batch: Batch, *, sparse: bool) -> Outcome:
    """This library with every support computed in one way, whatever its size: not what it does, but why."""
    engine = get_backend(resolve_backend("auto", batch.hidden.device, batch.hidden.dtype))
    share = 1 if sparse else batch.weight.shape[0]
    with patch.object(type(engine), "sparse_share", lambda *_: share):
        return own(batch, "auto")


# -- eager ------------------------------------------------------------------------------------------------------------


def model_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """What a bf16 model returns: the product and the soft cap, both rounded to bf16."""
    logits = hidden @ weight.T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain(batch: Batch) -> Outcome:
    """Supports by masks of the full logits, made of the ids as they come from a sampler."""
    with _gradient_mode(batch):
        logits = model_logits(batch.hidden, batch.weight, batch.head.softcap)
        outside = None if batch.support is None else ~mask_of(batch.support, batch.weight.shape[0])
        if outside is not None:
            logits = logits.masked_fill(outside, -torch.inf)
        log_p = torch.log_softmax(logits.float(), -1)
        logprobs = log_p.gather(-1, batch.targets[..., None]).squeeze(-1)
        with _entropy_mode(batch):
            finite = log_p if outside is None else log_p.masked_fill(outside, 0.0)
            entropy = -(log_p.exp() * finite).sum(-1)
        return _finish(batch, logprobs, entropy)


def trl_eager(batch: Batch, *, float32: bool) -> Outcome:
    """TRL up to 1.15: accelerate hands over float32 logits under autocast, a model loaded in bf16 gives bf16 ones."""
    utils: Any = importlib.import_module("trl.trainer.utils")
    with _gradient_mode(batch):
        logits = model_logits(batch.hidden, batch.weight, batch.head.softcap)
        logits = logits.float() if float32 else logits
        logprobs = utils.selective_log_softmax(logits, batch.targets)
        with _entropy_mode(batch):
            entropy = utils.entropy_from_logits(logits)
        return _finish(batch, logprobs, entropy)


# -- TRL's fused head and verl's, which give log-probabilities and entropies ------------------------------------------


def trl_chunked(batch: Batch) -> Outcome:
    """TRL 1.16's fused LM head with the trainer's outputs and chunk size: `[N, H]` rows, padding included."""
    utils: Any = importlib.import_module("trl.trainer.utils")
    kernels: Any = importlib.import_module("trl.kernels")
    with _gradient_mode(batch):
        logprobs, entropy, *_ = kernels.ChunkedLogProbFunction.apply(
            batch.hidden.reshape(-1, batch.hidden.shape[-1]),
            batch.weight,
            None,
            batch.targets.reshape(-1),
            1.0,
            utils._CHUNKED_LOGPROB_CHUNK_SIZE,
            batch.head.softcap,
            1.0,
            ("log_probs", "entropy"),
        )
        shape = batch.targets.shape
        return _finish(batch, logprobs.view(shape), entropy.view(shape))


VERL_TORCH = "verl.utils.experimental.torch_functional"


@cache
def load_verl_torch() -> ModuleType:
    """verl's module from its file: the packages above it import ray and tensordict, which it does not need."""
    package = importlib.util.find_spec("verl")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'verl'")
    path = Path(package.origin).parent / "utils" / "experimental" / "torch_functional.py"
    spec = importlib.util.spec_from_file_location("benchmarks_verl_torch_functional", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verl_torch(batch: Batch) -> Outcome:
    verl: Any = load_verl_torch()
    with _gradient_mode(batch):
        return _finish(batch, *verl.FusedLinearForPPO()(batch.hidden, batch.weight, batch.targets))


def verl_triton(batch: Batch) -> Outcome:
    kernel: Any = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    with _gradient_mode(batch):
        return _finish(batch, *kernel.linear_cross_entropy(batch.hidden, batch.weight, batch.targets, 1.0, "none"))


# -- cross-entropies: log-probabilities without entropies -------------------------------------------------------------


def torch_lce(batch: Batch) -> Outcome:
    """Chunked, with torch's own choice of chunks; the unreduced form takes per-token weights and recomputes logits."""
    options = torch.nn.LinearCrossEntropyOptions()
    nll = F.linear_cross_entropy(batch.hidden, batch.weight, batch.targets, reduction="none", options=options)
    return _finish(batch, -nll, None)


def cut_cross_entropy(batch: Batch) -> Outcome:
    cce: Any = importlib.import_module("cut_cross_entropy")
    impl = "cce" if batch.hidden.is_cuda else "torch_compile"  # its kernels are Triton's; the other is its fallback
    nll = cce.linear_cross_entropy(
        batch.hidden, batch.weight, batch.targets, softcap=batch.head.softcap, reduction="none", impl=impl
    )
    return _finish(batch, -nll, None)


def quack(batch: Batch) -> Outcome:
    """The library's GEMM and QuACK's cross-entropy kernel: its chunked form has no per-token losses."""
    quack: Any = importlib.import_module("quack.linear_cross_entropy")
    nll = quack.linear_cross_entropy_func(
        batch.hidden, batch.weight, None, batch.targets, reduction="none", inplace_backward=True
    )
    return _finish(batch, -nll, None)


# -- Liger: the loss is inside ----------------------------------------------------------------------------------------


def _liger_options(batch: Batch) -> dict[str, Any]:
    config = batch.config
    return {
        "beta": config.beta,
        "loss_type": config.loss_type,
        "importance_sampling_level": config.importance_sampling_level,
        "temperature": 1.0,
        "use_bias_correction_kl": config.use_bias_correction_kl,
    }


_liger_compiled_for: list[torch.Size] = []


def liger_fused(batch: Batch, *, whole: bool, compiled: bool) -> Outcome:
    """`LigerFusedLinearGRPOLoss`: one sequence a chunk by default, or all of them (its inner blocks bound memory).

    compiled: its default; that concerns its O(T) arithmetic only. torch 2.13 at times fails to compile it for a second
    shape, so another shape starts with nothing compiled.
    """
    liger: Any = importlib.import_module("liger_kernel.chunked_loss")
    if compiled and _liger_compiled_for != [batch.hidden.shape]:
        torch._dynamo.reset()
        _liger_compiled_for[:] = [batch.hidden.shape]
    with_ref = batch.config.beta != 0
    loss_fn = liger.LigerFusedLinearGRPOLoss(
        epsilon_low=batch.config.epsilon,
        epsilon_high=batch.config.upper_epsilon,
        use_ref_model=with_ref,
        compiled=compiled,
        chunk_size=batch.case.sequences if whole else 1,
        **_liger_options(batch),
    )
    loss, _ = loss_fn(
        batch.hidden,
        batch.weight,
        batch.targets,
        batch.mask.int(),
        batch.advantages,
        ref_per_token_logps=batch.ref if with_ref else None,
        old_per_token_logps=batch.old,
    )
    loss.backward()
    return Outcome(loss.detach())


def liger_triton(batch: Batch) -> Outcome:
    """`triton_grpo_loss` on bf16 logits `[S, L + 1, V]`, whose last position it ignores."""
    liger: Any = importlib.import_module("liger_kernel.transformers.grpo_loss")
    logits = F.pad(batch.hidden, (0, 0, 0, 1)) @ batch.weight.T
    loss, _ = liger.triton_grpo_loss(
        logits,
        batch.old,
        batch.ref if batch.config.beta != 0 else None,
        batch.targets,
        batch.advantages,
        batch.mask.int(),
        eps_low=batch.config.epsilon,
        eps_high=batch.config.upper_epsilon,
        reduce=True,
        **_liger_options(batch),
    )
    loss.backward()
    return Outcome(loss.detach())
