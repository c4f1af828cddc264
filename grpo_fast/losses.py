"""The losses: one record each, from which choices, bounds, couplings, aggregation, metrics, kernels and docs derive.

Legend, as everywhere behind `grpo_loss`: T packed tokens, S sequences, L_s unmasked tokens of sequence s. p `logprobs`
of the current policy, r = p - old, w the ratio at the configured level, A advantage, m mask, mu log-probability of the
policy that sampled, sg stop-gradient. Logs are natural (nats).

To add a loss here: its name in `LossName`, a term, a record in `_RECORDS`, for each of its parameters a field of
`config.LossConfig`, its twin in `reference.py`; then `python -m grpo_fast.loss_page > docs/losses.md`. From outside:
`config.register_loss` (docs/adding-a-loss.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NewType, TypeAlias, get_args

import torch
from torch import Tensor

LossName: TypeAlias = Literal[
    "grpo",
    "bnpo",
    "dr_grpo",
    "dapo",
    "luspo",
    "cispo",
    "sapo",
    "vespo",
    "gmpo",
    "dppo",
    "ppo_dual",
    "reinforce",
    "rloo",
]
RegisteredLoss = NewType("RegisteredLoss", str)
"""The name that `register_loss` returns."""
Aggregation: TypeAlias = Literal["token_mean", "sequence_mean", "sequence_sum", "constant_length"]
Quantity: TypeAlias = Literal["sampling_logprobs", "importance"]
Coupling: TypeAlias = Literal["nothing", "sequence", "clamped_sequence"]
Clip: TypeAlias = Literal["none", "two_sided", "upper"]
Mean: TypeAlias = Literal["tokens", "sequences"]
Kernel: TypeAlias = Literal["clipped", "cispo", "sapo", "dppo", "ppo_dual", "reinforce"]
CorrectionMode: TypeAlias = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

IMPORTANCE_SAMPLING_MODES: tuple[CorrectionMode, ...] = get_args(CorrectionMode)
CLIP_METRICS: dict[Clip, tuple[str, ...]] = {
    "none": (),
    "two_sided": tuple(f"clip_ratio/{n}" for n in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
    "upper": ("cispo_clip_ratio",),
}
LOG_RATIO_LIMIT = 20.0
"""vespo clamps log ratios to it: e^20 is still far from overflow in float32."""
LOG_RATIO_FLOOR = math.log(1e-8)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number that one loss reads; `above < value`, `at_least <= value <= at_most`."""

    name: str
    default: float
    doc: str
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """All that is known of a loss. No field has a default: what is forgotten is an error at import."""

    name: str
    term: Callable[[TermInputs], Tensor]
    """Each token's term `[T]`, differentiable in the log-probabilities, before weights and corrections."""
    formula: str
    """The term in the symbols of `grpo_fast.losses`."""
    when: str
    """When to use it, one line."""
    paper: str
    aggregation: Aggregation
    """The mean over tokens, over sequences of their tokens' mean or sum, or that sum over `max_completion_length`."""
    reads: tuple[Quantity, ...]
    """What the term takes besides ratios and advantages. One that reads the `importance` weight of the train/inference
    correction is not multiplied by it, and a weight of zero does not drop its rows."""
    couples: Coupling
    """What a token's term sees of others: `nothing`; its `sequence`, so that a bad token spoils all of it; or
    `clamped_sequence`, through clamped ratios, which only NaN passes."""
    beside_advantage: str | None
    """The parameter that weighs what does not multiply the advantage. None: no advantage, no gradient."""
    requires: Mapping[str, str]
    """Options that may not be None: what their error says, in which `{name}` stands for another option's value."""
    importance_sampling_modes: tuple[CorrectionMode, ...]
    """Corrections it allows."""
    clip: Clip
    """Metrics of clipped tokens: `two_sided`, those outside [1 - epsilon, 1 + epsilon_high] on A's side
    (`clip_ratio/*`); `upper`, those with w > epsilon_high and A > 0 (`cispo_clip_ratio`)."""
    metrics: Mapping[str, Mean]
    """Quantities that the term notes (`TermInputs.note`), and whether they are averaged over computed tokens, or over
    sequences after their tokens."""
    parameters: tuple[Parameter, ...]
    kernel: Kernel | None
    """The device term that computes the same; None: torch's operators and autograd, between the row kernels."""


class Segments:
    """Which sequence each packed token belongs to, with the reductions that need to know.

    Args:
        cu_seqlens: `[S+1]` integers on the tokens' device; sequence s is tokens `cu_seqlens[s]:cu_seqlens[s+1]`.
        num_tokens: T.

    Attributes:
        lengths: tokens per sequence, `[S]` int64.
        index: the sequence of each token, `[T]` int64. Both are computed when first asked for.
    """

    def __init__(self, cu_seqlens: Tensor, num_tokens: int) -> None:
        self.cu_seqlens = cu_seqlens.to(torch.int64)
        self.num_tokens = num_tokens
        self.num_sequences = cu_seqlens.numel() - 1
        self._lengths: Tensor | None = None
        self._index: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        if self._lengths is None:
            self._lengths = self.cu_seqlens[1:] - self.cu_seqlens[:-1]
        return self._lengths

    @property
    def index(self) -> Tensor:
        if self._index is None:
            numbers = torch.arange(self.num_sequences, device=self.cu_seqlens.device)
            self._index = torch.repeat_interleave(numbers, self.lengths, output_size=self.num_tokens)
        return self._index

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` `[T]` over each sequence, `[S]`; accumulated in float64, 0 for empty sequences."""
        dtype = values.dtype if values.is_floating_point() else torch.int64
        if self.num_sequences == 0:
            return values.to(dtype)  # empty, and still on the graph
        total = torch.segment_reduce(values.double(), "sum", lengths=self.lengths, initial=0.0, unsafe=True)
        return total.to(dtype)

    def spread(self, values: Tensor) -> Tensor:
        """Give each token its sequence's value: `[S]` to `[T]`."""
        return _Spread.apply(values, self.index, self.lengths)  # type: ignore[no-any-return]

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """Mean of `values` `[T]` over the unmasked tokens of each sequence, `[S]`; 0 where there is none."""
        return self.sum(torch.where(mask, values, 0.0)) / self.sum(mask).clamp(min=1)


class _Spread(torch.autograd.Function):
    """`values[index]`, whose backward is a segment sum: an indexed add would be atomic, so not repeatable, on a GPU."""

    @staticmethod
    def forward(ctx, values: Tensor, index: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(lengths)
        return values[index]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (lengths,) = ctx.saved_tensors
        total = torch.segment_reduce(grad.double(), "sum", lengths=lengths, initial=0.0, unsafe=True)
        return total.to(grad.dtype), None, None


@dataclass
class TermInputs:
    """What a term may read, `[T]` each; only what comes from `logprobs` has a gradient. Finite where masked.

    Attributes:
        logprobs: p. log_ratio: r. log_w: log w, at the configured level. ratio: w.
        importance: weights of the train/inference correction, or None.
        advantages: A. mask: bool. segments: the tokens' sequences.
        old_logprobs, sampling_logprobs: as given, or None; NaN in the latter means not known.
        config: the `LossConfig`, which is made from these records.
        noted: what the term noted.
    """

    logprobs: Tensor
    log_ratio: Tensor
    log_w: Tensor
    ratio: Tensor
    importance: Tensor | None
    advantages: Tensor
    mask: Tensor
    segments: Segments
    old_logprobs: Tensor | None
    sampling_logprobs: Tensor | None
    config: Any
    noted: dict[str, Tensor] = field(default_factory=dict)

    @property
    def capped_ratio(self) -> Tensor:
        """min(w, delta)."""
        return clamp(self.ratio, high=self.config.delta)

    @property
    def behaviour_logprobs(self) -> Tensor:
        """mu: the engine's own log-probabilities, else the old policy's.

        Where the engine does not know (NaN), the current policy's: no evidence of a difference.
        """
        current = self.logprobs.detach()
        behaviour = self.old_logprobs if self.sampling_logprobs is None else self.sampling_logprobs
        return current if behaviour is None else torch.where(behaviour.isnan(), current, behaviour)

    def note(self, name: str, values: Tensor) -> None:
        """Report `values` `[T]` as the metric `name` of the record."""
        if not isinstance(values, Tensor) or values.shape != self.logprobs.shape:
            got = list(values.shape) if isinstance(values, Tensor) else repr(values)
            raise ValueError(f"{name}: expected values {list(self.logprobs.shape)}; got {got}")
        self.noted[name] = values.detach()


def clamp(values: Tensor, low: float | Tensor | None = None, high: float | Tensor | None = None) -> Tensor:
    """`values` limited to [low, high]; a value inside or on a bound passes its gradient whole, one outside none.

    torch's own clamp did that up to 2.13; in 2.14 a value on a bound gets nothing, on a tensor's bound half. On-policy
    ratios are exactly 1, so epsilon = 0 and delta = 1 are met by every token of a first step: the rule is our own, the
    one of `csrc/objective.h` and `kernels/objective.py`.

    Args:
        values: any shape; NaN stays NaN.
        low, high: None (no bound), a number, or a 0-dim tensor that needs no gradient.
    """
    if low is not None:
        values = torch.where(values < low, low, values)
    if high is not None:
        values = torch.where(values > high, high, values)
    return values


# -- terms ------------------------------------------------------------------------------------------------------------


def clipped_term(c: TermInputs) -> Tensor:
    clipped = clamp(c.ratio, 1 - c.config.epsilon, 1 + c.config.upper_epsilon)
    return -torch.min(c.capped_ratio * c.advantages, clipped * c.advantages)


def cispo_term(c: TermInputs) -> Tensor:
    return -clamp(c.ratio, high=c.config.upper_epsilon).detach() * c.advantages * c.logprobs


def sapo_term(c: TermInputs) -> Tensor:
    tau = _choose(c.advantages > 0, c.config.sapo_temperature_pos, c.config.sapo_temperature_neg, c.ratio)
    return -torch.sigmoid(tau * (c.ratio - 1)) * 4 / tau * c.advantages


def vespo_term(c: TermInputs) -> Tensor:
    with torch.no_grad():
        terms = clamp(c.log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        if c.importance is not None:
            terms = terms + clamp(c.importance.log(), LOG_RATIO_FLOOR, LOG_RATIO_LIMIT)
        total = c.segments.sum(torch.where(c.mask, terms, 0.0))
        log_w = clamp(c.segments.spread(total), LOG_RATIO_FLOOR, LOG_RATIO_LIMIT)
        positive = c.advantages >= 0
        k = _choose(positive, c.config.vespo_k_pos, c.config.vespo_k_neg, log_w)
        rate = clamp(_choose(positive, c.config.vespo_lambda_pos, c.config.vespo_lambda_neg, log_w), low=1e-4)
        phi = (rate + k * log_w - rate * log_w.exp()).exp()
        phi = phi.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    c.note("vespo/phi_seq_mean", phi)
    return -phi * c.advantages * c.logprobs


def gmpo_term(c: TermInputs) -> Tensor:
    # The geometric mean of the ratios belongs to the sequence; each token carries it with weight 1 / L_s.
    upper = clamp(c.log_ratio, high=math.log1p(c.config.upper_epsilon))
    lower = clamp(c.log_ratio, low=math.log1p(-c.config.epsilon) if c.config.epsilon < 1 else None)
    segments, mask = c.segments, c.mask
    sequence_advantage = segments.spread(segments.mean(c.advantages, mask))
    clipped = torch.where(sequence_advantage > 0, upper, torch.where(sequence_advantage < 0, lower, c.log_ratio))
    return -sequence_advantage * segments.spread(segments.mean(clipped, mask)).exp()


def dppo_term(c: TermInputs) -> Tensor:
    gap = c.logprobs.detach().exp() - c.behaviour_logprobs.exp()
    limit = c.config.dppo_threshold
    drop = ((gap > limit) & (c.advantages > 0)) | ((gap < -limit) & (c.advantages <= 0))
    return torch.where(drop, 0.0, -c.advantages * c.ratio) + c.config.dppo_log_ratio_coef * c.log_w.square()


def ppo_dual_term(c: TermInputs) -> Tensor:
    clipped = clipped_term(c)
    return torch.where(c.advantages < 0, torch.min(clipped, -c.config.dual_clip * c.advantages), clipped)


def reinforce_term(c: TermInputs) -> Tensor:
    return -c.advantages * c.logprobs


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two constants a token, in the dtype of `like` (torch.where alone would round them to float32)."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


# -- the table --------------------------------------------------------------------------------------------------------

# Shared by many; what a partial does not hold, a record has to.
_loss = partial(
    Loss,
    reads=(),
    couples="nothing",
    beside_advantage=None,
    requires={},
    importance_sampling_modes=IMPORTANCE_SAMPLING_MODES,
    metrics={},
    parameters=(),
)
_clipped = partial(
    _loss,
    term=clipped_term,
    formula="-min(min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A)",
    clip="two_sided",
    kernel="clipped",
)
_reinforce = partial(_loss, term=reinforce_term, formula="-A p", clip="none", kernel="reinforce")

_RECORDS = (
    _clipped(
        name="grpo",
        when="the original, every completion weighing the same whatever its length; with sequence ratios it is GSPO",
        paper="Shao et al., DeepSeekMath, 2024, arXiv:2402.03300; the clip: Schulman et al., 2017, arXiv:1707.06347",
        aggregation="sequence_mean",
    ),
    _clipped(
        name="bnpo",
        when="every token weighs the same; TRL counts the tokens of the micro-batch only",
        paper="TRL",
        aggregation="token_mean",
    ),
    _clipped(
        name="dr_grpo",
        when="neither length nor group may bias a token's weight (take advantages without scale)",
        paper="Liu et al., Understanding R1-Zero-Like Training, 2025, arXiv:2503.20783",
        aggregation="constant_length",
        requires={"max_completion_length": "dr_grpo divides by it; expected an integer >= 1, got None"},
    ),
    _clipped(
        name="dapo",
        when="the default: every token of the step weighs the same, so long completions count by their length",
        paper="Yu et al., DAPO, 2025, arXiv:2503.14476",
        aggregation="token_mean",
    ),
    _clipped(
        name="luspo",
        when="sequence ratios (level sequence) without GSPO's bias to short answers: a sequence weighs its length",
        paper="LUSPO, 2026, arXiv:2602.05261",
        aggregation="sequence_sum",
    ),
    _loss(
        name="cispo",
        term=cispo_term,
        formula="-sg(min(w, epsilon_high)) A p",
        when="clipped tokens should still learn: the weight is bounded, the gradient never cut",
        paper="MiniMax-M1, 2025, arXiv:2506.13585",
        aggregation="token_mean",
        requires={
            "epsilon_high": "expected a number, as cispo bounds the ratio by it, not by 1 + it (MiniMax-M1: 5); "
            "got None (TRL then takes epsilon, {epsilon})"
        },
        clip="upper",
        kernel="cispo",
    ),
    _loss(
        name="sapo",
        term=sapo_term,
        formula="-A sigmoid(tau (w - 1)) 4 / tau,  tau = sapo_temperature_pos where A > 0, else sapo_temperature_neg",
        when="a soft gate in place of the clip: off-policy tokens fade instead of dropping out",
        paper="Gao et al., Soft Adaptive Policy Optimization, 2025, arXiv:2511.20347",
        aggregation="sequence_mean",
        clip="none",
        parameters=(
            Parameter(name="sapo_temperature_pos", default=1.0, above=0, doc="tau where A > 0"),
            Parameter(name="sapo_temperature_neg", default=1.05, above=0, doc="tau where A <= 0"),
        ),
        kernel="sapo",
    ),
    _loss(
        name="vespo",
        term=vespo_term,
        formula="-phi A p,  phi = sg exp(lambda + k log W - lambda W),  W = product of the sequence's w and of its "
        "correction's weights, clamped; k and lambda by A >= 0",
        when="stale or asynchronous rollouts: the whole sequence's ratio counts, damped on both sides",
        paper="VESPO, 2026, arXiv:2602.10693",
        aggregation="token_mean",
        reads=("importance",),
        couples="clamped_sequence",
        importance_sampling_modes=("token_truncate", "token_mask"),
        clip="none",
        metrics={"vespo/phi_seq_mean": "sequences"},
        parameters=(
            Parameter(name="vespo_k_pos", default=2.0, at_least=0, doc="k where A >= 0: damps small W"),
            Parameter(name="vespo_lambda_pos", default=3.0, at_least=0, doc="lambda where A >= 0: damps large W"),
            Parameter(name="vespo_k_neg", default=3.0, at_least=0, doc="k where A < 0"),
            Parameter(name="vespo_lambda_neg", default=2.0, at_least=0, doc="lambda where A < 0"),
        ),
        kernel=None,
    ),
    _loss(
        name="gmpo",
        term=gmpo_term,
        formula="-A_s exp(mean over the sequence of r, clipped on the side that A_s overshoots),  A_s the mean of A",
        when="a few outlying ratios should not decide a sequence's gradient: their geometric mean does",
        paper="Zhao et al., Geometric-Mean Policy Optimization, 2025, arXiv:2507.20673",
        aggregation="sequence_mean",
        couples="sequence",
        clip="two_sided",
        kernel=None,
    ),
    _loss(
        name="dppo",
        term=dppo_term,
        formula="-A w, 0 where e^p - e^mu has left [-dppo_threshold, dppo_threshold] on A's side;  "
        "+ dppo_log_ratio_coef (log w)^2",
        when="large vocabularies: the trust region is one of probabilities, in which rare tokens may move further",
        paper="Qi et al., Rethinking the Trust Region in LLM Reinforcement Learning, 2026, arXiv:2602.04879",
        aggregation="token_mean",
        reads=("sampling_logprobs",),
        beside_advantage="dppo_log_ratio_coef",
        clip="none",
        parameters=(
            Parameter(
                name="dppo_threshold", default=0.2, above=0, doc="probability difference beyond which a token drops"
            ),
            Parameter(name="dppo_log_ratio_coef", default=1e-3, at_least=0, doc="weight of the (log w)^2 term"),
        ),
        kernel="dppo",
    ),
    _loss(
        name="ppo_dual",
        term=ppo_dual_term,
        formula="grpo's; where A < 0 at most -dual_clip A",
        when="negative advantages with large ratios: their pull is bounded, where the plain clip leaves it free",
        paper="Ye et al., 2020, arXiv:1912.09729",
        aggregation="token_mean",
        clip="two_sided",
        parameters=(
            Parameter(name="dual_clip", default=3.0, above=0, doc="where A < 0 the term is at most it times -A"),
        ),
        kernel="ppo_dual",
    ),
    _reinforce(
        name="reinforce",
        when="one update a rollout, where a ratio has nothing to correct",
        paper="Williams, 1992",
        aggregation="token_mean",
    ),
    _reinforce(
        name="rloo",
        when="REINFORCE with the advantages of `group_advantages(scale='leave_one_out')`",
        paper="Ahmadian et al., Back to Basics, 2024, arXiv:2402.14740",
        aggregation="token_mean",
    ),
)
LOSSES: dict[str, Loss] = {loss.name: loss for loss in _RECORDS}
"""The losses by name; `config.register_loss` adds to it."""
LOSS_TYPES: tuple[LossName, ...] = get_args(LossName)
assert tuple(LOSSES) == LOSS_TYPES, "LossName and LOSSES hold different names"
