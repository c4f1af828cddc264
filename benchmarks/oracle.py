"""Who may be timed: errors against float64, and how large they may be.

Log-probabilities and entropies are compared at the measured shape, on 64 rows; the loss and its gradients on a small
shape with the same scenario, where the float64 oracle (`grpo_fast.reference`) fits. Supports are masks of its logits;
who computes on the whole vocabulary is checked on it. A contender may be twice as far off as plain bf16 eager, or at
the floors of the project's own bf16 tolerances, whichever is more.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from benchmarks.baselines import CONTENDERS, Contender, Outcome
from benchmarks.baselines.implementations import model_logits
from benchmarks.cases import Batch, Case, Model, Scenario, make_batch
from benchmarks.supports import mask_of
from grpo_fast.reference import reference_policy_loss

Errors = dict[str, float]

# RMS in nats; gradients relative RMS; the loss relative to the RMS advantage, as the loss itself may cancel to nothing.
FLOORS = {"logprobs": 2e-3, "entropy": 2e-3, "loss": 4e-3, "grad_hidden": 4e-3, "grad_weight": 4e-3}
CEILINGS = {"logprobs": 0.1, "entropy": 0.1, "loss": 0.05, "grad_hidden": 0.05, "grad_weight": 0.05}
EAGER = "plain log-softmax"
BF16_SPACING = 2.0**-7
SAMPLED_ROWS = 64
SMALL_TOKENS, SMALL_SEQUENCES, SMALL_HIDDEN, SMALL_VOCAB = 128, 16, 64, 1000


def rms(values: Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt())


def complaint(errors: Errors, bounds: Errors) -> str | None:
    """What is wrong with a result, or None. NaN is wrong."""
    wrong = [
        f"{name} error {value:.1e} > {bounds[name]:.1e}" for name, value in errors.items() if not value <= bounds[name]
    ]
    return ", ".join(wrong) or None


def allowed(eager: Errors, outcome: Outcome | None = None) -> Errors:
    """Bounds from eager's errors; a result that is returned in bf16 may be off by its spacing."""
    bounds = {name: max(floor, 2 * eager.get(name, 0.0)) for name, floor in FLOORS.items()}
    for name in ("logprobs", "entropy"):
        values = getattr(outcome, name, None)
        if values is not None and values.dtype == torch.bfloat16:
            bounds[name] = max(bounds[name], BF16_SPACING * rms(values))
    return {name: min(bound, CEILINGS[name]) for name, bound in bounds.items()}


# -- at the measured shape --------------------------------------------------------------------------------------------


class SampledRows:
    """float64 log-probabilities and entropies of some rows of a batch, and the errors that eager bf16 has on them."""

    def __init__(self, batch: Batch) -> None:
        """`batch` is packed."""
        count = min(SAMPLED_ROWS, batch.case.tokens)
        self.rows = torch.linspace(0, batch.case.tokens - 1, count, device=batch.hidden.device).round().long()
        hidden, targets = batch.hidden.detach()[self.rows], batch.targets[self.rows]
        weight, cap = batch.weight.detach(), batch.head.softcap
        mask = None if batch.support is None else mask_of(batch.support[self.rows], weight.shape[0])
        # By blocks of the vocabulary: a float64 copy of the whole weight would be four times its size.
        exact = torch.cat([hidden.double() @ block.double().T for block in weight.split(16384)], dim=1)
        exact = exact if cap is None else cap * torch.tanh(exact / cap)
        self.exact = _statistics(exact, targets, mask)
        eager = _statistics(model_logits(hidden, weight, cap).float(), targets, mask)
        self.eager = _differences(*eager, self.exact, None)

    def check(self, batch: Batch, outcome: Outcome) -> tuple[Errors, str | None]:
        """(errors, complaint) of a run's outcome; rows that it says it did not compute are left out."""
        parts = (outcome.logprobs, outcome.entropy, outcome.computed)
        logprobs, entropy, computed = (None if v is None else batch.packed(v)[self.rows] for v in parts)
        errors = _differences(logprobs, entropy, self.exact, computed)
        return errors, complaint(errors, allowed(self.eager, outcome))


def _differences(
    logprobs: Tensor | None, entropy: Tensor | None, exact: tuple[Tensor, Tensor], computed: Tensor | None
) -> Errors:
    """RMS errors of packed log-probabilities and entropies on the rows that were computed."""
    errors = {}
    for name, values, expected in zip(("logprobs", "entropy"), (logprobs, entropy), exact, strict=True):
        if values is not None:
            difference = values.double() - expected
            errors[name] = rms(difference if computed is None else difference[computed])
    return errors


def _statistics(logits: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) of logits `[R, V]`, in their dtype, where the mask is True."""
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    log_p = torch.log_softmax(logits, -1)
    finite = log_p if mask is None else log_p.masked_fill(~mask, 0.0)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * finite).sum(-1)


# -- at a small shape -------------------------------------------------------------------------------------------------


def small_case(scenario: Scenario, softcap: float | None) -> Case:
    """128 tokens in 16 sequences, a vocabulary of 1000.

    Coefficients are raised: at training size a KL or entropy term could be left out within bf16's tolerance.
    """
    config = replace(scenario.config, beta=10 * scenario.config.beta, entropy_coef=100 * scenario.config.entropy_coef)
    scenario = replace(scenario, config=config)
    return Case(Model("check", SMALL_HIDDEN, SMALL_VOCAB, softcap), SMALL_TOKENS, scenario, SMALL_SEQUENCES)


@cache
def _small(scenario: Scenario, softcap: float | None, device: str) -> tuple[Batch, dict[str, Tensor]]:
    """A small batch and what float64 says: logprobs, entropy and, with gradient, loss and gradients."""
    batch = make_batch(small_case(scenario, softcap), device, seed=1)
    hidden = batch.hidden.detach().double().requires_grad_()
    weight = batch.weight.detach().double().requires_grad_()
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    mask = None if batch.support is None else mask_of(batch.support, weight.shape[0])
    logprobs, entropy = _statistics(logits, batch.targets, mask)
    exact = {"logprobs": logprobs.detach(), "entropy": entropy.detach()}
    if not scenario.gradient:
        return batch, exact
    loss = reference_policy_loss(
        logprobs,
        entropy,
        batch.advantages.double(),
        config=batch.config,
        cu_seqlens=batch.cu_seqlens,
        old_logprobs=batch.old.double(),
        ref_logprobs=batch.ref.double(),
    )
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return batch, exact | {"loss": loss.detach(), "grad_hidden": hidden.grad, "grad_weight": weight.grad}


def small_errors(
    contender: Contender, scenario: Scenario, softcap: float | None, device: str
) -> tuple[Errors, Outcome]:
    """Errors of a contender against the oracle on the small shape, and what it returned."""
    scenario = contender.judged_on(scenario)
    packed, exact = _small(scenario, softcap, device)
    batch = contender.view(packed)
    batch.clear_gradients()
    outcome = contender.run(batch)
    parts = (outcome.logprobs, outcome.entropy, outcome.computed)
    logprobs, entropy, computed = (None if v is None else batch.packed(v) for v in parts)
    errors = _differences(logprobs, entropy, (exact["logprobs"], exact["entropy"]), computed)
    if scenario.gradient:
        assert outcome.loss is not None
        errors["loss"] = abs(float(outcome.loss) - float(exact["loss"])) / rms(packed.advantages)
        grads = {"grad_hidden": batch.hidden.grad, "grad_weight": batch.weight.grad}
        for name, grad in grads.items():
            if name == "grad_hidden" or scenario.trains_head:
                missing = f"{contender.name} left no {name}"
                assert grad is not None, missing
                grad = batch.packed(grad) if name == "grad_hidden" else grad
                errors[name] = rms(grad.double() - exact[name]) / rms(exact[name])
    batch.clear_gradients()
    return errors, outcome


def check_small(
    contender: Contender, scenario: Scenario, softcap: float | None, device: str
) -> tuple[Errors, str | None]:
    """(errors, complaint) of a contender on the small shape."""
    scenario = contender.judged_on(scenario)
    eager, _ = small_errors(CONTENDERS[EAGER], scenario, softcap, device)
    errors, outcome = small_errors(contender, scenario, softcap, device)
    return errors, complaint(errors, allowed(eager, outcome))
