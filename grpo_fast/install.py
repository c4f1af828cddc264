"""How to install what is missing, from where this package came; and its extension modules, where they are built."""

from __future__ import annotations

import importlib.metadata
import json
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "grpo-fast"


def install_command(extra: str = "") -> str:
    """`pip install ...` with an extra of the package (none: the package itself, built anew).

    pip notes where it got a package from (direct_url.json, PEP 610): a folder of sources, installed as it is or
    editable, a file, a repository. Without that note it came from an index by its name; sources that run uninstalled
    are a folder.
    """
    origin, editable = _origin()
    suffix = f"[{extra}]" if extra else ""
    if origin is None:
        return f"pip install '{NAME}{suffix}'" if extra else f"pip install --force-reinstall --no-deps {NAME}"
    if "://" in origin:
        return f"pip install '{NAME}{suffix} @ {origin}'"
    return f"pip install {'-e ' * editable}'{origin}{suffix}'"


def load_extension(name: str) -> tuple[Any, str]:
    """(the extension module, "") or, where it is not built, (None, why not)."""
    try:
        return import_module(name), ""
    except ImportError as error:
        return None, str(error)


def not_built(name: str, missing: str, needs: str, variable: str) -> str:
    """What to say of a module that did not load."""
    return (
        f"{name} is not built ({missing}); install grpo-fast again where there is {needs} "
        f"({variable}=1 {install_command()} shows why it fails)"
    )


def _origin() -> tuple[str | None, bool]:
    """(folder or file, or a URL; None: an index) and whether the install is editable."""
    try:
        noted = importlib.metadata.distribution(NAME).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return str(Path(__file__).resolve().parent.parent), True
    if not noted:
        return None, False
    note = json.loads(noted)
    url = urlsplit(note["url"])
    if url.scheme == "file":
        return unquote(url.path), bool(note.get("dir_info", {}).get("editable"))
    vcs = note.get("vcs_info", {}).get("vcs")
    return f"{vcs}+{note['url']}" if vcs else note["url"], False
