"""The house rules that a reader of the code relies on: arrows between rooms, file sizes, nothing tied to one machine.

    cli -> trainer, integrations -> loss -> ops -> backends -> kernels, _C, _cuda

Imports are read with ast, lazy ones inside functions included, and so are module names given to import_module.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
MAX_LINES = 500  # a reader who must jump pays more than one who scrolls
MAX_TEST_LINES = 650  # tables of cases grow longer than code should


@dataclass(frozen=True)
class Import:
    """One imported module; `lazy` inside a function, `typing` under `if TYPE_CHECKING`."""

    name: str
    lazy: bool
    typing: bool

    @property
    def top_level(self) -> str:
        return self.name.partition(".")[0]


def module_name(path: Path) -> str:
    """The name a source file is installed under: kernels/ is grpo_fast.kernels."""
    parts = list(path.relative_to(REPO).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "grpo_fast")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, module: str, is_package: bool) -> set[Import]:
    """Every module that a syntax tree imports, relative names resolved against `module`."""
    found: set[Import] = set()

    def visit(node: ast.AST, lazy: bool, typing: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            names = [source] + [f"{source}.{alias.name}" for alias in node.names if source.split(".")[0] == "grpo_fast"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if re.fullmatch(r"grpo_fast(\.\w+)+", node.value) else []
            lazy = True  # a table of names for import_module
        found.update(Import(name, lazy, typing) for name in names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = typing or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            visit(child, lazy, typing)

    visit(tree, lazy=False, typing=False)
    return found


@cache
def modules() -> dict[str, set[Import]]:
    """Imports of every module of the package. Names that are no module (functions, classes) are left out."""
    paths = {module_name(path): path for folder in ("grpo_fast", "kernels") for path in (REPO / folder).rglob("*.py")}
    ours = set(paths) | {"grpo_fast._C", "grpo_fast._cuda"}
    result = {}
    for name, path in paths.items():
        found = imports_of(ast.parse(path.read_text()), name, path.name == "__init__.py")
        result[name] = {item for item in found if item.top_level != "grpo_fast" or item.name in ours - {name}}
    return result


def room(module: str) -> str:
    """Where a module lives: kernels, backends, ops, reference, loss (the core), trainer, integrations or cli."""
    parts = module.split(".")
    if len(parts) == 1:
        return "root"
    if parts[1] in ("kernels", "_C", "_cuda"):
        return "kernels"
    if parts[1] in ("backends", "ops", "trainer", "integrations", "cli", "reference", "__main__", "doctor"):
        return parts[1].replace("__main__", "cli")
    return "shared" if parts[1] in SHARED else "loss"


# Rooms that both the loss and the ops below it speak: what the options, rows and objectives are.
SHARED = ("config", "devices", "packing", "losses", "objectives", "install")

# room -> rooms it may import from, besides itself. `root` brings the loss when a name is asked for; `reference` is the
# tests' and doctor's.
ARROWS = {
    "root": {"shared", "loss"},
    "kernels": set(),
    "reference": set(),
    "shared": {"root"},
    "backends": {"root", "shared", "kernels"},
    "ops": {"root", "shared", "backends"},
    "loss": {"root", "shared", "ops", "backends"},
    "trainer": {"root", "shared", "loss"},
    "integrations": {"root", "shared", "loss"},
    "doctor": {"root", "shared", "loss", "ops", "backends", "reference"},
    "cli": {"root", "shared", "loss", "trainer", "doctor"},
}
THIRD_PARTIES = {"kernels": {"torch", "triton"}}
for _room in ("reference", "shared", "backends", "ops", "loss", "doctor"):
    THIRD_PARTIES[_room] = {"torch"}


def test_arrows_point_one_way() -> None:
    wrong = [
        f"{module} ({room(module)}) imports {item.name} ({room(item.name)})"
        for module, found in modules().items()
        for item in found
        if item.top_level == "grpo_fast" and room(item.name) not in ARROWS[room(module)] | {room(module)}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_core_imports_torch_only() -> None:
    wrong = [
        f"{module} imports {item.name}"
        for module, found in modules().items()
        if room(module) in THIRD_PARTIES
        for item in found
        if item.top_level not in sys.stdlib_module_names | THIRD_PARTIES[room(module)] | {"grpo_fast"}
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_goes_in_circles() -> None:
    """Lazy imports and those for types included; but for what finds modules by their names when they are asked for."""
    # A package's own __init__ is loaded by each of its modules, which is no circle as long as it imports none of them.
    by_name = ("grpo_fast", "grpo_fast.backends.base")
    edges = {
        module: sorted(
            item.name
            for item in found
            if item.top_level == "grpo_fast" and not (module in by_name and (item.lazy or item.typing))
        )
        for module, found in modules().items()
    }
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for target in edges.get(module, []):
                if not module.startswith(target + "."):
                    walk(target, (*path, module))
            done.add(module)

    for module in edges:
        walk(module, ())


def test_the_command_line_imports_third_parties_lazily() -> None:
    eager = [item for item in modules()["grpo_fast.cli"] if not (item.lazy or item.typing)]
    wrong = [item.name for item in eager if item.top_level not in sys.stdlib_module_names | {"grpo_fast"}]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn", {("torch.nn", False)}),
        ("def f():\n    from .sibling import x", {("grpo_fast.ops.sibling", True), ("grpo_fast.ops.sibling.x", True)}),
        ("from ..config import A", {("grpo_fast.config", False), ("grpo_fast.config.A", False)}),
        ("NAME = 'grpo_fast.trainer.loop'", {("grpo_fast.trainer.loop", True)}),
    ],
)
def test_imports_are_read_right(source: str, expected: set[tuple[str, bool]]) -> None:
    found = imports_of(ast.parse(source), "grpo_fast.ops.module", is_package=False)
    assert {(item.name, item.lazy) for item in found} == expected


# --- files ---


@cache
def repository_files() -> tuple[Path, ...]:
    """Text files that are or will be committed: git's view, or in an unpacked sdist everything."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True, text=True
    )
    skipped = {".venv", ".git", "runs", "build", "dist"}
    found = [REPO / name for name in listed.stdout.splitlines()] if listed.returncode == 0 else REPO.rglob("*")
    return tuple(path for path in found if path.is_file() and not skipped & set(path.relative_to(REPO).parts))


def test_files_stay_short() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in repository_files() if path.suffix == ".py"}
    assert sizes
    long = [
        f"{path.relative_to(REPO)}: {size} lines"
        for path, size in sizes.items()
        if size > (MAX_TEST_LINES if "tests" in path.parts else MAX_LINES)
    ]
    assert not long, "\n".join(long)


def test_no_file_names_a_machine() -> None:
    # The slashes are put in here, so that this file does not name a machine itself.
    folders = "work/ tmp/spec root/ home/[a-z] Users/ opt/wheels opt/pypi".split()
    pattern = re.compile(rf"(?<![\w.~}}])/(?:{'|'.join(folders)})".encode())
    wrong = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            lines = enumerate(content.splitlines(), start=1)
            wrong += [f"{path.relative_to(REPO)}:{number}" for number, line in lines if pattern.search(line)]
    assert not wrong, "\n".join(wrong)
