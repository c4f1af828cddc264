"""How many of our files one call crosses: a limit, so that a reader's way through the library stays short."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from tests.crossings import Crossings, count

MAX_FILES = 11
"""Of a dapo step on `cpu` whose products the extension does."""
TORCH_PRODUCTS = 1
"""Files besides where torch does them: float32, and narrow types without the instructions."""

SIBLING = """
import math
def root(x):
    return math.sqrt(x)
def roots(n):
    for i in range(n):
        yield root(i)
"""
MAIN = """
from dataclasses import dataclass
from walked import sibling
@dataclass
class Point:
    x: float
    def root(self):
        return sibling.root(self.x)
def entry(n):
    from walked import late
    points = [Point(x) for x in range(n)]
    return late.twice(sum(p.root() for p in points)) + sum(sibling.roots(n))
"""
LATE = """
def helper(x):
    return x
constant = helper(1)  # while importing: not counted
def twice(x):
    return 2 * helper(x)
"""


@pytest.mark.skipif(importlib.util.find_spec("grpo_fast._C") is None, reason="grpo_fast._C is not built")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_dapo_step_on_cpu_crosses_few_files(dtype: str) -> None:
    _, crossings = count("cpu", "dapo", dtype)
    tree = crossings.tree()
    assert "_C.row_objective" in tree, tree
    limit = MAX_FILES + (0 if "_C.gemm_logits" in tree else TORCH_PRODUCTS)
    assert len(crossings.files) <= limit, crossings.report(dtype)


def test_what_is_counted(tmp_path, monkeypatch) -> None:
    package = tmp_path / "walked"
    package.mkdir()
    for name, text in (("__init__", ""), ("main", MAIN), ("sibling", SIBLING), ("late", LATE)):
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    entry = importlib.import_module("walked.main").entry
    with Crossings({"walked": package}, {"math"}) as crossings:
        entry(3)
    # entry, root and (in turn with it) sibling.root, twice and helper, the generator once and what it calls
    entered = {file: functions.total() for file, functions in crossings.files.items()}
    assert entered == {"walked/main.py": 1 + 3, "walked/sibling.py": 3 + 1 + 3, "walked/late.py": 2}
    assert (crossings.num_functions, crossings.num_entries) == (6, 13)
    assert crossings.changes == 5 + 1 + 1
    assert crossings.tree().splitlines()[1:] == [
        "    walked/main.py  entry",
        "        walked/main.py  Point.root  x3",
        "            walked/sibling.py  root",
        "                math.sqrt",
        "        walked/sibling.py  roots",
        "            walked/sibling.py  root  x3",
        "                math.sqrt",
    ] or not hasattr(entry.__code__, "co_qualname")
    assert crossings.chain_files() == {"walked/main.py", "walked/sibling.py"}

    with Crossings({"walked": package}, {"math"}) as again:
        entry(3)
    assert (again.files, again.changes) == (crossings.files, crossings.changes)


def test_an_error_on_the_way_leaves_the_count_right(tmp_path, monkeypatch) -> None:
    (tmp_path / "failing.py").write_text(
        "def fails():\n    raise ValueError\n"
        "def entry():\n    try:\n        fails()\n    except ValueError:\n        return abs(-1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = importlib.import_module("failing").entry
    with Crossings({"own": tmp_path}, {"builtins"}) as crossings:
        entry()
    assert crossings.tree().splitlines()[1:3] == ["    own/failing.py  entry", "        builtins.abs"]
