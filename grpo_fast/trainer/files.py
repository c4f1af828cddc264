"""Files and folders that appear whole, before what they replace goes: a kill at any moment loses nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

_WRITTEN, _REPLACED, _REMOVED = ".part", ".old", ".gone"


def scratch_of(target: Path) -> Path:
    """The empty folder beside `target` in which what will stand there is written."""
    scratch = _beside(target, _WRITTEN)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    return scratch


def put_in_place(target: Path) -> None:
    """Let what was written to `scratch_of(target)` be `target`; what stood there is removed after that."""
    scratch, earlier = _beside(target, _WRITTEN), _beside(target, _REPLACED)
    for file in scratch.rglob("*"):
        sync(file)
    sync(scratch)
    shutil.rmtree(earlier, ignore_errors=True)
    if target.exists():
        target.rename(earlier)
    scratch.rename(target)
    sync(target.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def remove_folder(target: Path) -> None:
    """Remove a folder; a kill in between leaves nothing that looks like one."""
    scratch = _beside(target, _REMOVED)
    shutil.rmtree(scratch, ignore_errors=True)
    target.rename(scratch)
    shutil.rmtree(scratch)


def recover(parent: Path, names: Iterable[str]) -> None:
    """Finish what kills left behind of targets with these `names` (patterns): what was to be replaced, and was not yet,
    is put back; the rest is removed."""
    for name in names:
        for earlier in parent.glob(f".{name}{_REPLACED}"):
            target = parent / earlier.name.removeprefix(".").removesuffix(_REPLACED)
            if not target.exists():
                earlier.rename(target)
        for ending in (_WRITTEN, _REPLACED, _REMOVED):
            for path in parent.glob(f".{name}{ending}"):
                shutil.rmtree(path)


def write_whole(target: Path, data: bytes) -> None:
    """Replace a file in one rename."""
    temporary = target.with_name(f"{target.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename never precedes its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}{ending}")
