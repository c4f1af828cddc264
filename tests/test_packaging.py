"""What a distribution contains, that each kind of install works, and what importing the parts loads.

Everything runs offline: builds without isolation in copies of the sources, installs without dependencies in scratch
environments that see this one's packages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import grpo_fast

REPO = Path(__file__).resolve().parent.parent
FILES = "pyproject.toml setup.py MANIFEST.in LICENSE README.md CHANGELOG.md Makefile".split()
CONSTRAINTS = {"constraints.txt", "constraints-oldest.txt", "constraints-newest.txt"}
FOLDERS = "grpo_fast kernels recipes".split()
EXTENSION = "grpo_fast/_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Standard output of a command that must succeed, free of this process's PYTHONPATH.

    The CUDA extension is left out unless asked for: test_cuda_build.py builds it.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"GRPO_FAST_CUDA": "0"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=inherited | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def copy_sources(target: Path) -> Path:
    """The files a clone has, in `target`: building in the repository itself would leave things behind."""
    target.mkdir()
    for name in (*FILES, *CONSTRAINTS):
        shutil.copy(REPO / name, target / name)
    for name in (*FOLDERS, "csrc"):
        shutil.copytree(REPO / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
    return target


def expected_modules() -> set[str]:
    """Every Python file and recipe of the repository, at the place where it is to be installed."""
    found = set()
    for folder in FOLDERS:
        inside = "grpo_fast" if folder == "grpo_fast" else f"grpo_fast/{folder}"
        files = [path for path in (REPO / folder).rglob("*") if path.suffix in (".py", ".yaml")]
        found |= {f"{inside}/{path.relative_to(REPO / folder).as_posix()}" for path in files}
    return found


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """sdist, the wheel built from it (without native code), and the wheel built from the sources directly (with)."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("build")
    sources = copy_sources(folder / "sources")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(
        *build, folder / "from_sdist", sources, cwd=folder, GRPO_FAST_CPU="0"
    )  # neither --sdist nor --wheel: the wheel is built from the sdist
    native = "1" if shutil.which("g++") else "0"
    run(*build, folder / "direct", "--wheel", sources, cwd=folder, GRPO_FAST_CPU=native)
    (sdist,) = (folder / "from_sdist").glob("*.tar.gz")
    (from_sdist,) = (folder / "from_sdist").glob("*.whl")
    (direct,) = (folder / "direct").glob("*.whl")
    return {"sdist": sdist, "from_sdist": from_sdist, "direct": direct}


def scratch_environment(folder: Path) -> Path:
    """The interpreter of a new virtual environment that sees this environment's packages, without their .pth files.

    Without: an editable grpo-fast of this environment must not answer for the one under test.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (purelib / "this_environment.pth").write_text("\n".join(sorted(here)))
    return python


def install(python: Path, *what: str | Path, **env: str) -> None:
    """pip install of `what` alone, into the environment of `python`."""
    options = "--quiet --no-index --no-deps --no-build-isolation --ignore-installed --no-warn-script-location".split()
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent, **env)


@pytest.mark.parametrize("kind", ["direct", "from_sdist"])
def test_wheel_contains_every_module_under_one_top_level(distributions: dict[str, Path], kind: str) -> None:
    with zipfile.ZipFile(distributions[kind]) as wheel:
        names = set(wheel.namelist())
        (top_level,) = (wheel.read(name).decode() for name in names if name.endswith(".dist-info/top_level.txt"))
    assert {name.split("/")[0] for name in names} == {"grpo_fast", f"grpo_fast-{grpo_fast.__version__}.dist-info"}
    assert top_level.split() == ["grpo_fast"]
    installed = {name for name in names if name.startswith("grpo_fast/") and name.endswith((".py", ".yaml"))}
    assert installed == expected_modules(), "setup.py lists packages by hand: is a new one missing there?"
    assert {"grpo_fast/kernels/__init__.py", "grpo_fast/py.typed"} <= names
    assert (EXTENSION in names) == (kind == "direct" and shutil.which("g++") is not None)


def test_sdist_is_complete_and_licensed(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "kernels/__init__.py", "setup.py", "pyproject.toml"} <= names
    assert "grpo_fast/py.typed" in names
    assert names >= CONSTRAINTS
    sources = {f"csrc/{path.name}" for path in (REPO / "csrc").iterdir() if path.is_file()}
    assert {"csrc/bindings.cpp", "csrc/objective.h", "csrc/row_cuda.cu", "csrc/nvcc.py"} <= sources <= names


@pytest.mark.parametrize("kind", ["direct", "from_sdist", "editable"])
def test_installs_import(distributions: dict[str, Path], tmp_path: Path, kind: str) -> None:
    python = scratch_environment(tmp_path / "env")
    if kind == "editable":
        home = copy_sources(tmp_path / "sources")
        # A compiler that fails does not fail the install.
        install(python, "--editable", home, CXX="false", CC="false", GRPO_FAST_CPU="auto")
    else:
        home = tmp_path / "env"
        install(python, distributions[kind])
    program = """
import importlib.metadata, importlib.resources, importlib.util
import grpo_fast, grpo_fast.kernels, grpo_fast.loss
print(grpo_fast.__file__)
print(grpo_fast.kernels.__file__)
print(importlib.metadata.version("grpo-fast"), grpo_fast.__version__)
from grpo_fast.backends.base import get_backend
print(get_backend("cpu").why_unavailable(__import__("torch").device("cpu")))
print(sorted(path.name for path in importlib.resources.files("grpo_fast.recipes").iterdir() if path.suffix == ".yaml"))
"""
    package, kernels, versions, obstacle, recipes = run(python, "-c", program, cwd=tmp_path).splitlines()
    assert Path(package).is_relative_to(home)
    assert Path(kernels).is_relative_to(home)
    assert versions.split() == [grpo_fast.__version__] * 2
    assert (obstacle == "None") == (kind == "direct" and shutil.which("g++") is not None)
    assert recipes == str(sorted(path.name for path in (REPO / "recipes").glob("*.yaml")))
    assert "train" in run(tmp_path / "env" / "bin" / "grpo-fast", "--help", cwd=tmp_path)


# --- what cannot be built ---

BUILD = """
import runpy, sys
if {without_pybind11}:
    sys.modules["pybind11"] = None
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", "lib", "--build-temp", "objects"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, and beside it an `nvcc` that fails."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "bin").mkdir()
    (folder / "bin" / "nvcc").write_text("#!/bin/sh\necho this compiler is broken\nexit 3\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    return copy_sources(folder / "sources")


def build(sources: Path, *, without_pybind11: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUILD.format(without_pybind11=without_pybind11)]
    path = f"{sources.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, cwd=sources, env=os.environ | {"PATH": path} | env, capture_output=True, text=True)


def test_an_install_without_pybind11_succeeds_and_says_what_it_lacks(sources: Path) -> None:
    done = build(sources, without_pybind11=True, GRPO_FAST_CPU="auto", GRPO_FAST_CUDA="auto")
    assert done.returncode == 0, done.stderr
    for name, backend in (("_C", "cpu"), ("_cuda", "cuda")):
        assert f"grpo_fast.{name} cannot be built: pybind11 is not installed" in done.stderr
        assert f"install again to get backend '{backend}'" in done.stderr
    assert build(sources, without_pybind11=True, GRPO_FAST_CPU="1", GRPO_FAST_CUDA="0").returncode != 0


def test_an_nvcc_that_fails_fails_the_install_only_if_asked_to(sources: Path) -> None:
    done = build(sources, GRPO_FAST_CPU="0", GRPO_FAST_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert "grpo_fast._cuda cannot be built" in done.stderr
    assert "this compiler is broken" in done.stderr
    assert "The package works without it; with NVIDIA's nvcc" in done.stderr
    assert build(sources, GRPO_FAST_CPU="0", GRPO_FAST_CUDA="1").returncode != 0
    refused = build(sources, GRPO_FAST_CUDA="yes")
    assert "GRPO_FAST_CUDA: expected 0, 1 or auto; got 'yes'" in refused.stderr


# --- Hugging Face's `kernels`, from the repository root ---


def in_root(program: str, **env: str) -> str:
    """Run a program with the repository root first on sys.path, as `python -m pytest` there does."""
    return run(sys.executable, "-c", program, cwd=REPO, **env)


@pytest.fixture
def without_hugging_face_kernels(tmp_path: Path) -> None:
    """Skip where the real package is installed: its absence is what is tested."""
    found = run(sys.executable, "-c", "import importlib.util as u; print(u.find_spec('kernels'))", cwd=tmp_path)
    if found != "None":
        pytest.skip("Hugging Face's kernels is installed here")


def test_hugging_face_kernels_is_importable_from_the_root(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from .layer import get_kernel\n__version__ = '0.18.3'\n")
    (package / "layer.py").write_text("def get_kernel(name):\n    return f'real {name}'\n")
    metadata = tmp_path / "kernels-0.18.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.3\n")
    program = """
import kernels
from kernels import get_kernel
import kernels.layer, importlib.util, importlib.metadata, sys
print(kernels.__file__)
print(get_kernel("rms"), kernels.layer.get_kernel is get_kernel, importlib.metadata.version("kernels"))
print(importlib.util.find_spec("kernels").origin)
import grpo_fast.kernels
print(sys.modules["kernels"] is kernels and grpo_fast.kernels is not kernels)
"""
    lines = in_root(program, PYTHONPATH=str(tmp_path)).splitlines()
    real = str(package / "__init__.py")
    assert lines == [real, "real rms True 0.18.3", real, "True"]


@pytest.mark.usefixtures("without_hugging_face_kernels")
def test_plain_kernels_is_refused() -> None:
    program = """
try:
    import kernels
except ImportError as error:
    print(error)
"""
    assert "import `grpo_fast.kernels`" in in_root(program)


@pytest.mark.usefixtures("without_hugging_face_kernels")
def test_transformers_imports_in_the_root_without_hugging_face_kernels() -> None:
    pytest.importorskip("transformers")
    program = """
import transformers.modeling_utils
from transformers.utils import is_kernels_available
print(is_kernels_available())
for attempt in ("from kernels import get_kernel", "import kernels.layer"):
    try:
        exec(attempt)
    except ImportError as error:
        print(type(error).__name__)
"""
    assert in_root(program).splitlines() == ["False", "ImportError", "ModuleNotFoundError"]


# --- what importing loads ---

HEAVY = "transformers omegaconf matplotlib trl peft datasets accelerate pandas rich reasoning_gym".split()


def loaded_by(*modules: str, watched: list[str]) -> list[str]:
    """Which of `watched` a fresh interpreter has loaded after importing `modules`."""
    program = f"import sys, {', '.join(modules)}; print(*[name for name in {watched} if name in sys.modules])"
    return in_root(program).split()


def test_the_loss_needs_torch_only() -> None:
    modules = [f"grpo_fast.{name}" for name in "loss advantages packing head metrics config reference".split()]
    by_torch = loaded_by("torch", "torch._dynamo", watched=["triton"])  # dynamo imports it where it is installed
    assert loaded_by(*modules, watched=["torch", *HEAVY]) == ["torch"]
    assert loaded_by(*modules, watched=["triton"]) == by_torch


def test_the_command_line_starts_without_heavy_imports() -> None:
    assert loaded_by("grpo_fast.cli", watched=["torch", *HEAVY]) == []


def test_version_is_written_once() -> None:
    assert f'__version__ = "{grpo_fast.__version__}"' in (REPO / "grpo_fast" / "__init__.py").read_text()
    assert "\nversion =" not in (REPO / "pyproject.toml").read_text().split("[tool.")[0]
    assert "version=" not in (REPO / "setup.py").read_text()
    assert f"## {grpo_fast.__version__}" in (REPO / "CHANGELOG.md").read_text().replace("[", "").replace("]", "")


# --- what versions are promised and tried ---


def pins(name: str) -> dict[str, str]:
    """distribution: release, of a constraints file; of several lines the first."""
    found: dict[str, str] = {}
    for line in (REPO / name).read_text().splitlines():
        match = re.match(r"([\w.-]+)==([\w.]+)", line)
        if match:
            found.setdefault(match[1].lower(), match[2])
    return found


def lower_bounds(section: str) -> dict[str, str]:
    """distribution: release that `>=` names, in a list of pyproject.toml."""
    text = (REPO / "pyproject.toml").read_text()
    listed = re.search(rf"^{section} = \[(.*?)\]$", text, flags=re.DOTALL | re.MULTILINE)
    assert listed is not None, section
    return dict(re.findall(r'"([\w.-]+)>=([\w.]+)', listed[1]))


@pytest.mark.parametrize("section", ["requires", "dependencies", "train"])
def test_every_lower_bound_is_what_the_oldest_run_installs(section: str) -> None:
    """3.8 promises 3.8.*: `make test-oldest` runs with one of these, so the bound is reachable and works."""
    tried, bounds = pins("constraints-oldest.txt"), lower_bounds(section)
    assert bounds
    wrong = {name: bound for name, bound in bounds.items() if f"{tried.get(name)}.".find(f"{bound}.") != 0}
    assert not wrong, f"constraints-oldest.txt has { ({name: tried.get(name) for name in wrong}) } for {wrong}"


@pytest.mark.parametrize("section", ["demo", "bench"])
def test_other_lower_bounds_are_what_the_suite_installs(section: str) -> None:
    tried, bounds = pins("constraints.txt"), lower_bounds(section)
    tools = {"matplotlib", "pytest", "pytest-benchmark"}  # of another extra, and of developers
    wrong = {name: bound for name, bound in bounds.items() if f"{tried.get(name)}.".find(f"{bound}.") != 0}
    assert not wrong.keys() - tools, wrong


def test_the_newest_run_is_ahead_of_the_suite() -> None:
    def numbers(release: str) -> tuple[int, ...]:
        return tuple(map(int, release.split(".")))

    oldest, suite, newest = (pins(f"constraints{which}.txt") for which in ("-oldest", "", "-newest"))
    for name in ("torch", "triton"):
        assert numbers(oldest[name]) < numbers(suite[name]) < numbers(newest[name])
    behind = [name for name, release in newest.items() if numbers(release) < numbers(suite.get(name, "0"))]
    assert not behind


def test_ci_runs_both_ends() -> None:
    script = (REPO / ".ci" / "run").read_text().splitlines()
    assert {"make test", "make test-oldest", "make test-newest"} <= set(script)
    plan = subprocess.run(["make", "-n", "-B", "test-oldest", "test-newest"], cwd=REPO, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    for which in ("oldest", "newest"):
        lines = [line for line in plan.stdout.splitlines() if f".venv-{which}/bin/python -m" in line]
        assert f"constraints-{which}.txt" in lines[0]
        named = [word for line in lines[1:] for word in line.split() if word.startswith("tests/")]
        assert len(named) > 15
        assert all((REPO / word.partition("::")[0]).exists() for word in named), named
        assert "TRITON_INTERPRET=1" in lines[-1]
