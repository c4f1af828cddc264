"""The machine code of a kernel, read without a GPU: instructions, loops, and what a main loop costs per logit.

`cuobjdump`, which Triton's wheel carries, prints a cubin's instructions with resolved branch targets. Loops are the
natural loops of their control-flow graph (back edges to a dominating block), so blocks that the assembler moved out of
line count where they belong. A loop's instructions are all those that an iteration can reach, rare branches included:
an upper bound.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*(.*?)\s*;")
_TARGET = re.compile(r"(?:^|[\s(])0x([0-9a-f]+)\)?$")
# Opcodes whose last operand is the address of what may come next. Of CALL too: the assembler also leaves loops by calls
# that never return, and what a true call leads to are slow paths, which end in RET and belong to no loop.
_JUMPS = {"BRA", "BRX", "JMP", "CALL", "WARPSYNC"}
_ENDS = {"EXIT", "RET", "BRX", "KILL"}
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_GLOBAL_LOADS, _GLOBAL_STORES = ("LDG", "LDGSTS"), ("STG",)
_TENSOR_CORE = re.compile(r"(UTC)?[HIQ]G?MMA")


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction, e.g. `@!P0 LDG.E.128 R4, desc[UR4][R2.64] ;`."""

    address: int
    predicate: str | None
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a thread moves, for a memory access."""
        modifiers = [modifier for modifier in self.opcode.split(".")[1:] if modifier in _WIDTHS]
        return _WIDTHS[modifiers[0]] if modifiers else 4

    @property
    def target(self) -> int | None:
        """Address that a jump names, or a BSSY: where its BSYNC goes."""
        found = _TARGET.search(self.operands) if self.name in _JUMPS | {"BSSY"} else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may come next: not after an exit or branch without any condition."""
        if self.predicate not in (None, "PT", "UPT"):
            return True
        unconditional = self.name in ("BRA", "JMP") and _TARGET.fullmatch(self.operands.strip()) is not None
        return not (unconditional or self.name in _ENDS)


@dataclass(frozen=True)
class Loop:
    """The instructions that an iteration can reach; those of inner loops too."""

    instructions: tuple[Instruction, ...]
    innermost: bool

    def count(self, *names: str) -> int:
        return sum(instruction.name in names for instruction in self.instructions)

    def widths(self, *names: str) -> Counter[int]:
        """How many accesses of each width in bytes, a thread and iteration."""
        return Counter(instruction.width for instruction in self.instructions if instruction.name in names)

    @property
    def loads(self) -> Counter[int]:
        """Loads from global memory: width in bytes -> how many."""
        return self.widths(*_GLOBAL_LOADS)

    @property
    def stores(self) -> Counter[int]:
        return self.widths(*_GLOBAL_STORES)

    @property
    def loaded_bytes(self) -> int:
        return sum(width * count for width, count in self.loads.items())


@dataclass(frozen=True)
class Sweep:
    """A main loop's cost. `instructions` and `mufu` are per logit: executed by one thread, over the logits it loads."""

    instructions: float
    mufu: float
    loads: dict[int, int]  # global accesses of an iteration: width in bytes -> how many
    stores: dict[int, int]
    local: int  # LDL and STL: spilled registers


def parse(listing: str) -> list[Instruction]:
    """Instructions in what `cuobjdump -sass` prints for one kernel, without the padding after its end.

    Raises:
        ValueError: the instructions found are not one kernel without gaps, 16 bytes each.
    """
    found = [item for line in listing.splitlines() if (item := _LINE.match(line))]
    program = [Instruction(int(item[1], 16), item[2], item[3], item[4]) for item in found]
    if not program or [each.address for each in program] != list(range(0, 16 * len(program), 16)):
        raise ValueError(f"listing: expected the SASS of one kernel, got {len(program)} instructions with gaps or none")
    while program[-1].name == "NOP":
        program.pop()
    return program


def tensor_core_instructions(program: Iterable[Instruction]) -> list[str]:
    """Which kinds of matrix instruction a kernel has: HMMA, HGMMA (sm_90), UTCHMMA (sm_100), ..."""
    return sorted({each.name for each in program if _TENSOR_CORE.fullmatch(each.name)})


def find_loops(program: list[Instruction]) -> list[Loop]:
    """All loops of a kernel, in the order of their first instruction."""
    blocks = _blocks(program)
    successors = _successors(blocks)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block, nexts in enumerate(successors):
        for following in nexts:
            predecessors[following].append(block)
    dominators = _dominators(successors, predecessors)
    bodies: dict[int, set[int]] = {}
    for block, nexts in enumerate(successors):
        for header in nexts:
            if block in dominators and header in dominators[block]:
                body = bodies.setdefault(header, {header})
                pending = [block]
                while pending:
                    member = pending.pop()
                    if member not in body:
                        body.add(member)
                        pending += [before for before in predecessors[member] if before in dominators]
    return [
        Loop(
            tuple(instruction for member in sorted(body) for instruction in blocks[member]),
            innermost=not any(other != header and other in body for other in bodies),
        )
        for header, body in sorted(bodies.items())
    ]


def main_loops(loops: Iterable[Loop]) -> list[Loop]:
    """The sweeps over the logits: of the innermost loops that only load, and of those that also store, the one with the
    most 16-byte accesses each (loops over a remainder have fewer or narrower ones)."""

    def weight(loop: Loop) -> tuple[int, int]:
        accesses = loop.loads + loop.stores
        return accesses[16], sum(width * count for width, count in accesses.items())

    loading = [loop for loop in loops if loop.innermost and loop.loads]
    kinds = [[loop for loop in loading if bool(loop.stores) == storing] for storing in (False, True)]
    return [max(kind, key=weight) for kind in kinds if kind]


def sweep(loop: Loop, bytes_per_logit: int) -> Sweep:
    """Cost of a loop that loads `bytes_per_logit` bytes for each logit; however far it was unrolled."""
    logits = loop.loaded_bytes / bytes_per_logit
    return Sweep(
        instructions=len(loop.instructions) / logits,
        mufu=loop.count("MUFU") / logits,
        loads=dict(sorted(loop.loads.items())),
        stores=dict(sorted(loop.stores.items())),
        local=loop.count("LDL", "STL"),
    )


def _blocks(program: list[Instruction]) -> list[list[Instruction]]:
    """Basic blocks: cut before branch targets, after whatever may jump or end."""
    targets = {instruction.target for instruction in program}
    blocks: list[list[Instruction]] = []
    cut = True
    for instruction in program:
        if cut or instruction.address in targets:
            blocks.append([])
        blocks[-1].append(instruction)
        cut = instruction.name in _JUMPS | _ENDS | {"BSYNC"} or not instruction.falls_through
    return blocks


def _successors(blocks: list[list[Instruction]]) -> list[list[int]]:
    """Blocks that may follow each block. A BSYNC continues where the BSSY of its barrier said."""
    at = {block[0].address: index for index, block in enumerate(blocks)}
    reconverge: dict[str, int] = {}
    result: list[list[int]] = []
    for index, block in enumerate(blocks):
        for instruction in block:
            if instruction.name == "BSSY" and instruction.target in at:
                reconverge[instruction.operands.partition(",")[0]] = at[instruction.target]
        last = block[-1]
        following = []
        if last.name == "BSYNC" and last.operands in reconverge:
            following.append(reconverge[last.operands])
        elif last.falls_through and index + 1 < len(blocks):
            following.append(index + 1)
        if last.name in _JUMPS and last.target in at:
            following.append(at[last.target])
        result.append(following)
    return result


def _dominators(successors: list[list[int]], predecessors: list[list[int]]) -> dict[int, set[int]]:
    """For each block that is reached from the first: the blocks on every way there, itself included."""
    reached, pending = {0}, [0]
    while pending:
        for following in successors[pending.pop()]:
            if following not in reached:
                reached.add(following)
                pending.append(following)
    dominators = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = set.intersection(*(dominators[before] for before in predecessors[block] if before in reached))
            if common | {block} != dominators[block]:
                dominators[block] = common | {block}
                changed = True
    return dominators
