"""What row compaction saves: a full step with every group active, and with half of the groups at zero advantage.

    pytest benchmarks/test_compaction.py --benchmark-json=benchmarks/results/<device>/compaction.json

Legend: T tokens, H hidden size, V vocabulary. Rounds of the two cases alternate, so that both see the same machine; the
loss and gradients with compaction are first compared with those without (the same up to summation order).
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from grpo_fast.loss import LossConfig, LossOutput, grpo_loss

ROUNDS = 7
SHAPES = [
    pytest.param(2048, 576, 49152, id="smollm2-135m-T2048"),
    pytest.param(512, 1024, 151936, id="qwen3-0.6b-T512"),
]


@dataclass
class Step:
    """A dapo step in bfloat16: logits of realistic spread, 32 sequences, forward and backward."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor

    @staticmethod
    def of(tokens: int, width: int, vocab: int) -> Step:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, width, generator=generator) * 2.5 / width**0.5
        return Step(
            hidden.bfloat16().requires_grad_(),
            torch.randn(vocab, width, generator=generator).bfloat16().requires_grad_(),
            torch.randint(0, vocab, (tokens,), generator=generator),
            torch.arange(33) * (tokens // 32),
        )

    def run(self, advantages: torch.Tensor, config: LossConfig = LossConfig()) -> LossOutput:
        self.hidden.grad = self.weight.grad = None
        out = grpo_loss(self.hidden, self.weight, self.targets, advantages, cu_seqlens=self.cu_seqlens, config=config)
        out.loss.backward()
        return out

    def gradients(self) -> list[torch.Tensor]:
        return [self.hidden.grad.clone(), self.weight.grad.clone()]


def machine() -> dict[str, Any]:
    """What a number needs beside it."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@pytest.mark.parametrize(("tokens", "width", "vocab"), SHAPES)
def test_half_of_the_groups_at_zero_advantage(benchmark: Any, tokens: int, width: int, vocab: int) -> None:
    """At most 0.62 of the dense time."""
    step = Step.of(tokens, width, vocab)
    dense = torch.randn(32, generator=torch.Generator().manual_seed(1))
    half = dense * (torch.arange(32) // 8 % 2)  # groups of 8
    compact = step.run(half)
    compact_gradients = step.gradients()
    full = step.run(half, LossConfig(all_token_metrics=True))
    assert compact.loss.item() == pytest.approx(full.loss.item(), rel=1e-5)
    for ours, theirs in zip(compact_gradients, step.gradients(), strict=True):
        assert (ours.float() - theirs.float()).norm() <= 4e-3 * theirs.float().norm()  # bf16 dz, other chunks

    times: dict[str, list[float]] = {"dense": [], "half": []}

    def both() -> None:
        for name, advantages in (("dense", dense), ("half", half)):
            start = time.perf_counter()
            step.run(advantages)
            times[name].append(time.perf_counter() - start)

    both()
    for values in times.values():
        values.clear()
    benchmark.pedantic(both, rounds=ROUNDS, iterations=1)
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    benchmark.extra_info.update(
        machine(),
        dense_seconds=times["dense"],
        half_seconds=times["half"],
        dense_median=medians["dense"],
        half_median=medians["half"],
        ratio=medians["half"] / medians["dense"],
        backend=compact.backend,
        plan=compact.plan,
    )
    print(
        f"\nT={tokens} V={vocab}: dense {medians['dense']:.2f} s, half {medians['half']:.2f} s, "
        f"ratio {medians['half'] / medians['dense']:.2f}"
    )
    assert medians["half"] <= 0.62 * medians["dense"]
