"""The fused forward as machine code, without a GPU: no spills, the architecture's matrix instructions, asynchronous."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton", reason="kernels are compiled by triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from grpo_fast.kernels import aot, sass  # noqa: E402
from grpo_fast.kernels.configuration import Configuration  # noqa: E402
from grpo_fast.kernels.forward_launches import LAUNCHES, default_launch  # noqa: E402
from grpo_fast.kernels.forward_logprobs import aot_configurations  # noqa: E402

CASES = [(configuration, arch) for configuration in aot_configurations() for arch in configuration.arches]
MATRIX_INSTRUCTIONS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
CONSUMER_SHARED_BYTES = 99 * 1024
"""What a block may have on sm_86, sm_89 and sm_120, which run what is compiled for sm_80."""


@pytest.mark.parametrize(("configuration", "arch"), CASES, ids=[f"{c.label} sm_{arch}" for c, arch in CASES])
def test_machine_code(configuration: Configuration, arch: int) -> None:
    report = aot.report(configuration, arch)
    assert report.spilled_bytes == 0
    if configuration.signature.get("hidden", "").endswith("fp32") or "combine" in configuration.label:
        assert report.tensor_cores == ""  # float32 is not rounded to tf32
    else:
        assert report.tensor_cores == MATRIX_INSTRUCTIONS[arch]
    if arch == 80:
        assert report.shared_bytes <= CONSUMER_SHARED_BYTES


def test_hopper_loads_by_tma_and_waits_for_no_product_at_once() -> None:
    """In the loop over H one product is left running; the compiler makes them wait where it must copy accumulators."""
    configuration = next(c for c, arch in CASES if arch == 90 and "descriptors" in c.label)
    program = sass.parse(aot.listing(aot.compile_kernel(configuration, 90).asm["cubin"]))
    loops = [loop for loop in sass.find_loops(program) if loop.count("HGMMA")]
    assert len(loops) == 2  # whole tiles, and the ragged one
    for loop in loops:
        waits = [i.operands for i in loop.instructions if i.opcode == "WARPGROUP.DEPBAR.LE"]
        assert sorted(waits) == ["gsb0, 0x0", "gsb0, 0x1"]  # the former in the epilogue
        assert loop.count("HGMMA") == 4
        assert loop.count("UTMALDG") == 2
        # Exponents are clamped by a maximum that keeps NaN, one a logit: 128 x 256 of them, 256 threads.
        assert sum(i.opcode.startswith("FMNMX.NAN") for i in loop.instructions) == 128
        assert loop.count("LDL", "STL") == 0


@pytest.mark.parametrize(("architecture", "known"), [(80, 80), (90, 90), (100, 100), (120, 80)])
def test_an_architecture_has_a_launch(architecture: int, known: int) -> None:
    assert default_launch(architecture, 2, aligned=True, bias=False) == LAUNCHES[known]
