"""What nvcc makes of csrc/: it builds without a warning, spills nothing, and uses what Hopper has.

One build for two architectures serves all tests here; without nvcc each is a skip that says so. No GPU is needed:
launches go to a CUDA runtime that only writes them down (csrc/tests/stand_in_cudart.cpp).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.backends import cuda as cuda_backend
from grpo_fast.backends.base import ObjectiveResults, RowChunk, RowObjective, RowSlopes, RowStatistics, Transform
from grpo_fast.backends.cuda import CudaBackend
from grpo_fast.config import HeadConfig, LossConfig
from grpo_fast.kernels.parameters import PARAMETERS
from grpo_fast.losses import Segments
from grpo_fast.objectives import Tokens
from tests.cards import CARD, card
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
    assert module.PARAMETERS == PARAMETERS
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


# -- launches, written down -------------------------------------------------------------------------------------------

R, V, PITCH = 40, 50257, 50304
STREAM = 4096
ABSENT = 0


@dataclass
class Runtime:
    """grpo_fast._cuda on the runtime that only writes down."""

    module: Any
    library: ctypes.CDLL

    def calls(self) -> list[tuple[str, int, dict[str, Any]]]:
        """(call, device that was current, fields)."""
        lines = [line.split() for line in self.library.stand_in_log().decode().splitlines()]
        fields = [dict(part.split("=") for part in line[2:]) for line in lines]
        numbers = [{k: int(v) if v.isdigit() else v for k, v in each.items()} for each in fields]
        return [(line[0], int(line[1]), each) for line, each in zip(lines, numbers, strict=True)]


@pytest.fixture(scope="session")
def linked(built: Build, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder, compile_with = tmp_path_factory.mktemp("linked"), nvcc.find_nvcc()
    source, stand_in, module = CSRC / "tests" / "stand_in_cudart.cpp", folder / "stand_in.o", folder / "_cuda.so"
    nvcc.run([compile_with, *nvcc.FLAGS, "-O1", "-c", source, "-o", stand_in])
    objects = [built.kernels.with_name(name) for name in ("row_cuda.o", "group_cuda.o", "bindings_cuda.o")]
    nvcc.run([compile_with, "-shared", "-cudart=none", *objects, stand_in, "-o", module])
    loaded, library = load_module("linked._cuda", module), ctypes.CDLL(str(module))
    library.stand_in_log.restype = ctypes.c_char_p
    return Runtime(loaded, library)


@pytest.fixture
def runtime(linked: Runtime, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """Device 0, an sm_80, is current; tensors are on device 1, an sm_90."""
    linked.library.stand_in_begin(0)
    monkeypatch.setattr(cuda_backend, "_cuda", linked.module)
    streams = {CARD.index: SimpleNamespace(cuda_stream=STREAM)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[torch.device("cuda", device).index])
    return linked


def chunk(**options: Any) -> RowChunk:
    transform = Transform(
        HeadConfig(softcap=options.get("softcap")), options.get("bias"), options.get("temperature", 0.7)
    )
    return RowChunk(card(R, PITCH)[:, :V], card(R, dtype=torch.int64), transform, options.get("vocab_start", 0))


def of_rows(rows: RowChunk) -> dict[str, int]:
    transform = rows.transform
    temperature = transform.temperature if isinstance(transform.temperature, Tensor) else None
    return {
        "stream": STREAM,
        "num_rows": R,
        "num_columns": V,
        "row_stride": PITCH,
        "logits": rows.logits.data_ptr(),
        "targets": rows.targets.data_ptr(),
        "bias": ABSENT if transform.bias is None else transform.bias.data_ptr(),
        "row_temperature": ABSENT if temperature is None else temperature.data_ptr(),
        "wide_reads": 1,
        "vocab_start": rows.vocab_start,
    }


def only_launch(runtime: Runtime, kernel: str, expected: dict[str, int]) -> dict[str, Any]:
    """The one launch there was: on the tensors' device, and the one that was current is current again."""
    calls = runtime.calls()
    assert {device for _, device, _ in calls} == {CARD.index}
    (launch,) = [fields for call, _, fields in calls if call == "launch"]
    assert kernel in launch["kernel"]
    assert {name: launch[name] for name in expected} == expected
    assert runtime.library.stand_in_current() == 0
    return launch


def test_statistics_launch(runtime: Runtime) -> None:
    """By clusters, which the sm_90 has and the device that was current has not."""
    rows = chunk(temperature=card(R, offset=1))
    out = RowStatistics(*(card(R, offset=offset) for offset in (1, 2, 3)))
    CudaBackend().statistics(rows, out)
    results = {name: getattr(out, name).data_ptr() for name in ("logprobs", "entropy", "lse")}
    launch = only_launch(runtime, "cluster_kernel", of_rows(rows) | results | {"live": ABSENT, "dx": ABSENT})
    split = runtime.module.row_launch(CARD.index, V)
    assert (launch["cluster"], launch["threads"], launch["shared"]) == (
        split["ranks"],
        split["threads"],
        split["shared_bytes"],
    )
    assert launch["blocks"] == split["ranks"] * 32 == 128  # as many clusters as the device holds


def test_gradient_launch(runtime: Runtime) -> None:
    rows, slopes = chunk(vocab_start=V), RowSlopes(*(card(R, offset=offset) for offset in range(4)))
    dx = CudaBackend().gradient(rows, slopes, dtype=torch.bfloat16)
    given = {"given_lse": slopes.lse, "given_entropy": slopes.entropy, "g": slopes.g, "e": slopes.e, "dx": dx}
    addresses = {name: tensor.data_ptr() for name, tensor in given.items() if tensor is not None}
    launch = only_launch(runtime, "stream_kernel", of_rows(rows) | addresses | {"dx_stride": 2 * PITCH})
    assert (launch["blocks"], launch["threads"], launch["cluster"]) == (R, 1024, 1)


def test_objective_launch(runtime: Runtime) -> None:
    rows, dx = chunk(bias=card(V), softcap=30.0), card(R, PITCH, dtype=torch.float16)[:, :V]
    mask = card(R, dtype=torch.bool)
    given = {"advantages": card(R, offset=1), "old_logprobs": card(R, offset=2)}
    tokens = Tokens(mask=mask, segments=Segments(torch.tensor([0, R]), R), bonus_count=card(), **given)
    weights = card(R, offset=3)
    results = ObjectiveResults(card(R, offset=1), card(R, offset=2), card(R, dtype=torch.bool, offset=3))
    objective = RowObjective(tokens, weights, LossConfig(), card())
    CudaBackend().objective_rows(rows, objective, results, dtype=torch.float16, out=dx)
    named = {**given, "weights": weights, "dx": dx, **results._asdict()}
    only_launch(
        runtime,
        "cluster_kernel",
        of_rows(rows)
        | {name: tensor.data_ptr() for name, tensor in named.items()}
        | {"dx_stride": PITCH, "lse": ABSENT},
    )


def test_group_launches(runtime: Runtime) -> None:
    module, place = runtime.module, {"device": CARD.index, "stream": STREAM}
    absent = dict.fromkeys(("weights", "order", "offsets", "num_groups"), 0)
    module.group_advantages(
        module.DType.float32, rewards=4096, num_completions=24, num_rewards=1, group_size=8, out=8192, **absent,
        **place, scale=module.AdvantageScale.group, aggregation=module.RewardAggregation.sum_then_normalize,
    )  # fmt: skip
    names = "mask advantages importance normalizer weights token_advantages active rows num_active counts cu_seqlens"
    module.token_rows(
        **dict.fromkeys(names.split(), 4096), num_sequences=3, num_tokens=50, advantages_per_token=False,
        aggregation=module.TokenAggregation.token_mean, normalizer_value=1.0, every_row=False, **place,
    )  # fmt: skip
    calls = runtime.calls()
    kernels = ("advantages_kernel", "count_kernel", "write_kernel")
    assert len(calls) == len(kernels)
    for (call, device, fields), kernel, blocks in zip(calls, kernels, (1, 3, 3), strict=True):
        assert (call, device, fields["stream"], fields["blocks"]) == ("launch", CARD.index, STREAM, blocks)
        assert kernel in fields["kernel"]
    assert runtime.library.stand_in_current() == 0


def test_a_launch_that_fails_leaves_the_current_device(runtime: Runtime) -> None:
    runtime.library.stand_in_begin(1)
    message = r"row_statistics of \[40, 50257\] \(.*clusters of 4.*: cudaLaunchKernelExC: .*asked to fail"
    with pytest.raises(RuntimeError, match=message):
        CudaBackend().statistics(chunk(), RowStatistics(*(card(R) for _ in range(3))))
    assert runtime.calls()[-1][:2] == ("launch", CARD.index)
    assert runtime.library.stand_in_current() == 0
