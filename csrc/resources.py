"""What the kernels take: registers and spills as ptxas reports them, instructions as the disassembler shows them.

    python csrc/resources.py            writes csrc/CUDA_RESOURCES.md (all architectures; half a minute on two cores)

tests/test_cuda_build.py asks the same of one architecture or two.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
PASSES = ("statistics", "gradient", "objective")
DTYPES = ("float32", "bfloat16", "float16")
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_ROW_KERNEL = re.compile(r"\d+(stream|cluster)_kernelILNS_4PassE(\d)ELb(\d)ELNS_5DTypeE(\d)E")
_GROUP_KERNEL = re.compile(r"\d+(advantages|count|write)_kernel(?:I([fd])E)?")


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture; bytes but for registers."""

    kernel: str
    arch: str
    registers: int
    stack: int
    spilled: int
    static_shared: int


def kernel_name(mangled: str) -> str:
    """`cluster objective bfloat16`, with `transform` where bias and soft cap are served; `advantages float`, ..."""
    row = _ROW_KERNEL.search(mangled)
    if row:
        kind, pass_, transforms, dtype = row.groups()
        written = "" if pass_ == "0" else f" {DTYPES[int(dtype)]}"
        return f"{kind} {PASSES[int(pass_)]}{written}{' transform' if transforms == '1' else ''}"
    group = _GROUP_KERNEL.search(mangled)
    if group is None:
        raise ValueError(f"mangled: expected a kernel of csrc/*.cu; got {mangled}")
    real = {"f": " float", "d": " double", None: ""}[group[2]]
    return f"{group[1]}{real}"


def parse(log: str) -> list[Resources]:
    """What `nvcc -Xptxas -v` said."""
    found = []
    for match in _ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            Resources(
                kernel_name(match["name"]),
                match["arch"],
                int(match["registers"]),
                int(match["stack"]),
                int(match["stores"]) + int(match["loads"]),
                int(shared[1]) if shared else 0,
            )
        )
    return found


def disassembler() -> Path | None:
    """cuobjdump, from Triton's package."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def instructions(sass: str) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) of every kernel in what `cuobjdump --dump-sass` printed for one architecture."""
    kernels = {}
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        body = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", part)
        kernels[kernel_name(part.partition("\n")[0])] = [(int(address, 16), text) for address, text in body]
    return kernels


def opcode(instruction: str) -> str:
    """Without predicate and operands."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def loops(body: list[tuple[int, str]], access: str, least: int) -> list[list[str]]:
    """Opcodes of the innermost loops with at least `least` instructions `access`: the main loops."""
    ranges = []
    for address, text in body:
        target = re.search(r"0x[0-9a-f]+$", text.strip())
        if opcode(text).startswith("BRA") and target and int(target[0], 16) < address:
            start = int(target[0], 16)
            inside = [opcode(line) for at, line in body if start <= at <= address]
            if sum(name.startswith(access) for name in inside) >= least:
                ranges.append((start, address, inside))
    innermost = [
        r for r in ranges if not any(o is not r and r[0] <= o[0] and o[1] <= r[1] and o[:2] != r[:2] for o in ranges)
    ]
    return [inside for _, _, inside in innermost]


def table(found: list[Resources]) -> str:
    """Markdown: a line a kernel, registers by architecture, and the most that any of them spills."""
    arches = sorted({r.arch for r in found}, key=lambda arch: int(arch.rstrip("a")))
    lines = [
        f"| kernel | {' | '.join(f'sm_{arch}' for arch in arches)} | stack | spilled | static shared |",
        f"|---|{'---:|' * (len(arches) + 3)}",
    ]
    for kernel in sorted({r.kernel for r in found}):
        mine = {r.arch: r for r in found if r.kernel == kernel}
        registers = " | ".join(str(mine[arch].registers) for arch in arches)
        most = [max(getattr(r, name) for r in mine.values()) for name in ("stack", "spilled", "static_shared")]
        lines.append(f"| {kernel} | {registers} | {' | '.join(map(str, most))} |")
    return "\n".join(lines)


HEADER = """\
# Registers and spills

Registers a thread, as ptxas reports them; bytes a thread of stack and of spills, bytes a block of static shared
memory (the most of any architecture). Cluster kernels also take dynamic shared memory, and exist on sm_90 and later
only: elsewhere they are a trap that is never launched. `transform`: with bias or soft cap. Written by
`python csrc/resources.py`.

{compiler}

"""


def main() -> int:
    sys.path.insert(0, str(CSRC))
    import nvcc

    compiler = nvcc.find_nvcc()
    if compiler is None:
        print("nvcc: not found", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        targets = nvcc.targets(nvcc.supported(compiler), ptx=False)
        _, log = nvcc.compile_kernels(compiler, Path(folder), targets, csrc=CSRC)
    release = nvcc.run([compiler, "--version"]).strip().splitlines()[-2]
    (CSRC / "CUDA_RESOURCES.md").write_text(HEADER.format(compiler=release) + table(parse(log)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
