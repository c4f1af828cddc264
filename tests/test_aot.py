"""Kernels judged without a GPU: every configuration compiles, row kernels spill nothing and stay within their budgets.

Before that, the machinery: on tiny kernels whose machine code is known, and on listings written by hand.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="kernels are compiled by triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402

from grpo_fast.kernels import aot, launcher, row_objective, sass  # noqa: E402
from grpo_fast.kernels.configuration import ARCHES, Configuration  # noqa: E402
from grpo_fast.kernels.objective import CORRECTIONS, KL_ESTIMATORS, POLICIES  # noqa: E402

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "AOT.md"
CONFIGURATIONS = list(aot.configurations())

# What one logit of a row kernel's main loop may cost on sm_90: instructions of a thread, of them MUFU (2^x, log, 1/x).
# A soft cap is one tanh more: an exponential and a reciprocal.
MAX_INSTRUCTIONS, MAX_MUFU, SOFTCAP_MUFU = 35, 2, 2


# --- every configuration of the library ---


def committed() -> dict[tuple[str, str], list[str]]:
    """The rows of AOT.md by configuration and architecture."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in TABLE.open() if line.startswith("|")]
    return {(row[0], row[1]): row for row in rows[2:]}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda configuration: configuration.label)
def test_a_configuration_keeps_its_budget(configuration: Configuration) -> None:
    rows = {arch: aot.report(configuration, arch) for arch in configuration.arches}
    if configuration.kernel.__module__.rpartition(".")[2].startswith(("row_", "sparse_")):
        assert {arch: row.spilled_bytes for arch, row in rows.items()} == dict.fromkeys(rows, 0)
    if configuration.sweep_bytes is not None:
        assert rows[max(rows)].sweeps, "no loop over the logits"
    for sweep in rows[90].sweeps if 90 in rows else ():
        assert sweep.instructions <= MAX_INSTRUCTIONS
        assert sweep.mufu <= MAX_MUFU + SOFTCAP_MUFU * (configuration.constexprs["TRANSFORM"] == "softcap")
        assert sweep.local == 0
        # Four logits a thread: 16 bytes of float32, and 8 of what is half as wide.
        assert min([*sweep.loads, *sweep.stores]) >= 8
        assert max(sweep.loads) == 16 or configuration.signature["logits"] != "*fp32"
    if f"triton {triton.__version__}," in TABLE.read_text():
        found = {str(arch): committed().get((configuration.label, str(arch))) for arch in rows}
        expected = {str(arch): aot.cells(row) for arch, row in rows.items()}
        assert found == expected, "regenerate kernels/AOT.md: the command is in it"


def test_the_committed_table_names_every_configuration() -> None:
    expected = {(each.label, str(arch)) for each in CONFIGURATIONS for arch in each.arches}
    assert set(committed()) == expected, "regenerate kernels/AOT.md: the command is in it"


def test_every_name_is_compiled() -> None:
    policies, estimators, _, corrections, _ = map(set, zip(*row_objective._VARIANTS, strict=True))
    assert (policies, estimators, corrections) == ({*POLICIES}, {*KL_ESTIMATORS}, {*CORRECTIONS})


# --- the machinery ---


@triton.jit
def _scale_kernel(source, out, N, BLOCK: tl.constexpr):
    for start in range(0, N, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(out + offsets, tl.load(source + offsets) * 3.0)


@triton.jit
def _softmax_kernel(logits, dx, V, BLOCK: tl.constexpr):
    # Two sweeps over one row within a loop over rows, as row kernels have them; one exponential a logit in each.
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), 64, tl.num_programs(0)):
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            total += tl.exp2(tl.load(logits + row.to(tl.int64) * V + start + columns))
        scale = 1.0 / tl.sum(total, 0)
        for start in range(0, V, BLOCK):
            z = tl.load(logits + row.to(tl.int64) * V + start + columns)
            tl.store(dx + row.to(tl.int64) * V + start + columns, tl.exp2(z) * scale)


@triton.jit
def _hoard_kernel(source, out, BLOCK: tl.constexpr):
    # Every element is needed again after the sum, and 1024 threads have 64 registers each.
    offsets = tl.arange(0, BLOCK)
    values = tl.load(source + offsets)
    tl.store(out + offsets, values / tl.sum(values, 0))


@triton.jit
def _odd_range_kernel(out):
    tl.store(out + tl.arange(0, 3), 1.0)


@triton.jit
def _dot_kernel(a, b, out):
    index = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + index, tl.dot(tl.load(a + index), tl.load(b + index)))


def scale(dtype: str = "fp32", divisible: tuple[str, ...] = ("source", "out", "N")) -> Configuration:
    signature = {"source": f"*{dtype}", "out": f"*{dtype}", "N": "i32"}
    wide = {"fp32": 4, "bf16": 2}[dtype]
    return Configuration(
        label=f"scale {dtype}",
        kernel=_scale_kernel,
        signature=signature,
        constexprs={"BLOCK": 128 * 16 // wide},
        num_warps=4,
        divisible=divisible,
        sweep_bytes=wide,
    )


HOARD = Configuration(
    label="hoard",
    kernel=_hoard_kernel,
    signature={"source": "*fp32", "out": "*fp32"},
    constexprs={"BLOCK": 2**17},
    num_warps=32,
    divisible=("source", "out"),
)
BROKEN = Configuration(label="broken", kernel=_odd_range_kernel, signature={"out": "*fp32"}, num_warps=4)
SOFTMAX = Configuration(
    label="softmax",
    kernel=_softmax_kernel,
    signature={"logits": "*fp32", "dx": "*fp32", "V": "i32"},
    constexprs={"BLOCK": 512},
    num_warps=4,
    divisible=("logits", "dx", "V"),
    sweep_bytes=4,
)
DOT = Configuration(
    label="dot",
    kernel=_dot_kernel,
    signature={"a": "*fp16", "b": "*fp16", "out": "*fp32"},
    num_warps=4,
    divisible=("a", "b", "out"),
)


@pytest.mark.parametrize("arch", ARCHES)
def test_a_loop_of_wide_accesses(arch: int) -> None:
    row = aot.report(scale(), arch)
    assert (row.spilled_bytes, row.shared_bytes, row.resident_warps) == (0, 0, 64)
    assert 8 <= row.registers <= 40
    (sweep,) = row.sweeps
    assert sweep.loads.keys() == sweep.stores.keys() == {16}
    # A load, four products and a store for four logits, two 64-bit addresses, a counter and a branch.
    assert 6 / 4 <= sweep.instructions <= 16 / 4
    assert (sweep.mufu, sweep.local, row.tensor_cores) == (0, 0, "")


def test_half_as_wide_elements_are_twice_as_many() -> None:
    (sweep,) = aot.report(scale("bf16"), 90).sweeps
    assert sweep.loads.keys() == {16}
    assert 6 / 8 <= sweep.instructions <= 32 / 8


def test_accesses_without_alignment_are_narrow() -> None:
    (sweep,) = aot.report(scale(divisible=()), 90).sweeps
    assert sweep.loads.keys() == sweep.stores.keys() == {4}


@pytest.mark.parametrize("arch", ARCHES)
def test_both_sweeps_within_the_loop_over_rows_are_found(arch: int) -> None:
    statistics, gradient = aot.report(SOFTMAX, arch).sweeps
    assert (set(statistics.loads), set(statistics.stores)) == ({16}, set())
    assert (set(gradient.loads), set(gradient.stores)) == ({16}, {16})
    assert statistics.mufu == gradient.mufu == 1
    assert 2 < statistics.instructions < 12
    assert 3 < gradient.instructions < 12


@pytest.mark.parametrize("arch", ARCHES)
def test_spills_are_reported(arch: int) -> None:
    row = aot.report(HOARD, arch)
    assert row.spilled_bytes > 0
    assert row.registers == 64
    assert row.resident_warps == 32


def test_tensor_cores_are_seen() -> None:
    rows = aot.reports([DOT])
    assert {row.arch: row.tensor_cores for row in rows} == {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    assert all(row.shared_bytes for row in rows)


def test_a_configuration_that_does_not_compile_is_named() -> None:
    with pytest.raises(RuntimeError) as caught:
        aot.reports([scale(), BROKEN], [80, 90])
    assert "broken for sm_80" in str(caught.value)
    assert "broken for sm_90" in str(caught.value)
    assert "scale" not in str(caught.value)


def test_a_block_that_fits_nowhere_is_named(monkeypatch) -> None:
    monkeypatch.setitem(aot._SHARED_BYTES, 90, 8192)
    with pytest.raises(RuntimeError, match=r"dot for sm_90: a block does not fit, with \d+ bytes of shared memory"):
        aot.reports([DOT], [90])


def test_the_command_writes_what_it_prints(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(aot, "configurations", lambda: iter([scale(), HOARD, BROKEN]))
    files = [f"--json={tmp_path / 'r.json'}", f"--markdown={tmp_path / 'r.md'}"]
    assert aot.main(["--arch=90", "--match=o", *files]) == 1
    assert "broken for sm_90" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert aot.main(["--arch=90", "--match=scale", *files]) == 0
    table = capsys.readouterr().out
    assert (tmp_path / "r.md").read_text().endswith(table)
    assert f"triton {triton.__version__}," in (tmp_path / "r.md").read_text()
    (row,) = json.loads((tmp_path / "r.json").read_text())["reports"]
    assert row["label"] == "scale fp32"
    assert re.search(rf"\| scale fp32 +\| +90 \| .* {row['registers']} \|", table)


def test_a_missing_tool_is_named(monkeypatch) -> None:
    from triton.knobs import NvidiaTool

    compiled = aot.compile_kernel(scale(), 90)
    monkeypatch.setattr(NvidiaTool, "from_path", lambda path: None)
    with pytest.raises(RuntimeError, match=r"cuobjdump is missing.*TRITON_CUOBJDUMP_PATH"):
        aot.listing(compiled.asm["cubin"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"signature": {"source": "*fp32", "out": "*fp32"}}, "signature and constexprs must name"),
        ({"constexprs": {"BLOCK": 512, "N": 3}}, "signature and constexprs must name"),
        ({"divisible": ("BLOCK",)}, "divisible must name arguments of the signature, got .'BLOCK'"),
        ({"num_warps": 3}, "num_warps must be a power of two up to 32, got 3"),
    ],
)
def test_configurations_fit_their_kernels(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(scale(), **wrong)


@triton.jit(do_not_specialize=["rows", "seen"], do_not_specialize_on_alignment=["slice", "count", "single"])
def _arguments_kernel(
    out, bias, mask, seen, slice, rows, ones, columns, count, single, odd, far, typed: tl.int64, factor, flag,
    WIDTH: tl.constexpr
):  # fmt: skip
    tl.store(out, factor)


def test_a_launch_tells_its_configuration() -> None:
    # As Triton itself takes them apart at a launch.
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    arguments = {
        "out": torch.zeros(64),
        "bias": None,
        "mask": torch.zeros(64, dtype=torch.bool)[1:],  # not aligned
        "seen": torch.zeros(64, dtype=torch.int64),
        "slice": torch.zeros(64),
        "rows": 1,
        "ones": 1,
        "columns": 64,
        "count": 64,
        "single": 1,
        "odd": 3,
        "far": 2**40,
        "typed": 32,
        "factor": 1.0,
        "flag": True,
        "WIDTH": 8,
    }
    found = Configuration.of_launch("launch", _arguments_kernel, arguments | {"num_warps": 8}, arches=(90,))
    binder = create_function_from_signature(_arguments_kernel.signature, _arguments_kernel.params, CUDABackend)
    bound, specialization, _ = binder(**arguments)
    types = {name: kind for name, (kind, _) in zip(bound, specialization, strict=True)}
    assert found.signature | dict.fromkeys(found.constexprs, "constexpr") == types
    assert found.constexprs == {name: bound[name] for name, kind in types.items() if kind == "constexpr"}
    aligned = [name for name, (kind, key) in zip(bound, specialization, strict=True) if kind != "constexpr" and key]
    assert list(found.divisible) == aligned == ["out", "columns", "far", "typed"]
    assert (found.num_warps, found.num_stages, found.arches) == (8, 3, (90,))


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_fused_is_stated(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No default of some version of Triton: as launches say it."""
    assert launcher.OPTIONS == {"enable_fp_fusion": False}
    monkeypatch.setitem(launcher.OPTIONS, "enable_fp_fusion", fused)
    assert aot.compile_kernel(scale(), 90).metadata.enable_fp_fusion is fused


def test_a_launch_without_all_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match=r"launch: arguments must be .*got .'out'"):
        Configuration.of_launch("launch", _arguments_kernel, {"out": None})
    with pytest.raises(ValueError, match=r"launch: out must be a tensor of .* got str"):
        Configuration.of_launch("launch", _odd_range_kernel, {"out": "memory"})


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "arch", "expected"),
    [
        (32, 0, 4, 90, 64),
        (33, 0, 4, 90, 48),  # 40 registers a thread are taken: 12 warps on each of four schedulers
        (255, 0, 8, 90, 8),
        (64, 0, 32, 80, 32),
        (32, 100 * 1024, 8, 80, 8),
        (32, 100 * 1024, 8, 90, 16),
        (16, 0, 1, 90, 32),  # 32 blocks
        (32, 163 * 1024, 4, 80, 4),
        (32, 164 * 1024, 4, 80, 0),  # the driver's own kilobyte is missing
    ],
)
def test_resident_warps(registers: int, shared: int, num_warps: int, arch: int, expected: int) -> None:
    assert aot.resident_warps(registers, shared, num_warps, arch) == expected


def test_labels_are_unique_on_an_architecture(monkeypatch) -> None:
    from grpo_fast.kernels import configuration as module  # any module of the package that has none of its own

    both = [replace(scale(), arches=(80,)), replace(scale(), arches=(90,))]
    monkeypatch.setattr(module, "aot_configurations", lambda: iter(both), raising=False)
    assert list(aot.configurations(["configuration"])) == both
    both[1] = replace(scale(), arches=(80, 90))
    with pytest.raises(ValueError, match=r"labels must differ on an architecture, got .*scale fp32', 80"):
        list(aot.configurations(["configuration"]))


def listing(*instructions: str) -> list[sass.Instruction]:
    return sass.parse("".join(f"        /*{16 * i:04x}*/     {text} ;\n" for i, text in enumerate(instructions)))


def test_instructions_are_parsed() -> None:
    load, half, byte, branch = listing(
        "@!P0 LDG.E.EF.LTC128B.128 R4, desc[UR4][R2.64+0x10]",
        "STG.E.U16 desc[UR4][R2.64], R5",
        "LDG.E.U8.CONSTANT R0, [R2]",
        "@P1 BRA 0x30",
        "NOP",
    )
    assert (load.predicate, load.name, load.width, load.target) == ("!P0", "LDG", 16, None)
    assert (half.width, byte.width) == (2, 1)
    assert (branch.target, branch.falls_through) == (0x30, True)
    with pytest.raises(ValueError, match="0 instructions"):
        sass.parse("something else")
    with pytest.raises(ValueError, match="2 instructions"):
        sass.parse("        /*0000*/     EXIT ;\n        /*0020*/     EXIT ;\n")


def test_loops_are_natural_loops() -> None:
    program = listing(
        "MOV R0, RZ",
        "LDG.E R1, [R2]",  # 0x10: header of the outer loop
        "LDG.E.128 R4, [R2]",  # 0x20: header of the inner loop
        "@P0 BRA 0x90",  # a rare case, out of line
        "MUFU.EX2 R4, R4",  # 0x40
        "@P1 BRA 0x20",
        "@P2 BRA 0x10",
        "EXIT",
        "BRA 0x80",  # after the end, where no one comes
        "STL [R1], R4",  # 0x90
        "BRA 0x40",
    )
    outer, inner = sass.find_loops(program)
    assert [each.address for each in outer.instructions] == [0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x90, 0xA0]
    assert [each.address for each in inner.instructions] == [0x20, 0x30, 0x40, 0x50, 0x90, 0xA0]
    assert (outer.innermost, inner.innermost) == (False, True)
    assert sass.main_loops([outer, inner]) == [inner]
    cost = sass.sweep(inner, 4)
    assert (cost.instructions, cost.mufu, cost.local, cost.loads) == (6 / 4, 1 / 4, 1, {16: 1})


def test_a_jump_back_out_of_line_is_no_loop() -> None:
    program = listing(
        "BSSY B0, 0x40",
        "@P0 BRA 0x60",
        "MOV R0, R1",
        "BSYNC B0",
        "MOV R1, R2",  # 0x40
        "EXIT",
        "MOV R0, R2",  # 0x60: the rare side
        "BSYNC B0",
    )
    assert sass.find_loops(program) == []


def test_a_loop_may_end_in_a_call() -> None:
    program = listing(
        "MOV R0, RZ",
        "LDG.E.128 R4, [R2]",  # 0x10
        "@P0 CALL.REL.NOINC 0x40",
        "BRA 0x10",
        "STG.E [R2], R4",  # 0x40
        "@P1 EXIT",
        "BRA 0x0",
    )
    outer, inner = sass.find_loops(program)
    assert (len(outer.instructions), len(inner.instructions)) == (7, 3)
    assert (outer.innermost, inner.innermost) == (False, True)
