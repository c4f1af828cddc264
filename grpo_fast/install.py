"""The command that installs this package once more, from where it came: error texts and `doctor` say it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
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
