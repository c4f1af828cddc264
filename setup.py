"""Which directories become which packages, and the native extension; everything else is in pyproject.toml.

`kernels/` and `recipes/` stand at the top of the repository and are installed inside `grpo_fast`: a top-level `kernels`
would collide with Hugging Face's package of that name.

`grpo_fast._C` (csrc/) is built where there is a C++ compiler; without one the install succeeds and says what it lacks.
GRPO_FAST_CPU=0 leaves it out, GRPO_FAST_CPU=1 makes its failure an error.
"""

import os
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("GRPO_FAST_CPU", "auto")
if WANTED not in ("0", "1", "auto"):
    raise SystemExit(f"GRPO_FAST_CPU: expected 0, 1 or auto; got {WANTED!r}")


class BuildNative(build_ext):
    """Builds `grpo_fast._C`; where that fails, says what the package lacks without it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        ext.include_dirs.append(pybind11.get_include())
        try:
            super().build_extension(ext)
        except Exception:
            print(
                f"grpo-fast: {ext.name} cannot be built. The package works without it, by the torch backend; with a "
                "C++17 compiler that knows OpenMP, install again to get backend 'cpu'.",
                file=sys.stderr,
            )
            raise  # forgiven if the extension is optional


native = Extension(
    "grpo_fast._C",
    sources=sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h")),
    language="c++",
    optional=WANTED != "1",
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

setup(
    packages=[
        "grpo_fast",
        "grpo_fast.integrations",
        "grpo_fast.integrations.trl",
        "grpo_fast.ops",
        "grpo_fast.trainer",
        "grpo_fast.kernels",
        "grpo_fast.recipes",
    ],
    package_dir={"grpo_fast.kernels": "kernels", "grpo_fast.recipes": "recipes"},
    package_data={"grpo_fast": ["py.typed"], "grpo_fast.recipes": ["*.yaml"]},
    include_package_data=False,
    ext_modules=[] if WANTED == "0" else [native],
    cmdclass={"build_ext": BuildNative},
)
