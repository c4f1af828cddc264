"""The group kernels compiled for sm_80, sm_90 and sm_100, without a GPU; what they compute is in tests/interpreted."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="kernels are compiled by triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from grpo_fast.kernels import aot
from grpo_fast.kernels.configuration import ARCHES, Configuration

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
