"""Which directories become which packages, and the native extensions; everything else is in pyproject.toml.

`kernels/` and `recipes/` stand at the top of the repository and are installed inside `grpo_fast`: a top-level `kernels`
would collide with Hugging Face's package of that name.

| extension | from | needs | without it |
|---|---|---|---|
| `grpo_fast._C` | csrc/*.cpp | a C++17 compiler with OpenMP | no backend `cpu` |
| `grpo_fast._cuda` | csrc/*.cu, csrc/nvcc.py | nvcc | no backend `cuda` |

Each is built where that is found; without it the install succeeds and says what it lacks. GRPO_FAST_CPU=0 and
GRPO_FAST_CUDA=0 leave an extension out, 1 makes its failure an error, auto is the default.
"""

import os
import runpy
import sys
from glob import glob
from pathlib import Path
from types import SimpleNamespace

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


def wanted(variable: str) -> str:
    """ "0", "1" or "auto"."""
    value = os.environ.get(variable, "auto")
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"{variable}: expected 0, 1 or auto; got {value!r}")
    return value


CPU, CUDA = wanted("GRPO_FAST_CPU"), wanted("GRPO_FAST_CUDA")
CSRC = Path(__file__).resolve().parent / "csrc"
LACKING = {
    "grpo_fast._C": "with a C++17 compiler that knows OpenMP, install again to get backend 'cpu'",
    "grpo_fast._cuda": "with NVIDIA's nvcc (CUDA 12.8 or later), install again to get backend 'cuda'",
}

native = Extension(
    "grpo_fast._C",
    sources=sorted(set(glob("csrc/*.cpp")) - {"csrc/bindings_cuda.cpp"}),
    depends=sorted(glob("csrc/*.h")),
    language="c++",
    optional=CPU != "1",
    # No -march: the row functions choose their instructions at run time. No -ffast-math: NaN and infinities count;
    # only exception flags, which nobody reads, do not.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-fopenmp",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
    ],
    extra_link_args=["-fopenmp"],
    libraries=["dl"],
)
cuda = Extension(
    "grpo_fast._cuda",
    sources=[*sorted(glob("csrc/*.cu")), "csrc/bindings_cuda.cpp"],
    depends=[*sorted(glob("csrc/*.h")), "csrc/nvcc.py"],
    optional=CUDA != "1",
)


class BuildNative(build_ext):
    """Builds the extensions; where that fails, says what the package lacks."""

    def build_extension(self, ext: Extension) -> None:
        try:
            try:
                import pybind11  # only now: an install that needs no extension needs no pybind11
            except ImportError as error:
                raise CompileError(f"pybind11 is not installed ({error})") from error
            ext.include_dirs.append(pybind11.get_include())
            if ext.name == cuda.name:
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except Exception as error:
            print(
                f"grpo-fast: {ext.name} cannot be built: {error}\nThe package works without it; {LACKING[ext.name]}.",
                file=sys.stderr,
            )
            raise  # forgiven if the extension is optional

    def build_cuda(self, ext: Extension) -> None:
        """Some minutes on two cores: five architectures."""
        nvcc = SimpleNamespace(**runpy.run_path(str(CSRC / "nvcc.py")))
        compiler = nvcc.find_nvcc()
        if compiler is None:
            raise CompileError("nvcc is neither on PATH nor below CUDA_HOME or /usr/local/cuda")
        try:
            nvcc.build(
                compiler,
                Path(self.get_ext_fullpath(ext.name)),
                Path(self.build_temp),
                csrc=CSRC,
                includes=[*ext.include_dirs, *self.include_dirs],
                architectures=nvcc.supported(compiler),
            )
        except nvcc.NvccError as error:
            raise CompileError(str(error)) from error


setup(
    packages=[
        "grpo_fast",
        "grpo_fast.integrations",
        "grpo_fast.integrations.trl",
        "grpo_fast.backends",
        "grpo_fast.ops",
        "grpo_fast.trainer",
        "grpo_fast.kernels",
        "grpo_fast.recipes",
    ],
    package_dir={"grpo_fast.kernels": "kernels", "grpo_fast.recipes": "recipes"},
    package_data={"grpo_fast": ["py.typed"], "grpo_fast.recipes": ["*.yaml"]},
    include_package_data=False,
    ext_modules=[native] * (CPU != "0") + [cuda] * (CUDA != "0"),
    cmdclass={"build_ext": BuildNative},
)
