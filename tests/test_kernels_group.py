"""The group kernels compiled for sm_80, sm_90 and sm_100 without a GPU, and on a GPU where there is one.

What they compute is checked, interpreted, in tests/interpreted.
"""

from __future__ import annotations

import os
from itertools import accumulate

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels are compiled by triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from grpo_fast.advantages import group_advantages
from grpo_fast.kernels import aot
from grpo_fast.kernels.configuration import ARCHES, Configuration
from grpo_fast.kernels.group_rows import token_rows
from tests.cases import rel_rms

CONFIGURATIONS = list(aot.configurations(["group_advantages", "group_rows"]))


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda configuration: configuration.label)
def test_compiles_without_spills(configuration: Configuration) -> None:
    reports = {arch: aot.report(configuration, arch) for arch in ARCHES}
    assert {arch: report.spilled_bytes for arch, report in reports.items()} == dict.fromkeys(ARCHES, 0)


def test_products_and_sums_are_not_fused() -> None:
    """R is computed anew in each walk over a group: fused with what follows it would differ, and R - mean not be 0."""
    configurations = [each for each in CONFIGURATIONS if each.kernel.__module__.endswith("group_advantages")]
    assert len(configurations) > 10
    for configuration in configurations:
        assert "fma.rn" not in aot.compile_kernel(configuration, 90).asm["ptx"], configuration.label


# -- on a GPU ---------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["group", "batch", "none", "leave_one_out"])
def test_advantages_on_the_device(scale: str, dtype: torch.dtype) -> None:
    """65536 completions in groups of 1 to 4096 and more, against the CPU; agreeing groups exactly 0; no wait."""
    gen = torch.Generator().manual_seed(0)
    ids = (torch.rand(65536, generator=gen) * 90).square().long()
    ids[:5000] = 10_000
    rewards = torch.randn(65536, 3, generator=gen, dtype=dtype)
    rewards[ids % 5 == 0] = torch.tensor([0.1, 0.7, 1 / 3], dtype=dtype)
    for grouping in ({"group_ids": ids}, {"group_size": 8}, {"group_size": 4096}):
        expected = group_advantages(rewards, scale=scale, **grouping)
        moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in grouping.items()}
        given = rewards.cuda()
        group_advantages(given, scale=scale, **moved)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            runs = [group_advantages(given, scale=scale, **moved) for _ in range(2)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert rel_rms(runs[0], expected) <= (2e-6 if dtype == torch.float32 else 1e-12)
        assert torch.equal(*runs)
        assert torch.equal(runs[0].cpu() == 0, expected == 0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("aggregation", ["sequence_mean", "sequence_sum", "token_mean"])
def test_rows_on_the_device_and_in_a_graph(aggregation: str) -> None:
    """2^20 tokens of many short and one long sequence, against the CPU; a captured graph follows its inputs."""
    gen = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 30, (60_000,), generator=gen)
    lengths[100] = 2**20 - int(lengths.sum()) + int(lengths[100])
    cu_seqlens = torch.tensor([0, *accumulate(lengths.tolist())])
    batches = []
    for seed in range(2):
        gen.manual_seed(seed)
        advantages = torch.randn(60_000, generator=gen) * (torch.rand(60_000, generator=gen) < 0.6)
        batches.append((advantages, torch.rand(2**20, generator=gen) < 0.7))
    static, bounds = [tensor.cuda() for tensor in batches[0]], cu_seqlens.cuda()
    dtypes = {"weights": torch.float32, "token_advantages": torch.float32, "active": torch.bool, "rows": torch.int64}
    out = {name: torch.empty(2**20, dtype=dtype, device="cuda") for name, dtype in dtypes.items()}
    out["num_active"] = torch.empty((), dtype=torch.int64, device="cuda")
    options = {"mask": static[1], "importance": None, "normalizer": None, "aggregation": aggregation}
    token_rows(static[0], bounds, **options, every_row=False, **out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_rows(static[0], bounds, **options, every_row=False, **out)
    for advantages, mask in batches:
        static[0].copy_(advantages)
        static[1].copy_(mask)
        graph.replay()
        spread = advantages.repeat_interleave(lengths) * mask
        assert torch.equal(out["token_advantages"].cpu(), spread)
        assert torch.equal(out["active"].cpu(), spread != 0)
        assert torch.equal(out["rows"][: int(out["num_active"])].cpu(), spread.nonzero()[:, 0])
        inside = torch.zeros(60_000, dtype=torch.int64).index_add_(
            0, torch.arange(60_000).repeat_interleave(lengths), mask.long()
        )
        divisor = {"sequence_mean": 60_000 * inside.repeat_interleave(lengths), "sequence_sum": 60_000}
        expected = mask.double() / divisor.get(aggregation, mask.sum())
        assert rel_rms(out["weights"], expected.nan_to_num(nan=0.0)) <= 1e-6
