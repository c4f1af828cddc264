"""The row kernels, and the product in place, as machine code: what no interpreter sees."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton", reason="kernels are compiled by triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from grpo_fast.kernels import aot, sass  # noqa: E402
from grpo_fast.kernels.configuration import Configuration  # noqa: E402

CONFIGURATIONS = list(aot.configurations(["row_statistics", "row_objective", "scale"]))


def cases(wanted: str) -> list:
    """Configurations whose label contains `wanted`, each with its architectures."""
    found = [(each, arch) for each in CONFIGURATIONS if wanted in each.label for arch in each.arches]
    assert found
    return [pytest.param(*case, id=f"{case[0].label} sm_{case[1]}") for case in found]


def program(configuration: Configuration, arch: int) -> list[sass.Instruction]:
    return sass.parse(aot.listing(aot.compile_kernel(configuration, arch).asm["cubin"]))


def loads_right_before(loop: sass.Loop, instructions: list[sass.Instruction]) -> list[sass.Instruction]:
    """Loads from which some way leads to `loop` without a barrier on it."""
    blocks = sass._blocks(instructions)
    before: list[list[int]] = [[] for _ in blocks]
    for block, following in enumerate(sass._successors(blocks)):
        for each in following:
            before[each].append(block)
    inside = {index for index, block in enumerate(blocks) if block[0] in loop.instructions}
    pending = [each for index in inside for each in before[index]]
    seen, found = set(inside), []
    while pending:
        index = pending.pop()
        if index in seen:
            continue
        seen.add(index)
        for instruction in reversed(blocks[index]):
            if instruction.name == "BAR":
                break
            if instruction.name == "LDG":
                found.append(instruction)
        else:
            pending += before[index]
    return found


def zeroing(instructions: list[sass.Instruction]) -> list[sass.Loop]:
    """Loops that only store."""
    return [each for each in sass.find_loops(instructions) if each.innermost and each.stores and not each.loads]


@pytest.mark.parametrize(("configuration", "arch"), cases("in place"))
def test_no_thread_zeroes_a_row_that_another_still_reads(configuration: Configuration, arch: int) -> None:
    """dx over the logits, g = e = 0: all threads of the program have read the target's logit, which g comes from."""
    instructions = program(configuration, arch)
    loops = zeroing(instructions)
    assert loops
    for loop in loops:
        assert not loads_right_before(loop, instructions)


def test_the_way_to_a_loop_is_seen() -> None:
    """What the test above finds out: a load, then a barrier or none, then the loop; and a load on a way around both."""

    def code(*texts: str) -> list[sass.Instruction]:
        return sass.parse("".join(f"        /*{16 * i:04x}*/     {text} ;\n" for i, text in enumerate(texts)))

    loop = ("STG.E [R2], RZ", "@P0 BRA 0x{:x}", "EXIT")
    for middle, expected in (("BAR.SYNC 0x0", 0), ("MOV R0, RZ", 1), ("@P1 BRA 0x10", 1)):
        instructions = code("LDG.E R1, [R2]", "MOV R3, RZ", middle, loop[0], loop[1].format(0x30), loop[2])
        (found,) = zeroing(instructions)
        assert len(loads_right_before(found, instructions)) == expected


@pytest.mark.parametrize(("configuration", "arch"), cases("lanes"))
def test_statistics_copy_ahead(configuration: Configuration, arch: int) -> None:
    """The sweep loads by asynchronous copies of 16 bytes, and waits for a block while another one may be missing."""
    loops = sass.find_loops(program(configuration, arch))
    sweep = next(loop for loop in sass.main_loops(loops) if not loop.stores)
    assert sweep.count("LDG") == 0
    assert sweep.widths("LDGSTS")[16] == 2  # eight logits a thread
    waits = [each.operands for each in sweep.instructions if each.name == "DEPBAR"]
    groups = sweep.count("LDGDEPBAR")
    assert groups >= 1
    assert [wait.rpartition(" ")[2] for wait in waits] == [hex(groups)], "one block is needed, the next may be missing"


@pytest.mark.parametrize(("configuration", "arch"), cases("scale"))
def test_scale(configuration: Configuration, arch: int) -> None:
    """16-byte accesses, no spills, 64-bit offsets, and nothing but the factor is read before it is compared with 1."""
    compiled = aot.compile_kernel(configuration, arch)
    assert "arith.muli" in compiled.asm["ttir"]
    products = [line for line in compiled.asm["ttir"].splitlines() if "arith.muli" in line]
    assert all(": i64" in line for line in products)
    instructions = program(configuration, arch)
    names = [each.name for each in instructions]
    assert names.count("STL") == names.count("LDL") == 0
    assert 16 in {each.width for each in instructions if each.name == "STG"}
    loads = [index for index, name in enumerate(names) if name == "LDG"]
    leaves = [each for each in instructions[loads[0] : loads[1]] if each.name == "EXIT" and each.predicate]
    assert leaves, "the factor is read, and that is all"
