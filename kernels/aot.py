"""Compiles every launch configuration of every kernel for sm_80, sm_90 and sm_100 without a GPU, and reports what the
compiler made of it.

    python -m grpo_fast.kernels.aot [--arch 90] [--match row_] [--json FILE] [--markdown FILE]

A report gives registers a thread, bytes a thread spills (its stack), shared memory a block, warps that fit on a
multiprocessor, SASS instructions, and for kernels that go through rows of logits what their main loops cost a logit.
All of it is read from the cubin with the `cuobjdump` of Triton's wheel. Triton's own cache keeps what was compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import launcher, sass
from .configuration import ARCHES, Configuration

# Modules of kernels, each with its aot_configurations().
MODULES: tuple[str, ...] = (
    "row_statistics",
    "row_gradient",
    "row_objective",
    "sparse_rows",
    "sparse_weight",
    "forward_logprobs",
    "group_advantages",
    "group_rows",
    "scale",
)

# Of one multiprocessor: registers, warps and blocks that are resident at most; shared memory by architecture.
_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32
_SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_RESERVED_SHARED_BYTES = 1024  # a block, by the driver

_HEADS = (
    "configuration|sm|warps|stages|registers|spilled|shared|resident warps|SASS|tensor cores|"
    "instructions/logit|MUFU/logit"
)


@dataclass(frozen=True)
class Report:
    """What one configuration became on one architecture."""

    label: str
    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int  # a thread
    spilled_bytes: int  # a thread
    shared_bytes: int  # a block
    resident_warps: int  # a multiprocessor, by registers and shared memory
    instructions: int
    tensor_cores: str  # kinds of matrix instruction: "HMMA", "HGMMA", ...
    sweeps: tuple[sass.Sweep, ...]


def configurations(modules: Iterable[str] = MODULES) -> Iterator[Configuration]:
    """Every configuration of the named modules of this package.

    Raises:
        ValueError: two of them share a label on one architecture.
    """
    seen: set[tuple[str, int]] = set()
    for name in modules:
        for configuration in importlib.import_module(f"{__package__}.{name}").aot_configurations():
            named = {(configuration.label, arch) for arch in configuration.arches}
            if twice := seen & named:
                raise ValueError(f"{name}: labels must differ on an architecture, got {sorted(twice)} twice")
            seen |= named
            yield configuration


def compile_kernel(configuration: Configuration, arch: int) -> Any:
    """Triton's CompiledKernel for sm_`arch`; its `asm["cubin"]` is the machine code.

    Raises:
        RuntimeError: it does not compile, or kernels are interpreted in this process.
    """
    kernel = configuration.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(f"{configuration.label}: interpreted kernels cannot be compiled; unset TRITON_INTERPRET")
    source = ASTSource(
        kernel,
        signature=configuration.signature | dict.fromkeys(configuration.constexprs, "constexpr"),
        constexprs=configuration.constexprs,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in configuration.divisible},
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages, **launcher.OPTIONS}
    try:
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # whatever pass or tool it comes from, the label is what finds it
        raise RuntimeError(f"{configuration.label} for sm_{arch}: {type(error).__name__}: {error}") from error


def report(configuration: Configuration, arch: int) -> Report:
    """Compiles one configuration and reads its machine code.

    Raises:
        RuntimeError: it does not compile, needs more than a multiprocessor has, or cuobjdump is missing or fails.
    """
    compiled = compile_kernel(configuration, arch)
    text = listing(compiled.asm["cubin"])
    usage = re.search(rf"Function {re.escape(compiled.name)}:\s*REG:(\d+) STACK:(\d+)", text)
    program = sass.parse(text)
    if not usage:
        raise RuntimeError(
            f"{configuration.label} for sm_{arch}: cuobjdump prints no resource usage of {compiled.name}"
        )
    registers, shared = int(usage[1]), compiled.metadata.shared
    resident = resident_warps(registers, shared, configuration.num_warps, arch)
    if not resident:
        raise RuntimeError(
            f"{configuration.label} for sm_{arch}: a block does not fit, with {shared} bytes of shared memory and "
            f"{configuration.num_warps} warps of {registers} registers a thread"
        )
    sweeps: list[sass.Sweep] = []
    if configuration.sweep_bytes is not None:
        loops = sass.main_loops(sass.find_loops(program))
        sweeps = [sass.sweep(loop, configuration.sweep_bytes) for loop in loops]
    return Report(
        label=configuration.label,
        kernel=configuration.kernel.__name__,
        arch=arch,
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        registers=registers,
        spilled_bytes=int(usage[2]),
        shared_bytes=shared,
        resident_warps=resident,
        instructions=len(program),
        tensor_cores=" ".join(sass.tensor_core_instructions(program)),
        sweeps=tuple(sweeps),
    )


def reports(wanted: Iterable[Configuration], arches: Iterable[int] = ARCHES) -> list[Report]:
    """Reports on `wanted` for those of `arches` that each is meant for; two at a time (ptxas runs outside the GIL).

    Raises:
        RuntimeError: some do not compile; all of them are named.
    """
    arches = tuple(arches)
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(report, each, arch) for each in wanted for arch in each.arches if arch in arches]
    errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise RuntimeError("\n\n".join(str(error) for error in errors)) from errors[0]
    return [future.result() for future in futures]


def resident_warps(registers: int, shared_bytes: int, num_warps: int, arch: int) -> int:
    """Warps that a multiprocessor holds at once: blocks of `num_warps` warps until some resource is used up."""
    # Registers go to a warp in units of 256, and a quarter of them belongs to each of the four schedulers.
    a_warp = -(-registers * 32 // 256) * 256
    warps = min(_WARPS, 4 * (_REGISTERS // 4 // a_warp))
    blocks = min(_BLOCKS, warps // num_warps, _SHARED_BYTES[arch] // (shared_bytes + _RESERVED_SHARED_BYTES))
    return blocks * num_warps


def cells(row: Report) -> list[str]:
    """A report's row of the table."""
    usage = [row.registers, row.spilled_bytes, row.shared_bytes, row.resident_warps, row.instructions, row.tensor_cores]
    per_logit = [[each.instructions for each in row.sweeps], [each.mufu for each in row.sweeps]]
    costs = [", ".join(f"{value:.1f}" for value in values) for values in per_logit]
    return [row.label, *map(str, [row.arch, row.num_warps, row.num_stages, *usage, *costs])]


def markdown(rows: Iterable[Report]) -> str:
    """A table of reports, its columns aligned so that it reads as text too."""
    table = [_HEADS.split("|"), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in table]
    return "".join(f"| {' | '.join(row)} |\n" for row in aligned)


def document(rows: Iterable[Report]) -> str:
    """AOT.md: what the numbers are, who made them, and the table."""
    return (
        "# What the compiler makes of the kernels\n\n"
        f"triton {triton.__version__}, without a GPU: `python -m grpo_fast.kernels.aot --markdown kernels/AOT.md`.\n"
        "Registers and spilled bytes a thread, shared bytes a block, warps resident on a multiprocessor, SASS\n"
        "instructions in all, and those of a main loop per logit for kernels that go through rows of logits\n"
        "(statistics sweep, gradient sweep).\n\n"
    ) + markdown(rows)


def listing(cubin: bytes) -> str:
    """Resource usage and SASS of a cubin.

    Raises:
        RuntimeError: Triton ships no working cuobjdump, or it cannot read the cubin.
    """
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        raise RuntimeError(
            "cuobjdump is missing: Triton's Linux wheels carry it in triton/backends/nvidia/bin; for another build of "
            "Triton set TRITON_CUOBJDUMP_PATH to the CUDA toolkit's"
        ) from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool}: exit code {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m grpo_fast.kernels.aot", description="Compile all kernels, no GPU.")
    parser.add_argument("--arch", type=int, choices=ARCHES, action="append", help="only this architecture; repeatable")
    parser.add_argument("--match", default="", help="only configurations whose label contains this")
    parser.add_argument("--json", type=Path, help="write the reports there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    options = parser.parse_args(arguments)
    wanted = [configuration for configuration in configurations() if options.match in configuration.label]
    try:
        rows = reports(wanted, options.arch or ARCHES)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(markdown(rows), end="")
    if options.json:
        content = {"triton": triton.__version__, "reports": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(document(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
