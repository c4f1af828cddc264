"""Master weights: float32 sums and updates behind 16-bit parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.errors import ConfigError
from grpo_fast.trainer.optim import MasterWeights, Optimizer
from grpo_fast.trainer.recipe import config_from_dict


def config(**changes) -> TrainConfig:
    values = {"output_dir": "o", "data": {"task": "t"}, "rewards": [{"function": "f"}], "lr_scheduler_type": "constant"}
    return config_from_dict(values | {"learning_rate": 1e-2, "max_steps": 10} | changes)


class Net(nn.Module):
    """An embedding tied to the head, and a layer between."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.Linear(4, 4)
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(self.embed(ids))) @ self.embed.weight.T


def loss_of(net: Net, seed: int) -> torch.Tensor:
    ids = torch.randint(7, (5,), generator=torch.Generator().manual_seed(seed))
    return net(ids).float().square().mean()


def test_gradients_add_up_in_float32():
    """1 + 255 x 2^-9: in bfloat16 every small one would be lost."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    weights = MasterWeights(net, enabled=True)
    for scale in [1.0] + [2.0**-9] * 255:
        (net.weight.sum() * scale).backward()
        assert net.weight.grad is None
    assert weights.gradients()[0].item() == 1 + 255 * 2.0**-9


def test_a_new_step_forgets_the_last_ones_gradients():
    net = Net(torch.bfloat16)
    weights = MasterWeights(net, enabled=True)
    for _ in range(2):
        weights.start_step()
        loss_of(net, 0).backward()
    once = MasterWeights(net, enabled=True)
    # Its hooks come after those of `weights`, which have taken the gradients: use them alone.
    for hook in weights._hooks:
        hook.remove()
    loss_of(net, 0).backward()
    for twice, fresh in zip(weights.gradients(), once.gradients(), strict=True):
        assert torch.equal(twice, fresh)
    once.start_step()
    assert all(not gradient.any() for gradient in once.gradients())


def test_direct_and_hooked_gradients_share_a_buffer():
    net = Net(torch.bfloat16)
    weights = MasterWeights(net, enabled=True)
    for order in ("direct first", "hook first"):
        weights.start_step()
        if order == "direct first":
            weights.main_grad(net.embed.weight).add_(1.0)
        loss_of(net, 0).backward()
        if order == "hook first":
            weights.main_grad(net.embed.weight).add_(1.0)
        with_direct = weights.gradients()[0].clone()
        weights.start_step()
        loss_of(net, 0).backward()
        torch.testing.assert_close(with_direct, weights.gradients()[0] + 1.0)
    assert MasterWeights(Net(torch.float32), enabled=True).main_grad(net.embed.weight) is None


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_float32_training_is_torchs_adamw(schedule):
    options = {"weight_decay": 0.1, "max_grad_norm": 0.05, "warmup_steps": 2, "lr_scheduler_type": schedule}
    settings = config(**options)
    ours, theirs = Net(torch.float32), Net(torch.float32)
    optimizer = Optimizer(MasterWeights(ours, enabled=True), settings)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2)
    from transformers import get_scheduler

    reference_schedule = get_scheduler(schedule, reference, num_warmup_steps=2, num_training_steps=10)
    for step in range(5):
        optimizer.weights.start_step()
        loss_of(ours, step).backward()
        assert optimizer.learning_rate == reference_schedule.get_last_lr()[0]
        norm = optimizer.clip()
        optimizer.step()
        reference.zero_grad()
        loss_of(theirs, step).backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        assert norm == pytest.approx(float(expected), rel=1e-5)
        assert norm > 0.05
        reference.step()
        reference_schedule.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_small_updates_reach_a_16_bit_model_only_through_masters():
    moved = {}
    for enabled in (True, False):
        net = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        nn.init.ones_(net.weight)
        optimizer = Optimizer(MasterWeights(net, enabled=enabled), config(learning_rate=1e-3))
        for _ in range(20):  # each moves the weight by about 1e-3; bfloat16's step below 1 is 4e-3
            optimizer.weights.start_step()
            net(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
            optimizer.clip()
            optimizer.step()
        moved[enabled] = 1 - net.weight.item()
    assert moved[True] == pytest.approx(0.02, abs=4e-3)
    assert moved[False] == 0


def test_parameters_without_a_gradient_get_zero():
    """As with a dropped batch: AdamW's momentum goes on, whatever the dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        net = Net(dtype)
        optimizer = Optimizer(MasterWeights(net, enabled=True), config())
        for step in range(2):
            optimizer.weights.start_step()
            if step == 0:
                loss_of(net, 0).backward()
            before = [master.detach().clone() for _, master in optimizer.weights]
            norm = optimizer.clip()
            optimizer.step()
        assert norm == 0
        assert all(not torch.equal(old, new) for old, (_, new) in zip(before, optimizer.weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_continues_exactly(dtype):
    def run(optimizer: Optimizer, net: Net, steps: range) -> None:
        for step in steps:
            optimizer.weights.start_step()
            loss_of(net, step).backward()
            optimizer.clip()
            optimizer.step()

    settings = config(lr_scheduler_type="cosine", warmup_steps=2)
    whole, first, second = Net(dtype), Net(dtype), Net(dtype)
    expected = Optimizer(MasterWeights(whole, enabled=True), settings)
    run(expected, whole, range(6))
    part = Optimizer(MasterWeights(first, enabled=True), settings)
    run(part, first, range(3))
    resumed = Optimizer(MasterWeights(second, enabled=True), settings)
    resumed.load_tensors({name: tensor.clone() for name, tensor in part.tensors().items()})
    resumed.go_to(3)
    run(resumed, second, range(3, 6))
    assert resumed.learning_rate == expected.learning_rate
    assert resumed.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name
    for mine, other in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_foreign_tensors_are_refused():
    optimizer = Optimizer(MasterWeights(Net(torch.float32), enabled=True), config())
    with pytest.raises(ValueError, match=r"embed.weight: expected a tensor of shape \[7, 4\]; got none"):
        optimizer.load_tensors({})


@pytest.mark.parametrize("name", ["fastest", "reduce_lr_on_plateau"])
def test_schedules_that_cannot_be_used(name):
    with pytest.raises(ConfigError, match="lr_scheduler_type"):
        Optimizer(MasterWeights(Net(torch.float32), enabled=True), config(lr_scheduler_type=name))


def test_nothing_to_train():
    with pytest.raises(ConfigError, match="expected trainable parameters"):
        Optimizer(MasterWeights(Net(torch.float32).requires_grad_(False), enabled=True), config())
