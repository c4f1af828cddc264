"""How row kernels are launched, by architecture and vocabulary. Nothing is tuned at the user's first step.

A row of V float32 logits is read twice, the second time from the L2 cache as far as that holds the rows in flight: few
programs, each with enough 16-byte loads in flight to cover the memory's latency by itself.

    sm_80  108 multiprocessors, 40 MB L2, 1.6 to 2.0 TB/s     latency x bandwidth about 10 KB a multiprocessor
    sm_90  132 multiprocessors, 50 MB L2, 3.4 to 4.8 TB/s     about 25 KB
    sm_100 148 multiprocessors, 126 MB L2, 8 TB/s             about 40 KB

A program of W warps with B columns a block has 4 B bytes in flight. Of longer blocks the compiler, which leaves a
thread of 16 warps 64 registers, spills the row's constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

INTERPRETED_PROGRAMS = 4


@dataclass(frozen=True)
class RowLaunch:
    """Launch of a row kernel.

    Attributes:
        lanes: a block is `[lanes, 4]` columns.
        num_warps: of a program; a thread has lanes / (32 num_warps) rows of four of each block.
        programs: per multiprocessor; 0: one a row.
        origin: where the numbers come from.
    """

    lanes: int
    num_warps: int
    programs: int
    origin: str


OCCUPANCY = "occupancy arithmetic; not measured"

# Up to this many columns: the launch. The last row serves everything above.
_SHORT = RowLaunch(lanes=512, num_warps=8, programs=4, origin=OCCUPANCY)  # 8 KB a block, 32 KB in flight
_LONG = RowLaunch(lanes=1024, num_warps=16, programs=2, origin=OCCUPANCY)  # 16 KB a block, 32 KB in flight
ROW_LAUNCHES: dict[int, list[tuple[int | None, RowLaunch]]] = {
    80: [(None, _SHORT)],
    90: [(65536, _SHORT), (None, _LONG)],
    100: [(65536, _SHORT), (None, _LONG)],
}


@dataclass(frozen=True)
class SparseLaunch:
    """Launch of the kernels that gather rows of `[., H]` by index.

    Attributes:
        entries: of a support, or of an id, in one block.
        columns: of H in one block, at most.
        num_warps: of a program.
        origin: where the numbers come from.
    """

    entries: int
    columns: int
    num_warps: int
    origin: str = OCCUPANCY

    def width(self, columns: int) -> int:
        """Columns in one block for rows of `columns`: a power of two."""
        return min(self.columns, max(16, 1 << (columns - 1).bit_length()))


# Rows of their own lengths, one program a row on every architecture. A row must come out the same in every kernel, and
# in every chunk: nothing of this may depend on other rows. A block of logits is 512, as many as most supports; one of
# gathered rows 8 KB of bf16, 64 bytes a thread: with the five or six programs that registers leave a multiprocessor,
# more in flight than its share of the memory's latency. Half of all supports have fewer than 8 tokens.
SUPPORT_ROWS = RowLaunch(lanes=128, num_warps=4, programs=0, origin=OCCUPANCY)
SPARSE_ROWS = SparseLaunch(entries=8, columns=512, num_warps=4)
# An id's entries, for a block of columns. Some ids are in thousands of rows, and one program walks through them: more
# entries and fewer columns than above.
SPARSE_WEIGHT = SparseLaunch(entries=16, columns=256, num_warps=4)
SPARSE_WEIGHT_PROGRAMS = 32
"""Of a multiprocessor, over all blocks of columns; each walks over ids."""


def architecture(device: torch.device) -> int:
    """The key of `ROW_LAUNCHES` for a device; the CPU, on which Triton's interpreter runs, gets the oldest."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return max((arch for arch in ROW_LAUNCHES if arch <= 10 * major + minor), default=80)


def row_launch(num_columns: int, arch: int) -> RowLaunch:
    """The launch for rows of `num_columns` on an architecture of the table."""
    return next(launch for most, launch in ROW_LAUNCHES[arch] if most is None or num_columns <= most)


def arches_of(launch: RowLaunch) -> tuple[int, ...]:
    """The architectures that use a launch."""
    return tuple(arch for arch, table in ROW_LAUNCHES.items() if any(other == launch for _, other in table))


def num_programs(launch: RowLaunch, num_rows: int, device: torch.device) -> int:
    """Programs that walk over the rows."""
    if launch.programs == 0:
        return num_rows
    if device.type != "cuda":
        return min(num_rows, INTERPRETED_PROGRAMS)
    return min(num_rows, launch.programs * torch.cuda.get_device_properties(device).multi_processor_count)
