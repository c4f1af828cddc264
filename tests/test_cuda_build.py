"""What nvcc makes of csrc/: it builds without a warning, spills nothing, and uses what Hopper has.

One build for two architectures serves all tests here; without nvcc each is a skip that says so. No GPU is needed.
"""

from __future__ import annotations

import fcntl
import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_csrc import CSRC, compiler, load_module

nvcc, resources = (load_module(f"csrc_{name}", CSRC / f"{name}.py") for name in ("nvcc", "resources"))
ARCHITECTURES = ("80", "90a")
ROW_KERNELS, GROUP_KERNELS = 2 + 6 + 6 + 2 + 6, 4
MAX_INSTRUCTIONS = 30
"""A logit, in the two main loops of the cluster's objective kernel."""


@dataclass
class Build:
    """The extension module, the kernels' object file and what nvcc said."""

    module: Path
    kernels: Path
    log: str


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Shared by the workers of a parallel run."""
    found = nvcc.find_nvcc()
    if found is None:
        pytest.skip("no CUDA compiler: nvcc is neither on PATH nor below CUDA_HOME or /usr/local/cuda")
    compiler()  # nvcc needs a host compiler
    pybind11 = pytest.importorskip("pybind11")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_build"
    folder.mkdir(exist_ok=True)
    module, log = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", folder / "log"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            said = nvcc.build(
                found,
                module,
                folder,
                csrc=CSRC,
                includes=[pybind11.get_include(), sysconfig.get_path("include")],
                architectures=ARCHITECTURES,
                ptx=False,
                options=nvcc.WARNINGS_ARE_ERRORS,
            )
            log.write_text(said)
    return Build(module, folder / "row_cuda.o", log.read_text())


@pytest.fixture(scope="session")
def sass(built: Build) -> dict[str, list[tuple[int, str]]]:
    """Instructions of the sm_90a kernels."""
    cuobjdump = resources.disassembler()
    if cuobjdump is None:
        pytest.skip("no disassembler: Triton's package is not installed, or carries none")
    code: dict[str, list[tuple[int, str]]] = resources.instructions(
        nvcc.run([cuobjdump, "--dump-sass", "--gpu-architecture", "sm_90a", built.kernels])
    )
    return code


def test_every_architecture_is_known_to_this_compiler() -> None:
    found = nvcc.find_nvcc()
    if found is None:
        pytest.skip("no CUDA compiler")
    release = re.search(r"release (\d+)\.(\d+)", nvcc.run([found, "--version"]))
    assert release is not None
    if (int(release[1]), int(release[2])) >= (12, 8):
        assert nvcc.supported(found) == nvcc.ARCHITECTURES == ("80", "86", "89", "90a", "100")
    options = nvcc.targets(nvcc.ARCHITECTURES)
    assert "-gencode=arch=compute_90a,code=sm_90a" in options
    assert options[-1] == "-gencode=arch=compute_100,code=compute_100"
    assert (
        nvcc.targets(("80", "90a"))[-1] == "-gencode=arch=compute_90,code=compute_90"
    )  # of 90a it would run nowhere else


def test_a_missing_compiler_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setenv("CUDA_HOME", "/somewhere")
    monkeypatch.setattr(nvcc.shutil, "which", asked.append)
    assert nvcc.find_nvcc() is None
    assert asked == ["nvcc", "/somewhere/bin/nvcc", "/usr/local/cuda/bin/nvcc"]


def test_no_kernel_spills(built: Build) -> None:
    found = resources.parse(built.log)
    assert len(found) == len(ARCHITECTURES) * (ROW_KERNELS + GROUP_KERNELS)
    assert len({kernel.kernel for kernel in found}) == ROW_KERNELS + GROUP_KERNELS
    for kernel in found:
        assert kernel.stack == kernel.spilled == 0, kernel
        assert 0 < kernel.registers <= 64, kernel  # 1024 threads a multiprocessor


def test_the_table_lists_every_kernel(built: Build) -> None:
    lines = (CSRC / "CUDA_RESOURCES.md").read_text().splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines if line.startswith("| ")}
    header = [cell.strip() for cell in rows.pop("kernel")]
    assert header[: len(nvcc.ARCHITECTURES)] == [f"sm_{arch}" for arch in nvcc.ARCHITECTURES]
    assert set(rows) == {kernel.kernel for kernel in resources.parse(built.log)}, "run python csrc/resources.py"
    spills = {
        name: [int(cells[header.index(column)]) for column in ("stack", "spilled")] for name, cells in rows.items()
    }
    assert all(counts == [0, 0] for counts in spills.values()), spills


def test_hopper_rows_come_by_bulk_copies_and_are_read_16_bytes_at_a_time(sass: dict[str, Any]) -> None:
    clusters = {name: [resources.opcode(text) for _, text in body] for name, body in sass.items() if "cluster" in name}
    assert len(clusters) == 8
    for name, opcodes in clusters.items():
        for needed in ("UBLKCP", "SYNCS.PHASECHK", "UCGABAR_ARV", "UCGABAR_WAIT", "LDS.128"):
            assert any(opcode.startswith(needed) for opcode in opcodes), f"{name}: no {needed}"
        assert not any(opcode.startswith(("LDL", "STL")) for opcode in opcodes), name
    for name, body in sass.items():
        if "stream" in name:
            assert any(resources.opcode(text).startswith("LDG.E.128") for _, text in body), name
        if "float32" in name:
            assert any(resources.opcode(text).startswith("STG.E.128") for _, text in body), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_instructions_a_logit(dtype: str, sass: dict[str, Any]) -> None:
    main = resources.loops(sass[f"cluster objective {dtype}"], "LDS.128", 4)
    assert len(main) == 2, "the statistics' sweep and the gradient's, four vectors of four logits each"
    assert any(opcode.startswith("STG") for opcode in main[0] + main[1])
    instructions = sum(len(loop) for loop in main) / 16
    assert 8 <= instructions <= MAX_INSTRUCTIONS, instructions


def test_errors_name_the_kernel_and_its_shape(built: Build) -> None:
    module = load_module("built._cuda", built.module)
    assert module.ARCHITECTURES == "sm_80,sm_90a"
    rows = module.Rows(
        logits=4096,
        num_rows=2,
        num_columns=100,
        row_stride=128,
        targets=0,
        bias=0,
        logit_scale=1.0,
        softcap=0.0,
        temperature=1.0,
        row_temperature=0,
    )
    with pytest.raises(ValueError, match="dx: expected memory apart from the logits, or rows 192 bytes into theirs"):
        module.row_gradient(
            rows,
            **dict.fromkeys(("lse", "entropy", "g", "e", "vocab_start", "device", "stream"), 0),
            dx=4096,
            dx_stride=256,
            dtype=module.DType.bfloat16,
        )
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: test_gpu_cuda.py makes real launches fail")
    with pytest.raises(RuntimeError, match=r"row_statistics of \[2, 100\]: cudaGetDevice: cudaError"):
        module.row_statistics(rows, logprobs=0, entropy=0, lse=0, device=0, stream=0)
