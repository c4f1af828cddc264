"""A model whose forward gives log-probabilities or the loss: the numbers, the wrappers, the multimodal chunks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.cases import rel_rms

pytest.importorskip("transformers")

from grpo_fast.config import LossConfig
from grpo_fast.integrations.lm_head import Objective, fuse_lm_head
from grpo_fast.loss import policy_loss
from grpo_fast.packing import Support

COMPLETION = 5
REPO = Path(__file__).resolve().parent.parent


def batch(count: int = 4) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(3, tiny.VOCAB_SIZE, (count, 9), generator=gen)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, -2:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def scores(model: Any, data: dict[str, torch.Tensor], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies from full logits."""
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits[:, :-1] / temperature
    everything = F.log_softmax(logits.float(), dim=-1)
    chosen = everything.gather(-1, data["labels"][:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    mask = data["labels"][:, 1:] != -100
    return chosen * mask, -(everything.exp() * everything).sum(-1) * mask


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_logprobs(kind: str) -> None:
    """Values and all gradients are those of full logits; without the keyword the forward is the old one."""
    data = batch()
    fused, plain = tiny.model(kind).train(), tiny.model(kind).train()
    fuse_lm_head(fused, temperature=0.7)
    out = fused(**data, fused_lm_head=True)
    logprobs, entropy = scores(plain, data, 0.7)
    assert rel_rms(out.log_probs.detach(), logprobs.detach()) < 1e-5
    assert rel_rms(out.entropy.detach(), entropy.detach()) < 1e-5
    assert torch.equal(out.label_mask, data["labels"][:, 1:] != -100)
    assert out.loss.item() == pytest.approx(-logprobs.sum().item() / out.label_mask.sum().item(), rel=1e-5)
    (out.log_probs.sum() + 0.3 * out.entropy.sum()).backward()
    (logprobs.sum() + 0.3 * entropy.sum()).backward()
    for (name, mine), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert rel_rms(mine.grad, other.grad) < 1e-4, name
    with torch.no_grad():
        assert torch.equal(fused(data["input_ids"]).logits, plain(data["input_ids"]).logits)
        assert fused(**data).loss.item() == pytest.approx(plain(**data).loss.item())
        shifted = {name: data[name] for name in ("input_ids", "attention_mask")}
        shift = F.pad(data["labels"][:, 1:], (0, 1), value=-100)
        again = fused(**shifted, shift_labels=shift, fused_lm_head=True)
    assert torch.equal(again.log_probs[:, :-1], out.log_probs)


def test_the_loss_of_an_objective() -> None:
    data = batch()
    fused, plain = tiny.model().train(), tiny.model().train()
    head = fuse_lm_head(fused)
    gen = torch.Generator().manual_seed(2)
    advantages, mask = torch.randn(4, generator=gen), data["labels"][:, -COMPLETION:] != -100
    logprobs, _ = scores(plain, data, 1.0)
    old = logprobs.detach()[:, -COMPLETION:] + 0.3 * torch.randn(4, COMPLETION, generator=gen)
    config = LossConfig(all_token_metrics=True)
    objective = Objective(advantages, mask, config=config, old_logprobs=old, normalizer=11.0)
    out = fused(**data, fused_lm_head=objective)
    expected = policy_loss(
        logprobs[:, -COMPLETION:], advantages, loss_mask=mask, old_logprobs=old, config=config, normalizer=11.0
    )
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert out.log_probs.shape == (4, 8)
    assert not out.log_probs.requires_grad
    assert rel_rms(out.log_probs[:, -COMPLETION:], logprobs.detach()[:, -COMPLETION:]) < 1e-5
    assert head.last is not None
    assert head.last.plan == "single_pass"
    out.loss.backward()
    expected.loss.backward()
    for (name, mine), other in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        assert rel_rms(mine.grad, other[1].grad) < 1e-4, name


@pytest.mark.parametrize("rows", [9, 8, 6], ids=["as labels", "as targets", "of the completion"])
def test_on_supports(rows: int) -> None:
    """Labels' supports, or the last of them: log-probabilities, loss and gradients are those of masked logits."""
    data = batch()
    mask = data["labels"] != -100
    kept = torch.rand(4, 9, tiny.VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) < 0.2
    kept.scatter_(-1, data["input_ids"].unsqueeze(-1), True)
    kept[0, 5] = True  # the whole vocabulary
    support = Support.from_mask(kept[:, -rows:])
    fused, plain = tiny.model().train(), tiny.model().train()
    fuse_lm_head(fused, temperature=0.7)
    logits = plain(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits[:, :-1] / 0.7
    everything = logits.masked_fill(~kept[:, 1:], -torch.inf).log_softmax(-1)
    logprobs = everything.gather(-1, data["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1) * mask[:, 1:]
    entropy = -(everything.exp() * everything.masked_fill(~kept[:, 1:], 0.0)).sum(-1) * mask[:, 1:]
    out = fused(**data, fused_lm_head=True, support=support)
    assert rel_rms(out.log_probs.detach(), logprobs.detach()) < 1e-5
    assert rel_rms(out.entropy.detach(), entropy.detach()) < 1e-5
    advantages, config = torch.tensor([1.0, -0.5, 0.3, -1.0]), LossConfig(temperature=0.7)
    objective = Objective(advantages, mask[:, -COMPLETION:], config=config, normalizer=11.0)
    loss = fused(**data, fused_lm_head=objective, support=support).loss
    expected = policy_loss(
        logprobs[:, -COMPLETION:], advantages, loss_mask=mask[:, -COMPLETION:], config=config, normalizer=11.0
    ).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (loss + out.log_probs.sum() + 0.3 * out.entropy.sum()).backward()
    (expected + logprobs.sum() + 0.3 * entropy.sum()).backward()
    for (name, mine), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert rel_rms(mine.grad, other.grad) < 1e-4, name
    with torch.no_grad():
        shifted = {name: data[name] for name in ("input_ids", "attention_mask")}
        shift = F.pad(data["labels"][:, 1:], (0, 1), value=-100)
        ahead = Support.from_mask(F.pad(kept[:, 1:], (0, 0, 0, 1)))
        again = fused(**shifted, shift_labels=shift, fused_lm_head=True, support=ahead)
    assert torch.equal(again.log_probs[:, :-1], out.log_probs)
    with pytest.raises(ValueError, match="support: expected as many rows for each of 4 sequences; got 7"):
        fused(**data, fused_lm_head=True, support=support[:7])
    with pytest.raises(ValueError, match="support: expected a Support; got list"):
        fused(**data, fused_lm_head=True, support=[[1]])
    with pytest.raises(ValueError, match="support: expected None without fused_lm_head"):
        fused(**data, support=support)


def test_generation_still_works() -> None:
    fused, plain = tiny.model(), tiny.model()
    fuse_lm_head(fused)
    ids = batch(2)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(fused.generate(ids, **options), plain.generate(ids, **options))
    with pytest.raises(ValueError, match="not_an_argument"):
        fused.generate(ids, **options, not_an_argument=1)


def test_labels_are_needed() -> None:
    model = tiny.model()
    fuse_lm_head(model)
    with pytest.raises(ValueError, match="labels: expected"):
        model(input_ids=batch()["input_ids"], fused_lm_head=True)


# -- wrappers ---------------------------------------------------------------------------------------------------------


def _ranks(rank: int, port: int) -> None:
    """One of two processes."""
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for mode in ("ddp", "fsdp2", "fsdp2-head"):
        _check_gradients(rank, mode)
    dist.destroy_process_group()


def _check_gradients(rank: int, mode: str) -> None:
    """A wrapped model's gradients equal those of the mean of both ranks' losses."""
    data, advantages = batch(4), torch.tensor([1.0, -0.5, 0.3, -1.0])
    tied = mode != "fsdp2-head"
    model, plain = (tiny.model(tie_word_embeddings=tied).train() for _ in range(2))
    fuse_lm_head(model)
    fuse_lm_head(plain)

    def loss(model: Any, part: slice) -> torch.Tensor:
        mine = {name: values[part] for name, values in data.items()}
        mask = mine["labels"][:, -COMPLETION:] != -100
        objective = Objective(advantages[part], mask, config=LossConfig(), normalizer=10.0)
        kept = (mine["input_ids"].unsqueeze(-1) + torch.arange(3)) % tiny.VOCAB_SIZE
        support = Support.from_padded(kept[:, -COMPLETION:])
        if mode == "ddp":
            return model(**mine, fused_lm_head=objective, support=support).loss
        scores = model(**mine, fused_lm_head=True, support=support).log_probs
        return model(**mine, fused_lm_head=objective).loss + 0.1 * scores.sum()

    ((loss(plain, slice(0, 2)) + loss(plain, slice(2, 4))) / 2).backward()
    wrapped = _wrapped(model, mode)
    loss(wrapped, slice(2 * rank, 2 * rank + 2)).backward()
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        grad = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
        assert rel_rms(grad, other.grad) < 1e-5, (mode, name)


def _wrapped(model: Any, mode: str) -> Any:
    if mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if mode == "fsdp2-head":  # sharded on its own: not gathered in the model's forward
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.slow
def test_inside_wrappers() -> None:
    """DDP, FSDP2 and FSDP2 with the head in a unit of its own, over two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = f"from tests.test_integrations_lm_head import _ranks; _ranks({{}}, {port})"
    ranks = [
        subprocess.Popen([sys.executable, "-c", command.format(rank)], cwd=REPO, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        results = [(rank.communicate(timeout=120)[1], rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(code == 0 for _, code in results), "\n".join(error for error, _ in results)
