"""The kernels of rows on supports as the compiler leaves them: what no interpreter sees."""

from __future__ import annotations

import os
import re
from functools import cache

import pytest

triton = pytest.importorskip("triton", reason="kernels are compiled by triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from grpo_fast.kernels import aot, sass  # noqa: E402
from grpo_fast.kernels.configuration import ARCHES  # noqa: E402

MODULES = ("row_statistics", "row_objective", "sparse_rows", "sparse_weight")
CONFIGURATIONS = {each.label: each for each in aot.configurations(MODULES)}
SPARSE = [label for label in CONFIGURATIONS if label.startswith("sparse_")]
OBJECTIVES = [label for label in SPARSE if label.startswith("sparse_objective")]


@cache
def assembly(label: str, arch: int, kind: str) -> str:
    return str(aot.compile_kernel(CONFIGURATIONS[label], arch).asm[kind])


def sums(label: str, arch: int, shape: str, axis: int) -> set[str]:
    """Layouts of the reductions of `shape` along an axis: which thread adds up what, in which order."""
    text = assembly(label, arch, "ttgir")
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    reductions = re.findall(
        r'"tt\.reduce"\(%[\w#]+\) <\{axis = (\d)[^>]*\}>.*?\}\) : \(tensor<([\dx]+)xf32, (#\w+)>', text, re.DOTALL
    )
    found = {layouts[name] for along, of, name in reductions if (int(along), of) == (axis, shape)}
    assert found, f"{label}: no sums of {shape} along {axis}"
    return found


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("label", OBJECTIVES)
def test_a_row_is_summed_alike_in_every_kernel(label: str, arch: int) -> None:
    """What makes the first step's ratio 1: products as in `sparse_logits`, statistics as in `row_statistics`."""
    operands = re.search(r"(bfloat16|float16|float32), H (\d+)", label)
    assert operands
    shape = f"8x{CONFIGURATIONS[label].constexprs['COLUMNS']}"
    assert sums(label, arch, shape, 1) == sums(f"sparse_logits, {operands[0]}", arch, shape, 1)
    forward, masked = "row_statistics, supports", "row_objective, clipped, supports, in place"
    assert len(sums(label, arch, "128x4", 1)) == 1
    for other in (forward, masked):
        assert sums(label, arch, "128x4", 1) == sums(other, arch, "128x4", 1)


@pytest.mark.parametrize("label", [label for label in SPARSE if "H 2048" in label])
def test_gathered_rows_come_in_16_bytes(label: str) -> None:
    program = sass.parse(aot.listing(aot.compile_kernel(CONFIGURATIONS[label], 90).asm["cubin"]))
    loops = [loop for loop in sass.find_loops(program) if loop.innermost and loop.count("FFMA") >= 32]
    assert len(loops) == (2 if "objective" in label and "no dHidden" not in label else 1)
    signature = CONFIGURATIONS[label].signature
    itemsize = 4 if signature.get("weight", signature.get("hidden")) == "*fp32" else 2
    for loop in loops:
        assert loop.widths("LDG")[16] >= 4096 * itemsize // 128 // 16
        assert loop.count("FFMA") == 32  # one a product: 4096 of them, 128 threads


@pytest.mark.parametrize("label", SPARSE)
def test_no_place_is_a_product_of_32_bits(label: str) -> None:
    """Rows, tokens and entries times strides: only a block's number times its constant size may be narrow."""
    products = [line for line in assembly(label, 90, "ttir").splitlines() if "arith.muli" in line]
    assert "H 1" in label.split(", ") or any(re.search(r": (tensor<[\dx]+x)?i64", line) for line in products)
    for line in products:
        assert "i64" in line.partition(" : ")[2] or re.search(r"muli .*%c\w*(_i32|st\w*)\b", line), line


@pytest.mark.parametrize("label", OBJECTIVES)
def test_what_other_threads_wrote_is_read_behind_a_barrier(label: str) -> None:
    """x before its statistics, dx before dHidden."""
    lines = assembly(label, 90, "ttir").splitlines()

    def places(what: str) -> list[int]:
        return [number for number, line in enumerate(lines) if re.search(what, line)]

    stores, barriers = places(r"tt\.store"), places("barrier")
    statistics = places(r"tt\.load .*tensor<128x4x")[0]
    assert any(stores[0] < barrier < statistics for barrier in barriers)
    if "no dHidden" not in label:
        back = places(r"scf\.for .* step %c8_i32")[-1]
        last = max(store for store in stores if store < back)
        assert any(last < barrier < back for barrier in barriers)
