"""Rollouts as flat tensors, and their micro-batches: packs without padding, by token budget.

Legend: P prompts, G completions a prompt, B = P * G completions (completion b answers prompt b // G), N completion
tokens of the rollout; in a micro-batch T pack tokens, R rows (completion tokens of it), S completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.head import hidden_states
from grpo_fast.packing import Support
from grpo_fast.trainer.attention import NAME, PackLayout, attention_set_to
from grpo_fast.trainer.errors import ModelError


def bounds(lengths: Sequence[int]) -> Tensor:
    """`[len + 1]` int64 cumulative lengths, from 0."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


@dataclass
class Experience:
    """One rollout as the update needs it: CPU tensors, so that a checkpoint can hold it as it is.

    Attributes:
        num_generations: G.
        prompts: `[sum of prompt lengths]` int64, and `prompt_bounds` `[P+1]`.
        tokens: `[N]` int64 sampled tokens, end-of-text included, and `token_bounds` `[B+1]`.
        sampling_logprobs: `[N]` float32 of the sampler (nats).
        advantages: `[B]` float32.
        in_loss: `[B]` bool; False for truncated completions that are left out.
        old_logprobs, ref_logprobs: `[N]` float32 or None; NaN where nothing needs them.
        support: N rows, the words that each token was drawn from (int32); None: the loss is of the whole vocabulary.
    """

    num_generations: int
    prompts: Tensor
    prompt_bounds: Tensor
    tokens: Tensor
    token_bounds: Tensor
    sampling_logprobs: Tensor
    advantages: Tensor
    in_loss: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    support: Support | None = None

    @property
    def num_completions(self) -> int:
        """B."""
        return self.advantages.numel()

    def prompt(self, completion: int) -> Tensor:
        """Token ids of the prompt that a completion answers."""
        number = completion // self.num_generations
        return self.prompts[self.prompt_bounds[number] : self.prompt_bounds[number + 1]]

    def span(self, completion: int) -> range:
        """Where a completion's tokens stand in the `[N]` tensors."""
        return range(int(self.token_bounds[completion]), int(self.token_bounds[completion + 1]))

    def token_mask(self) -> Tensor:
        """`[N]` bool: the tokens that may carry loss."""
        return torch.repeat_interleave(self.in_loss, self.token_bounds.diff())

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors; `Experience.from_tensors` reads it back."""
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        present["num_generations"] = torch.tensor(self.num_generations)
        support = present.pop("support")
        if support is not None:
            present |= {"support.token_ids": support.token_ids, "support.offsets": support.offsets}
        return {name: value for name, value in present.items() if value is not None}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Experience:
        """The experience that `tensors()` gave."""
        values: dict[str, Any] = dict(tensors)
        values["num_generations"] = int(tensors["num_generations"])
        if "support.token_ids" in values:
            values["support"] = Support(values.pop("support.token_ids"), values.pop("support.offsets"))
        return Experience(**values)


@dataclass(frozen=True)
class MicroBatch:
    """A pack that goes through the model at once.

    Attributes:
        input_ids, position_ids: `[1, T]` int64.
        layout: who sees whom.
        rows: `[R]` the pack token whose state predicts each target.
        targets: `[R]` int64.
        cu_seqlens: `[S+1]` int64 bounds of the completions among the rows.
        completions: `[S]` their numbers in the experience (CPU).
        token_index: `[R]` where each row stands in the experience's `[N]` tensors (CPU).
        support: of the targets, R rows; or None.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: PackLayout
    rows: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    completions: Tensor
    token_index: Tensor
    support: Support | None = None

    @property
    def num_rows(self) -> int:
        """R."""
        return self.targets.numel()

    def states(self, model: nn.Module) -> Tensor:
        """The states that predict the targets, `[R, H]`: the backbone only, logits never exist."""
        states = hidden_states(
            model, input_ids=self.input_ids, position_ids=self.position_ids, pack_layout=self.layout, use_cache=False
        )
        return states[0][self.rows]

    def loss_inputs(self, experience: Experience) -> dict[str, Any]:
        """What `grpo_loss` needs of the experience, by its argument, on the pack's device: one copy."""
        taken = {"advantages": experience.advantages[self.completions]}
        for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs"):
            values = getattr(experience, name)
            if values is not None:
                taken[name] = values[self.token_index]
        return {"old_logprobs": None, "ref_logprobs": None, **move_together(taken, self.targets.device)}


def build_microbatches(
    experience: Experience,
    completions: Sequence[int],
    *,
    max_tokens: int,
    implementation: str,
    device: torch.device,
) -> list[MicroBatch]:
    """Pack `completions` into micro-batches of at most `max_tokens` tokens, each prompt once a pack.

    Groups of like length share a pack; a group larger than the budget is split (its prompt is then repeated), and a
    single sequence larger than the budget has a pack of its own.
    """
    units: list[list[int]] = []
    for _, group in groupby(sorted(completions), key=lambda number: number // experience.num_generations):
        units += _split_group(experience, list(group), max_tokens)
    packs: list[list[int]] = []
    free = 0
    for unit in sorted(units, key=lambda unit: -_longest(experience, unit)):
        needed = _pack_size(experience, unit)
        if not packs or needed > free:
            packs.append([])
            free = max_tokens
        packs[-1] += unit
        free -= needed
    return [_build(experience, pack, implementation, device) for pack in packs]


def _prompt_length(experience: Experience, unit: Sequence[int]) -> int:
    return experience.prompt(unit[0]).numel()


def _longest(experience: Experience, unit: Sequence[int]) -> int:
    return _prompt_length(experience, unit) + max(len(experience.span(number)) for number in unit)


def _pack_size(experience: Experience, unit: Sequence[int]) -> int:
    """Pack tokens of completions of one prompt. A completion's last token predicts nothing: it is not in the pack."""
    return _prompt_length(experience, unit) + sum(max(len(experience.span(number)) - 1, 0) for number in unit)


def _split_group(experience: Experience, group: list[int], max_tokens: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for number in group:
        if parts[-1] and _pack_size(experience, [*parts[-1], number]) > max_tokens:
            parts.append([])
        parts[-1].append(number)
    return parts


def _build(experience: Experience, pack: Sequence[int], implementation: str, device: torch.device) -> MicroBatch:
    pieces: list[Tensor] = []
    positions: list[Tensor] = []
    rows: list[Tensor] = []
    sequences: list[tuple[range, range]] = []
    end = 0
    for _, group in groupby(pack, key=lambda number: number // experience.num_generations):
        members = list(group)
        prompt = experience.prompt(members[0])
        pieces.append(prompt)
        positions.append(torch.arange(prompt.numel()))
        prompt_span = range(end, end + prompt.numel())
        end = prompt_span.stop
        for number in members:
            span = experience.span(number)
            inputs = experience.tokens[span.start : max(span.stop - 1, span.start)]
            pieces.append(inputs)
            positions.append(torch.arange(prompt.numel(), prompt.numel() + inputs.numel()))
            own_span = range(end, end + inputs.numel())
            end = own_span.stop
            sequences.append((prompt_span, own_span))
            if len(span):  # the prompt's last token predicts the first one
                rows.append(torch.tensor([prompt_span.stop - 1, *own_span]))
    spans = [experience.span(number) for number in pack]
    token_index = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    layout = PackLayout.build(sequences, end, implementation=implementation)
    own = {
        "input_ids": torch.cat(pieces)[None],
        "position_ids": torch.cat(positions)[None],
        "rows": torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64),
        "targets": experience.tokens[token_index],
    }
    names = layout.tensors().keys()
    # The layout has bounds too, of other sequences.
    others = {"bounds": bounds([len(span) for span in spans])}
    support = None if experience.support is None else experience.support[token_index]
    if support is not None:
        others |= {"support_ids": support.token_ids, "support_offsets": support.offsets}
    moved = move_together({**layout.tensors(), **own, **others}, device)
    return MicroBatch(
        layout=layout.with_tensors({name: moved[name] for name in names}),
        cu_seqlens=moved["bounds"],
        completions=torch.tensor(list(pack)),
        token_index=token_index,
        support=None if support is None else Support.trusted(moved["support_ids"], moved["support_offsets"]),
        **{name: moved[name] for name in own},
    )


_ALIGNMENT = 64  # bytes; kernels are compiled for pointers that are multiples of 16


def move_together(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """CPU tensors on `device`, by one copy from pinned memory for which the CPU does not wait; on a CPU as they are.

    The results are views of one buffer.
    """
    if device.type == "cpu":
        return tensors
    starts = list(accumulate((_rounded_up(value.nbytes) for value in tensors.values()), initial=0))
    # torch's pinned allocator keeps the memory and gives it out again only after the copy.
    staged = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    places = {name: (start, value.nbytes) for start, (name, value) in zip(starts, tensors.items(), strict=False)}
    for name, value in tensors.items():
        staged.narrow(0, *places[name]).view(value.dtype).view(value.shape).copy_(value)
    moved = staged.to(device, non_blocking=True)
    return {name: moved.narrow(0, *places[name]).view(value.dtype).view(value.shape) for name, value in tensors.items()}


def _rounded_up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


@torch.no_grad()
def check_packed_attention(model: Any, *, implementation: str, device: torch.device) -> None:
    """Compare a pack's states with plain forwards of its sequences, once before a run. The model is in eval mode.

    Raises:
        ModelError: they differ, or the model cannot take a pack: it uses an attention that is not supported here.
    """
    config = model.config.get_text_config()
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if chunked or getattr(config, "attention_chunk_size", None):
        raise ModelError(f"model: {config.model_type} has chunked attention, which packed training does not support")
    lengths, prompts = (5, 9, 3, 7), (4, 6)
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    experience = Experience(
        num_generations=2,
        prompts=torch.randint(config.vocab_size, (sum(prompts),), generator=generator),
        prompt_bounds=bounds(prompts),
        tokens=torch.randint(config.vocab_size, (total,), generator=generator),
        token_bounds=bounds(lengths),
        sampling_logprobs=torch.zeros(total),
        advantages=torch.zeros(4),
        in_loss=torch.ones(4, dtype=torch.bool),
    )
    with attention_set_to(model, NAME):
        pack = _build(experience, range(4), implementation, device)
        packed = pack.states(model).float()
    separate = torch.cat([_plain_states(model, experience, number, device) for number in range(4)]).float()
    error = float((packed - separate).norm() / separate.norm())
    # Rounding alone gives 1e-6 in float32 and up to about 2e-2 in bfloat16; a wrong mask or position gives over 0.2.
    limit = 1e-3 if next(model.parameters()).dtype == torch.float32 else 8e-2
    if not error <= limit:
        raise ModelError(
            f"model: {config.model_type} gives other states in a pack than on its own (relative difference "
            f"{error:.1e}, expected at most {limit:g}), so its attention cannot be packed"
        )


def _plain_states(model: nn.Module, experience: Experience, number: int, device: torch.device) -> Tensor:
    """States that predict the completion's tokens, from an ordinary forward of its whole sequence."""
    span, prompt = experience.span(number), experience.prompt(number)
    ids = torch.cat([prompt, experience.tokens[span.start : span.stop]])[None].to(device)
    return hidden_states(model, input_ids=ids, use_cache=False)[0, prompt.numel() - 1 : -1]
