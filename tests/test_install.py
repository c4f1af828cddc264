"""The command that error texts and `doctor` name: what pip noted of the install decides."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_fast.install import install_command

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let pip have noted this as the origin; None: nothing."""

    def note(text: str | None) -> None:
        distribution = SimpleNamespace(read_text=lambda name: text if name == "direct_url.json" else "")
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)

    return note


@pytest.mark.parametrize(
    ("note", "command"),
    [
        ('{"url": "file:///src/my%20clone", "dir_info": {"editable": true}}', "pip install -e '/src/my clone[train]'"),
        ('{"url": "file:///src/clone", "dir_info": {}}', "pip install '/src/clone[train]'"),
        ('{"url": "file:///dist/a.whl", "archive_info": {}}', "pip install '/dist/a.whl[train]'"),
        (
            '{"url": "https://host/a.git", "vcs_info": {"vcs": "git", "commit_id": "1"}}',
            "pip install 'grpo-fast[train] @ git+https://host/a.git'",
        ),
        ('{"url": "https://host/a.whl", "archive_info": {}}', "pip install 'grpo-fast[train] @ https://host/a.whl'"),
        (None, "pip install 'grpo-fast[train]'"),
    ],
)
def test_an_extra_comes_from_where_the_package_came(noted: Any, note: str | None, command: str) -> None:
    noted(note)
    assert install_command("train") == command


def test_the_package_itself_is_built_again(noted: Any) -> None:
    noted('{"url": "file:///src/clone", "dir_info": {}}')
    assert install_command() == "pip install '/src/clone'"
    noted(None)
    assert install_command() == "pip install --force-reinstall --no-deps grpo-fast"


def test_uninstalled_sources_are_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert install_command("train") == f"pip install -e '{REPO}[train]'"


def test_no_other_text_says_how_to_install_the_package() -> None:
    """`pip install 'grpo-fast[...]'` finds nothing where the package came from a clone, `pip install .` elsewhere."""
    guesses = re.compile(r"pip install (?:'?grpo-fast|-e |'?\.)")
    texts = {path: path.read_text() for folder in ("grpo_fast", "kernels") for path in (REPO / folder).rglob("*.py")}
    assert [path.name for path, text in texts.items() if guesses.search(text)] == ["install.py"]
