"""How `grpo_fast._cuda` is compiled: architectures and flags, once for setup.py, the tests and resources.py.

nvcc compiles and links everything, so its own paths need not be known; the CUDA runtime is linked statically.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARCHITECTURES = ("80", "86", "89", "90a", "100")
"""Machine code for these; and PTX of the last, which drivers compile for what comes later."""
KERNELS = ("row_cuda.cu", "group_cuda.cu")
BINDINGS = "bindings_cuda.cpp"
FLAGS = ("-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
# -fmad=false: row_math.h says where a multiplication and an addition are one instruction. -v: registers and spills.
KERNEL_FLAGS = (*FLAGS, "-O3", "-fmad=false", "-Xptxas=-v")
WARNINGS_ARE_ERRORS = ("-Werror=all-warnings", "-Xcompiler=-Werror")


class NvccError(Exception):
    """nvcc failed; the message is its output."""


def find_nvcc() -> str | None:
    """The CUDA compiler: on PATH, below $CUDA_HOME, or in its usual place."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = ["nvcc", *(str(Path(home, "bin", "nvcc")) for home in homes if home)]
    return next(filter(None, map(shutil.which, candidates)), None)


def run(command: Sequence[str | Path]) -> str:
    """What `command` prints.

    Raises:
        NvccError: it failed.
    """
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise NvccError(f"{' '.join(map(str, command))}\nexit code {done.returncode}\n{done.stdout[-8000:]}")
    return done.stdout


def supported(nvcc: str) -> tuple[str, ...]:
    """Those of `ARCHITECTURES` that this nvcc knows."""
    known = run([nvcc, "--list-gpu-code"]).split()  # sm_90a is not listed, sm_90 is
    return tuple(arch for arch in ARCHITECTURES if f"sm_{arch.rstrip('a')}" in known)


def targets(architectures: Sequence[str], *, ptx: bool = True) -> list[str]:
    """The -gencode options."""
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    last = architectures[-1].rstrip("a")  # PTX of sm_90a runs on nothing else
    return [*options, f"-gencode=arch=compute_{last},code=compute_{last}"] if ptx else options


def compile_kernels(
    nvcc: str, folder: Path, options: Iterable[str], *, csrc: Path, jobs: int = 0
) -> tuple[list[Path], str]:
    """Objects of the kernels, in `folder`, and nvcc's words (registers, spills). jobs 0: as many as there are cores."""
    objects = [folder / Path(name).with_suffix(".o").name for name in KERNELS]
    common = [nvcc, *KERNEL_FLAGS, f"--threads={jobs}", *options, "-c"]
    log = "".join(run([*common, csrc / name, "-o", made]) for name, made in zip(KERNELS, objects, strict=True))
    return objects, log


def build(
    nvcc: str,
    output: Path,
    folder: Path,
    *,
    csrc: Path,
    includes: Iterable[str],
    architectures: Sequence[str],
    ptx: bool = True,
    options: Sequence[str] = (),
) -> str:
    """Compile and link the extension module `output`, with intermediate files in `folder`; returns nvcc's words.

    Raises:
        NvccError: nvcc failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    names = ",".join([f"sm_{arch}" for arch in architectures] + [f"compute_{architectures[-1].rstrip('a')}"] * ptx)
    bindings = folder / Path(BINDINGS).with_suffix(".o").name
    hosts = [nvcc, *FLAGS, "-O1", *options, *(f"-I{path}" for path in includes), f'-DGRPO_FAST_ARCHITECTURES="{names}"']
    with ThreadPoolExecutor(2) as pool:  # the bindings beside the kernels
        bound = pool.submit(run, [*hosts, "-c", csrc / BINDINGS, "-o", bindings])
        objects, log = compile_kernels(nvcc, folder, [*targets(architectures, ptx=ptx), *options], csrc=csrc)
        bound.result()
    run([nvcc, "-shared", "-cudart=static", *objects, bindings, "-o", output])
    return log
