"""What is measured: language-model heads, scenarios, their FLOPs and bytes, and the random tensors of a case.

Legend: T packed tokens, H hidden size, V vocabulary, S sequences (completions), L padded length. To add a shape or a
scenario, add a row to `MODELS` or `SCENARIOS`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.supports import draw_support, mask_of
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.packing import Support, offsets_of

GROUP_SIZE = 8
LOGIT_STD = 2.5
OLD_DRIFT, REF_DRIFT = 0.05, 0.3  # nats; the clip range of 0.2 is 3.6 standard deviations: hardly a token is clipped


@dataclass(frozen=True)
class Model:
    """The LM head of a model: `[vocab, hidden]`, logits capped at +-softcap if given."""

    name: str
    hidden: int
    vocab: int
    softcap: float | None = None


@dataclass(frozen=True)
class Scenario:
    """What a step asks of the head.

    Attributes:
        active: share of the sequences whose advantage is not 0 (whole groups of 8 as far as they divide).
        trains_head: the weight needs a gradient (False: LoRA and the like).
        gradient: forward and backward; False: log-probabilities and entropies only.
        ragged: sequence lengths differ.
        support: the supports that rows are given, a kind of `supports.py`; None: the whole vocabulary.
    """

    name: str
    title: str
    config: LossConfig = LossConfig()
    active: float = 1.0
    trains_head: bool = True
    gradient: bool = True
    ragged: bool = False
    support: str | None = None

    @property
    def gemms(self) -> tuple[str, ...]:
        """The matrix products of the cheapest plan without supports, 2 T H V FLOPs each."""
        if not self.gradient:
            return ("logits",)
        return ("logits", "grad_hidden", "grad_weight") if self.trains_head else ("logits", "grad_hidden")


MODELS = {
    model.name: model
    for model in (
        Model("SmolLM2-135M", 576, 49152),
        Model("Qwen3-0.6B", 1024, 151936),
        Model("Qwen3-4B", 2560, 151936),
        Model("Llama-3.1-8B", 4096, 128256),
        Model("Qwen3-8B", 4096, 151936),
        Model("Gemma-2-2B", 2304, 256000, softcap=30.0),
    )
}

# GSPO with the default clip range: its paper's 3e-4 would clip sequences, and what is clipped is not computed.
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("full", "full step"),
        Scenario("half", "half of the groups at zero advantage", active=0.5),
        Scenario("frozen_head", "frozen head", trains_head=False),
        Scenario("no_grad", "logprob + entropy without gradient", gradient=False),
        Scenario("gspo", "GSPO", LossConfig(loss_type="grpo", importance_sampling_level="sequence")),
        Scenario("kl", "KL to a reference", LossConfig(beta=0.04)),
        Scenario("entropy_bonus", "entropy bonus", LossConfig(entropy_coef=0.01)),
        Scenario("ragged", "full step, ragged lengths", ragged=True),
        Scenario("support8", "full step, supports of 8 tokens on average", support="mean 8"),
        Scenario("support64", "full step, supports of 64 tokens on average", support="mean 64"),
        Scenario("support_trained", "full step, supports as of a trained SmolLM2", support="recorded trained"),
        Scenario("support_untrained", "full step, supports as of an untrained SmolLM2", support="recorded untrained"),
    )
}


@dataclass(frozen=True)
class Case:
    """A head, a number of tokens and a scenario, in bfloat16."""

    model: Model
    tokens: int
    scenario: Scenario
    sequences: int = 32

    @property
    def name(self) -> str:
        return f"{self.model.name}-T{self.tokens}-{self.scenario.name}"

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence: equal, or log-normal (sigma 0.6) for ragged scenarios; they add up to `tokens`."""
        share = torch.ones(self.sequences)
        if self.scenario.ragged:
            share = (0.6 * torch.randn(self.sequences, generator=torch.Generator().manual_seed(7))).exp()
        bounds = (share.cumsum(0) / share.sum() * (self.tokens - self.sequences)).round().long()
        bounds = torch.cat([bounds.new_zeros(1), bounds]) + torch.arange(self.sequences + 1)
        return tuple(bounds.diff().tolist())

    @cached_property
    def active_sequences(self) -> tuple[bool, ...]:
        """Which sequences have an advantage: even groups of 8 first, so that active and idle ones alternate."""
        order = sorted(range(self.sequences), key=lambda s: (s // GROUP_SIZE % 2, s))
        chosen = set(order[: round(self.scenario.active * self.sequences)])
        return tuple(s in chosen for s in range(self.sequences))

    @property
    def active_tokens(self) -> int:
        """Tokens that a loss needs; without gradient all of them."""
        return sum(n for n, active in zip(self.lengths, self.active_sequences, strict=True) if active)

    @property
    def padded_tokens(self) -> int:
        """S times the longest sequence: what padded layouts compute."""
        return self.sequences * max(self.lengths)

    @property
    def gemm_flops(self) -> int:
        """FLOPs of one matrix product over the active tokens."""
        return 2 * self.active_tokens * self.model.hidden * self.model.vocab

    @property
    def flops(self) -> int:
        """FLOPs of the cheapest plan: 6 T H V, 4 with a frozen head, 2 without gradient."""
        return self.gemm_flops * len(self.scenario.gemms)

    @property
    def input_bytes(self) -> int:
        """hidden and weight, bf16, and six numbers a token and sequence at most."""
        return 2 * self.model.hidden * (self.tokens + self.model.vocab) + 8 * 6 * self.tokens

    @property
    def gradient_bytes(self) -> int:
        """bf16 gradients that a call returns."""
        rows = self.tokens * self.scenario.gradient
        rows += self.model.vocab * (self.scenario.gradient and self.scenario.trains_head)
        return 2 * self.model.hidden * rows

    @property
    def compulsory_bytes(self) -> int:
        """Least DRAM traffic: active hidden rows and the weight read once, gradients written once, O(T) scalars."""
        read = 2 * self.model.hidden * (self.active_tokens + self.model.vocab) + 8 * 4 * self.active_tokens
        return read + self.gradient_bytes + 4 * 2 * self.active_tokens


# -- what is run ------------------------------------------------------------------------------------------------------

# The CPU selection of `make bench`: model: scenarios.
SLOW = ("ragged", "support64", "support_trained", "support_untrained")
QUICK = {"SmolLM2-135M": tuple(name for name in SCENARIOS if name not in SLOW), "Qwen3-0.6B": ("full",)}
SUPPORT_SIZES = (2, 8, 32, 128, 512, 2048, 8192, 16384)


def loss_cases(device: str) -> list[Case]:
    """Every model with every scenario; T = 16384 on a GPU, on a CPU 2048 for SmolLM2 and 1024 for the others."""
    tokens = dict.fromkeys(MODELS, 16384 if device == "cuda" else 1024)
    if device == "cpu":
        tokens["SmolLM2-135M"] = 2048
    return [Case(model, tokens[model.name], scenario) for model in MODELS.values() for scenario in SCENARIOS.values()]


def is_quick(case: Case) -> bool:
    return case.scenario.name in QUICK.get(case.model.name, ())


def growth_cases() -> dict[str, list[Case]]:
    """Axis: cases. T up to 16384, V up to 256k, the share of sequences with an advantage; SmolLM2's H.

    With supports: V up to 256k at a mean of 8 tokens, and one size in all rows at the V (and H) of two models.
    """
    head, step = MODELS["SmolLM2-135M"], SCENARIOS["full"]
    shares = {
        share: replace(step, name=f"active{share:g}", title=f"{share:g} of the sequences active", active=share)
        for share in (1.0, 0.75, 0.5, 0.25, 0.1)
    }
    vocabularies = [Model(f"V{v}", head.hidden, v) for v in (32768, 65536, 131072, 262144)]
    constant = [
        replace(step, name=f"support_constant{k}", title=f"supports of {k} tokens", support=f"constant {k}")
        for k in SUPPORT_SIZES
    ]
    return {
        "tokens": [Case(head, tokens, step) for tokens in (512, 1024, 2048, 4096, 8192, 16384)],
        "vocab": [Case(model, 1024, step) for model in vocabularies],
        "active": [Case(head, 2048, scenario) for scenario in shares.values()],
        "support_vocab": [Case(model, 1024, SCENARIOS["support8"]) for model in vocabularies],
        **{
            f"support_size_{name}": [Case(MODELS[name], 1024, scenario) for scenario in constant]
            for name in ("SmolLM2-135M", "Qwen3-0.6B")
        },
    }


# -- the tensors of a case --------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """The tensors of a case. hidden and weight are leaves; everything per token has the shape of `targets`.

    Attributes:
        hidden: `[T, H]`, or `[S, L, H]` in the padded layout, bf16. weight: `[V, H]` bf16.
        mask: bool, False on padding. sequence_ids: int64, which sequence a token belongs to.
        advantages: `[S]` float32. logprobs: the true ones to float32 accuracy; old, ref: drifted from them.
        support: of the T rows, or None. dense_logprobs: those over the whole vocabulary, where there is a support.
    """

    case: Case
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    mask: Tensor
    sequence_ids: Tensor
    cu_seqlens: Tensor
    advantages: Tensor
    logprobs: Tensor
    old: Tensor
    ref: Tensor
    support: Support | None = None
    dense_logprobs: Tensor | None = None

    @property
    def config(self) -> LossConfig:
        return self.case.scenario.config

    @property
    def head(self) -> HeadConfig:
        return HeadConfig(softcap=self.case.model.softcap)

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def dense(self) -> Batch:
        """The same tokens over the whole vocabulary: no support, and log-probabilities that drifted as much there."""
        assert self.dense_logprobs is not None
        shift = self.dense_logprobs - self.logprobs
        old, ref = self.old + shift, self.ref + shift
        return replace(self, support=None, logprobs=self.dense_logprobs, dense_logprobs=None, old=old, ref=ref)

    def padded(self) -> Batch:
        """The same data as `[S, L, ...]`; the weight is shared, hidden is shared where no padding is needed."""
        assert self.support is None, "padded layouts are for cases without supports"
        case = self.case
        shape = (case.sequences, max(case.lengths))
        positions = torch.arange(shape[1], device=self.mask.device)
        lengths = self.cu_seqlens.diff()
        mask = positions < lengths[:, None]
        index = (self.cu_seqlens[:-1, None] + positions).clamp(max=case.tokens - 1)

        def spread(values: Tensor) -> Tensor:
            if case.padded_tokens == case.tokens:
                return values.view(*shape, *values.shape[1:])
            return torch.where(mask.view(*shape, *[1] * (values.dim() - 1)), values[index], values.new_zeros(()))

        return replace(
            self,
            hidden=spread(self.hidden.detach()).requires_grad_(self.hidden.requires_grad),
            targets=spread(self.targets),
            mask=mask,
            sequence_ids=torch.arange(shape[0], device=mask.device)[:, None].expand(shape),
            logprobs=spread(self.logprobs),
            old=spread(self.old),
            ref=spread(self.ref),
        )

    def packed(self, values: Tensor) -> Tensor:
        """Per-token values in this batch's layout to `[T, ...]`."""
        return values if values.shape[0] == self.case.tokens and self.mask.dim() == 1 else values[self.mask]


def make_batch(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Batch:
    """Random inputs: logits of standard deviation 2.5, targets drawn from the model's own distribution.

    Old and reference log-probabilities are the true ones plus normal drift, advantages are normal. With supports,
    targets are drawn from the distribution on them, which the log-probabilities are of; those of single tokens are 0.
    """
    device = torch.device(device)
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    model, scenario = case.model, case.scenario
    hidden = (normal(case.tokens, model.hidden) * (LOGIT_STD / model.hidden**0.5)).bfloat16()
    weight = torch.empty(model.vocab, model.hidden, dtype=torch.bfloat16, device=device)
    for block in weight.split(16384):
        block.copy_(normal(*block.shape))
    support = None
    if scenario.support is not None:
        support = draw_support(scenario.support, case.tokens, model.vocab, device, generator)
    targets, logprobs, dense_logprobs = _sample(hidden, weight, model.softcap, support, generator)
    lengths = torch.tensor(case.lengths, device=device)
    active = torch.tensor(case.active_sequences, device=device)

    def drifted(nats: float) -> Tensor:
        moved = (logprobs + nats * normal(case.tokens)).clamp(max=-1e-4)
        return moved if support is None else moved.where(support.sizes != 1, 0.0)

    return Batch(
        case,
        hidden.requires_grad_(scenario.gradient),
        weight.requires_grad_(scenario.gradient and scenario.trains_head),
        targets,
        torch.ones(case.tokens, dtype=torch.bool, device=device),
        torch.arange(case.sequences, device=device).repeat_interleave(lengths),
        offsets_of(lengths),
        normal(case.sequences) * active,
        logprobs,
        drifted(OLD_DRIFT),
        drifted(REF_DRIFT),
        support,
        None if support is None else dense_logprobs,
    )


def _sample(
    hidden: Tensor, weight: Tensor, softcap: float | None, support: Support | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(targets, logprobs, logprobs over the whole vocabulary) `[T]`: one token a row drawn from softmax(logits) on its
    support, in float32, 128 rows at a time.
    """
    columns = weight.float().T
    found = []
    for start in range(0, len(hidden), 128):
        rows = hidden[start : start + 128]
        logits = rows.float() @ columns
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_p = dense = torch.log_softmax(logits, -1)
        draws = torch.rand(len(rows), 1, generator=generator, device=hidden.device)
        if support is None:
            totals = log_p.exp().cumsum(-1)
        else:
            mask = mask_of(support[start : start + 128], weight.shape[0])
            log_p = torch.log_softmax(logits.masked_fill(~mask, -torch.inf), -1)
            totals = log_p.exp().cumsum(-1)
            draws = (1 - draws) * totals[:, -1:]  # in (0, total]: never where nothing was added
        chosen = torch.searchsorted(totals, draws).clamp(max=weight.shape[0] - 1)
        found.append([chosen, log_p.gather(-1, chosen), dense.gather(-1, chosen)])
    targets, logprobs, dense_logprobs = (torch.cat(parts).squeeze(-1) for parts in zip(*found, strict=True))
    return targets, logprobs, dense_logprobs
