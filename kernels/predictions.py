"""What a step should cost on an H100 and an H200, from bytes and FLOPs: the tables of both PREDICTIONS.md.

    python -m grpo_fast.kernels.predictions

Nothing here is measured but the four numbers of a card. What is assumed has a name and a reason below; whoever measures
corrects those first.

Legend: T rows, H hidden size, V vocabulary, R rows of a tile of logits or of a chunk of dx.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

T = 16384
V = 151936
ROW_BYTES = 4 * V  # V is a multiple of 64: no padding
WIDTHS = (1024, 2048, 4096)
SMALL_WORKSPACE, WORKSPACE = 2**30, 2**32

OVERLAP = 0.75
"""Of a product, the shorter of arithmetic and traffic that the longer one hides: first and last tiles, and the float32
epilogue, in which a multiprocessor's tensor cores wait."""
STREAMING = 0.85
"""Of a copy's bandwidth, what a kernel reaches that computes on what it reads."""
L2_KEPT = 0.5
"""Of the L2 cache, what holds the logits that were read last: dx and the copies ahead go through it as well."""
LAUNCH = 5e-6
"""Seconds a launch begins and ends with fewer programs than fit."""
HOST = 150e-6
"""Seconds of Python a tile (the review's estimate), which run beside the GPU's."""
PROGRAMS = 2
"""Of the row kernel, a multiprocessor."""

L2_BANDWIDTH = 5.5e12
"""Bytes/s from the L2 cache to all multiprocessors: published microbenchmarks of an H100, whose cache an H200 has."""
ENTRIES_PER_ID = 8
"""Of supports: entries of an id that occurs, on average, while there are ids enough. Text is not spread evenly."""
SPARSE_LAUNCHES = 40
"""Launches of a call on supports, most of them torch's: the split, the sort, the gathers of what a row has."""


@dataclass(frozen=True)
class Card:
    """FLOP/s of bf16 products and bytes/s of copies, both as measured; bytes of L2; multiprocessors."""

    name: str
    flops: float
    bandwidth: float
    l2: float = 50e6
    processors: int = 132


CARDS = (Card("H100", 800e12, 3.0e12), Card("H200", 790e12, 4.3e12))


@dataclass(frozen=True)
class Plan:
    """Rows of a tile of logits and of a chunk of dx, as grpo_fast/ops/call.py gives them; one buffer of logits."""

    tile: int
    staged: int

    @property
    def chunks(self) -> int:
        return ceil(T / self.staged)

    @property
    def tiles(self) -> int:
        return ceil(T / self.tile)


def plan(workspace: int) -> Plan:
    """A power of two of rows, at most 1024 and a quarter of the workspace; what is left holds dx in bf16."""
    tile = 1024 if workspace // ROW_BYTES // 4 >= 1024 else 512
    return Plan(tile, (workspace - tile * ROW_BYTES) // (2 * V) // tile * tile)


def product(card: Card, rows: int, columns: int, depth: int, traffic: float) -> float:
    """Seconds of a product `[rows, depth] [depth, columns]` that moves `traffic` bytes."""
    times = sorted((2 * rows * columns * depth / card.flops, traffic / card.bandwidth))
    return times[1] + (1 - OVERLAP) * times[0] + LAUNCH


def row_kernel(card: Card, rows: int, bytes_a_logit: float) -> float:
    """Seconds of a row kernel over `rows` rows: whole rounds of the programs, at the bandwidth it reaches."""
    programs = PROGRAMS * card.processors
    rounds = ceil(rows / programs) * programs / rows
    # A multiprocessor that is alone in the last round has more of the bandwidth: half of the round is lost.
    return rows * V * bytes_a_logit * (1 + rounds) / 2 / (STREAMING * card.bandwidth) + LAUNCH


def objective_bytes(card: Card) -> float:
    """A logit of `row_objective`: read, read again from what L2 does not hold of the rows in flight, dx written."""
    held = min(1.0, L2_KEPT * card.l2 / (PROGRAMS * card.processors * ROW_BYTES))
    return 4 + 4 * (1 - held) + 2


@dataclass(frozen=True)
class Step:
    """Seconds of a call's parts; `floor`: 6 T H V at the card's FLOP/s."""

    logits: float
    rows: float
    grad_hidden: float
    grad_weight: float
    rounding: float
    floor: float

    @property
    def total(self) -> float:
        return self.logits + self.rows + self.grad_hidden + self.grad_weight + self.rounding


def step(card: Card, width: int, workspace: int) -> Step:
    """`single_pass` without `main_grad`, bf16: everything one after the other."""
    rows = plan(workspace)
    weight = 2 * V * width
    per_tile = product(card, rows.tile, V, width, 4 * rows.tile * V + weight + 2 * rows.tile * width)
    kernel = row_kernel(card, rows.tile, objective_bytes(card))
    per_tile = max(per_tile + kernel, HOST) - kernel
    sizes = [min(rows.staged, T - start) for start in range(0, T, rows.staged)]
    hidden = [product(card, size, width, V, 2 * size * V + weight + 6 * size * width) for size in sizes]
    # The first chunk writes float32, those after it read and write it.
    gradient = [
        product(card, V, width, size, 2 * size * V + 2 * size * width + (8 if index else 4) * V * width)
        for index, size in enumerate(sizes)
    ]
    rounding = 6 * V * width / card.bandwidth
    floor = 6 * T * width * V / card.flops
    return Step(rows.tiles * per_tile, rows.tiles * kernel, sum(hidden), sum(gradient), rounding, floor)


def frozen_head(card: Card, width: int) -> float:
    """Of 4 T H V: no gradient of the weight."""
    whole = step(card, width, WORKSPACE)
    return whole.floor * 2 / 3 / (whole.logits + whole.rows + whole.grad_hidden)


def without_gradient(card: Card, width: int) -> float:
    """Of 2 T H V: log-probabilities through tiles of logits and `row_statistics`."""
    whole, rows = step(card, width, WORKSPACE), plan(WORKSPACE)
    return whole.floor / 3 / (whole.logits + rows.tiles * row_kernel(card, rows.tile, 4))


# -- rows on supports -------------------------------------------------------------------------------------------------


def gather(card: Card, entries: float, width: int, distinct: float) -> float:
    """Seconds in which `entries` rows of `width` bf16 are read, of which `distinct` differ: L2 holds some of them."""
    held = min(1.0, L2_KEPT * card.l2 / (distinct * 2 * width))
    missed = max(distinct / entries, 1 - held)
    return entries * 2 * width / STREAMING * max(missed / card.bandwidth, 1 / L2_BANDWIDTH)


@dataclass(frozen=True)
class SparseStep:
    """Seconds of a call's parts on supports; `rows`: products, statistics, objective and dHidden, in one kernel."""

    rows: float
    grad_weight: float
    zeroing: float
    sorting: float
    launches: float

    @property
    def total(self) -> float:
        return self.rows + self.grad_weight + self.zeroing + self.sorting + self.launches


def sparse_step(card: Card, width: int, mean: int) -> SparseStep:
    """T rows of `mean` tokens, all sparse, bf16 with a gradient `[V, H]` of its own."""
    entries = T * mean
    ids = min(V, entries / ENTRIES_PER_ID)
    again = entries * 2 * width / (STREAMING * L2_BANDWIDTH)
    rows = gather(card, entries, width, ids) + again + 6 * T * width / card.bandwidth
    grad_weight = gather(card, entries, width, T) + 4 * ids * width / (STREAMING * card.bandwidth)
    # Keys and places, four digits of eight bits, read twice and written once; then what is gathered in their order.
    sorting = entries * (4 * 3 * 12 + 40) / card.bandwidth
    return SparseStep(rows, grad_weight, 2 * V * width / card.bandwidth, sorting, SPARSE_LAUNCHES * LAUNCH)


def sparse_share(card: Card, width: int) -> float:
    """A token of a large support over one of the vocabulary in a dense row, by time: V over the limit for sparse rows.

    Nothing of the weight is in L2 when it is first read; the second read and the hidden states are.
    """
    entry = 2 * width / STREAMING * (1 / card.bandwidth + 2 / L2_BANDWIDTH)
    return entry / (step(card, width, WORKSPACE).total / (T * V))


# -- tables -----------------------------------------------------------------------------------------------------------


def table(heads: str, rows: Iterator[list[str]]) -> str:
    names = heads.split("|")
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def row_table() -> str:
    """The row kernels over T rows in tiles of 1024."""
    tile = plan(WORKSPACE).tile

    def rows() -> Iterator[list[str]]:
        second = {card.name: objective_bytes(card) for card in CARDS}
        kernels = {
            "`row_statistics`": dict.fromkeys(second, 4.0),
            "`row_gradient`, bf16 dx": dict.fromkeys(second, 6.0),
            "`row_objective`, bf16 dx, second read all from L2": dict.fromkeys(second, 6.0),
            "`row_objective`, as expected": second,
            "`row_objective`, no second read from L2": dict.fromkeys(second, 10.0),
        }
        for name, moved in kernels.items():
            times = [_ms(T // tile * row_kernel(card, tile, moved[card.name])) for card in CARDS]
            yield [name, f"{moved['H100']:.1f}", *times]

    return table("kernel|bytes a logit|H100, ms|H200, ms", rows())


def step_table() -> str:
    """A step of every width, card and workspace."""

    def rows() -> Iterator[list[str]]:
        for card in CARDS:
            for workspace in (SMALL_WORKSPACE, WORKSPACE):
                for width in WIDTHS:
                    of = step(card, width, workspace)
                    parts = (of.floor, of.logits, of.rows, of.grad_hidden, of.grad_weight, of.rounding, of.total)
                    chosen = plan(workspace)
                    names = [card.name, f"{workspace >> 30} GiB", f"{chosen.tile}", f"{chosen.chunks}", f"{width}"]
                    yield [*names, *map(_ms, parts), f"{of.floor / of.total:.2f}"]

    return table("card|workspace|tile|chunks|H|floor|logits|rows|dHidden|dWeight|rounding|sum, ms|of floor", rows())


def other_table() -> str:
    def rows() -> Iterator[list[str]]:
        for card in CARDS:
            yield [f"{card.name}, frozen head", *(f"{frozen_head(card, width):.2f}" for width in WIDTHS)]
            yield [f"{card.name}, no gradient", *(f"{without_gradient(card, width):.2f}" for width in WIDTHS)]

    return table("of its floor|" + "|".join(f"H = {width}" for width in WIDTHS), rows())


def sparse_table() -> str:
    """A step on supports of 8 and 64 tokens a row, beside the dense one."""

    def rows() -> Iterator[list[str]]:
        for card in CARDS:
            for mean in (8, 64):
                for width in WIDTHS:
                    of, dense = sparse_step(card, width, mean), step(card, width, WORKSPACE).total
                    parts = (of.rows, of.grad_weight, of.zeroing, of.sorting, of.launches, of.total)
                    times = [f"{part * 1e3:.2f}" for part in parts]
                    yield [card.name, f"{mean}", f"{width}", *times, _ms(dense), f"{of.total / dense:.3f}"]

    return table("card|mean|H|rows|dWeight|zeroing|sort|launches|sum, ms|dense, ms|of dense", rows())


def share_table() -> str:
    def rows() -> Iterator[list[str]]:
        for card in CARDS:
            yield [card.name, *(f"{sparse_share(card, width):.0f}" for width in WIDTHS)]

    return table("V over the limit|" + "|".join(f"H = {width}" for width in WIDTHS), rows())


def cuda_table() -> str:
    """The CUDA kernels of csrc/, which read a row once where clusters hold it."""

    def rows() -> Iterator[list[str]]:
        passes = {"statistics": ("cluster", 4), "objective": ("cluster", 6), "gradient": ("stream", 6)}
        for name, (kernel, moved) in passes.items():
            size = T * V * moved
            times = [(size / card.bandwidth, size / (STREAMING * card.bandwidth)) for card in CARDS]
            yield [name, kernel, f"{moved}", f"{size / 1e9:.1f} GB", *(_ms(t) for pair in times for t in pair)]

    return table("pass|kernel|bytes a logit|V = 151936|H100, ms|at 85 %|H200, ms|at 85 %", rows())


if __name__ == "__main__":
    print(
        f"kernels/PREDICTIONS.md\n\n{row_table()}\n{step_table()}\n{other_table()}\n{sparse_table()}\n{share_table()}\ncsrc/PREDICTIONS.md\n\n{cuda_table()}"
    )
