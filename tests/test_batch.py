"""Experiences and how they are cut into packs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_fast.packing import Support
from grpo_fast.trainer.attention import NAME, PackLayout, attention_set_to, register
from grpo_fast.trainer.batch import Experience, MicroBatch, bounds, build_microbatches, move_together
from tests import tiny

CPU = torch.device("cpu")
PROMPTS = (4, 7, 3)
COMPLETIONS = (5, 1, 8, 2, 6, 6, 3, 9, 1, 4, 4, 4)  # four a prompt


@pytest.fixture
def data() -> Experience:
    count = sum(COMPLETIONS)
    return Experience(
        num_generations=4,
        prompts=torch.arange(100, 100 + sum(PROMPTS)),
        prompt_bounds=bounds(PROMPTS),
        tokens=torch.arange(1000, 1000 + count),
        token_bounds=bounds(COMPLETIONS),
        sampling_logprobs=torch.arange(count) / 100,
        advantages=torch.arange(12.0),
        in_loss=torch.arange(12) % 3 != 0,
    )


def supports() -> Support:
    """Of all tokens, 0 to 4 words each."""
    sizes = torch.arange(sum(COMPLETIONS)) * 3 % 5
    return Support(torch.arange(int(sizes.sum()), dtype=torch.int32), bounds(sizes.tolist()))


def build(data: Experience, numbers, max_tokens: int):
    return build_microbatches(data, numbers, max_tokens=max_tokens, implementation="sdpa", device=CPU)


@pytest.mark.parametrize("max_tokens", [1, 20, 30, 45, 1000])
def test_every_target_is_predicted_once_by_its_predecessor(data, max_tokens):
    numbers = [0, 1, 2, 3, 5, 6, 9, 10, 11]
    packs = build(data, numbers, max_tokens)
    assert sorted(number for pack in packs for number in pack.completions.tolist()) == numbers
    for pack in packs:
        ids, positions = pack.input_ids[0], pack.position_ids[0]
        for sequence, number in enumerate(pack.completions.tolist()):
            rows = slice(int(pack.cu_seqlens[sequence]), int(pack.cu_seqlens[sequence + 1]))
            span, prompt = data.span(number), data.prompt(number)
            own = data.tokens[span.start : span.stop]
            assert torch.equal(pack.targets[rows], own)
            assert torch.equal(pack.token_index[rows], torch.arange(span.start, span.stop))
            # What predicts token t is the prompt's last token, then the completion's token before it.
            assert torch.equal(ids[pack.rows[rows]], torch.cat([prompt[-1:], own[:-1]]))
            start = prompt.numel() - 1
            assert torch.equal(positions[pack.rows[rows]], torch.arange(start, start + own.numel()))
        inputs = pack.loss_inputs(data)
        assert torch.equal(inputs["sampling_logprobs"], data.sampling_logprobs[pack.token_index])
        assert torch.equal(inputs["advantages"], data.advantages[pack.completions])
        assert inputs["old_logprobs"] is inputs["ref_logprobs"] is None


@pytest.mark.parametrize("max_tokens", [20, 30, 45, 1000])
def test_packs_keep_to_the_budget(data, max_tokens):
    packs = build(data, range(12), max_tokens)
    assert max(pack.input_ids.numel() for pack in packs) <= max_tokens
    assert len(packs) == 1 or max_tokens < 1000
    # Prompts are in a pack once: 14 prompt tokens and all but the last token of each completion.
    assert sum(pack.input_ids.numel() for pack in packs) >= sum(PROMPTS) + sum(COMPLETIONS) - 12
    if max_tokens == 1000:
        assert packs[0].input_ids.numel() == sum(PROMPTS) + sum(COMPLETIONS) - 12


def test_a_sequence_beyond_the_budget_has_a_pack_of_its_own(data):
    packs = build(data, range(12), 1)
    assert [pack.completions.numel() for pack in packs] == [1] * 12


def test_no_completions_no_packs(data):
    assert build(data, [], 100) == []


def test_empty_completions_have_no_rows(data):
    lengths = (0, 3, 0, 0, *COMPLETIONS[4:])
    data.token_bounds = bounds(lengths)
    (pack,) = build(data, range(4), 100)
    assert pack.cu_seqlens.tolist() == [0, 0, 3, 3, 3]
    assert pack.num_rows == 3


def test_masks_and_tensors(data):
    assert data.token_mask().tolist() == [bool(number % 3) for number, n in enumerate(COMPLETIONS) for _ in range(n)]
    again = Experience.from_tensors(data.tensors())
    assert again.num_generations == 4
    assert again.old_logprobs is None
    for name, value in data.tensors().items():
        assert torch.equal(again.tensors()[name], value)


def test_supports_go_with_their_tokens(data):
    assert all(pack.support is None for pack in build(data, range(12), 20))
    data.support = supports()
    again = Experience.from_tensors({name: value.clone() for name, value in data.tensors().items()}).support
    assert (again.token_ids.dtype, again.offsets.dtype) == (torch.int32, torch.int64)
    assert torch.equal(again.token_ids, data.support.token_ids)
    assert torch.equal(again.offsets, data.support.offsets)
    packs = build(data, [0, 2, 3, 5, 8, 11], 20)
    assert len(packs) > 1
    for pack in packs:
        assert pack.support.num_rows == pack.num_rows
        for row, number in enumerate(pack.token_index.tolist()):
            words, expected = (s[n : n + 1].token_ids for s, n in ((pack.support, row), (data.support, number)))
            assert words.tolist() == expected.tolist()


# -- what crosses to a device, with the meta device for a GPU ---------------------------------------------------------

META = torch.device("meta")
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave")


class Traffic(TorchDispatchMode):
    """Copies between the CPU and a device, and operations on a device that make the CPU wait for it.

    Attributes:
        copies: (source on the CPU, keywords) of each copy. waits: the operations. pinned: sizes of pinned memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[Any, dict[str, Any]]] = []
        self.waits: list[str] = []
        self.pinned: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        devices = {x.device.type for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)}
        if "device" in kwargs:
            devices.add(torch.device(kwargs["device"]).type)
        if name in ("_to_copy", "copy_", "_copy_from") and len(devices) > 1:
            self.copies.append((args[0], kwargs))
        # An index that is a mask is expanded on the device, which has to say how many there are.
        masks = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if devices - {"cpu"} and (masks or name.startswith(SYNCHRONISING)):
            self.waits.append(name)
        if kwargs.get("pin_memory"):
            self.pinned.append(result.numel())
        return result


def tensors_of(pack: MicroBatch) -> dict[str, torch.Tensor]:
    """All that should be on the device."""
    own = {item.name: getattr(pack, item.name) for item in dataclasses.fields(pack)}
    on_device = {name: value for name, value in own.items() if isinstance(value, torch.Tensor)}
    del on_device["completions"], on_device["token_index"]
    if pack.support is not None:
        on_device |= {"support ids": pack.support.token_ids, "support offsets": pack.support.offsets}
    return on_device | {f"layout/{name}": value for name, value in pack.layout.tensors().items()}


def as_copied(view: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """What a view of the device's buffer holds, read in the memory it was copied from."""
    start = view.storage_offset() * view.element_size()
    return source[start : start + view.nbytes].view(view.dtype).view(view.shape)


@pytest.mark.parametrize("implementation", ["sdpa", "varlen"])
def test_a_pack_crosses_to_the_device_in_one_copy(data, implementation):
    """And its rows' numbers in another; what arrives is bit for bit what a CPU works with."""
    data.old_logprobs = torch.rand(sum(COMPLETIONS))
    data.support = supports()
    (expected,) = build_microbatches(data, range(12), max_tokens=1000, implementation=implementation, device=CPU)
    with Traffic() as traffic:
        (pack,) = build_microbatches(data, range(12), max_tokens=1000, implementation=implementation, device=META)
        inputs = pack.loss_inputs(data)
    assert len(traffic.copies) == 2
    assert not traffic.waits
    assert all(keywords["non_blocking"] for _, keywords in traffic.copies)
    moved, wanted = tensors_of(pack), tensors_of(expected)
    assert moved.keys() == wanted.keys()
    assert len(moved) == (12 if implementation == "sdpa" else 13)
    for name, value in moved.items():
        assert value.device == META, name
        assert value.storage_offset() * value.element_size() % 16 == 0, name
        assert torch.equal(as_copied(value, traffic.copies[0][0]), wanted[name]), name
    for name, value in expected.loss_inputs(data).items():
        assert (value is None) == (inputs[name] is None), name
        assert value is None or torch.equal(as_copied(inputs[name], traffic.copies[1][0]), value), name
    assert (pack.layout.padding_fraction, pack.layout.max_length) == (
        expected.layout.padding_fraction,
        expected.layout.max_length,
    )


def test_a_packs_forward_and_backward_never_wait(data):
    register()
    model = tiny.model().to(META)
    data.tokens, data.prompts = data.tokens % tiny.VOCAB_SIZE, data.prompts % tiny.VOCAB_SIZE
    (pack,) = build_microbatches(data, range(12), max_tokens=1000, implementation="sdpa", device=META)
    with Traffic() as traffic, attention_set_to(model, NAME):
        pack.states(model).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert not traffic.copies
    assert not traffic.waits


def test_the_spy_sees_what_waits():
    """The mutation check of the two tests above."""
    values, mask = torch.zeros(3, device=META), torch.ones(3, dtype=torch.bool, device=META)
    with Traffic() as traffic:
        torch.arange(3).to(META)
        for wait in (lambda: values[0].item(), lambda: values[mask], lambda: mask.nonzero()):
            with pytest.raises((RuntimeError, NotImplementedError)):  # there is no number on this device
                wait()
    assert len(traffic.copies) == 1


def test_what_crosses_to_a_gpu_is_pinned():
    tensors = {"a": torch.arange(3), "empty": torch.zeros(2, 0, dtype=torch.bool), "b": torch.zeros(5)}
    with FakeTensorMode() as fake:
        given = {name: fake.from_tensor(value) for name, value in tensors.items()}
        with Traffic() as traffic:
            moved = move_together(given, torch.device("cuda:1"))
    assert traffic.pinned == [128]  # 24 and 20 bytes in pieces of 64
    ((_, keywords),) = traffic.copies
    assert keywords["non_blocking"]
    for name, value in tensors.items():
        assert moved[name].device == torch.device("cuda:1")
        assert (moved[name].shape, moved[name].dtype) == (value.shape, value.dtype)


def test_on_a_cpu_nothing_is_copied():
    given = {"a": torch.arange(3)}
    assert move_together(given, CPU)["a"] is given["a"]


def test_a_layout_is_made_on_the_cpu():
    layout = PackLayout.build([[range(3)]], 3, implementation="varlen")
    assert {value.device for value in layout.tensors().values()} == {CPU}
