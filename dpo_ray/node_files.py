"""Folders that were brought to this node, once for all of its processes."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

_KEPT = 4


def kept(owner: str, content: str) -> Path | None:
    """A run's folder that is here already, by the name of what it holds. `owner`: the run."""
    folder = _home(owner) / content
    return folder if folder.exists() else None


def bring(owner: str, content: str, fill: Callable[[Path], None]) -> Path:
    """The folder, which `fill` puts the files into unless another process did, or does now.

    Files that several processes read are in memory once. Of each owner, the newest folders stay.
    """
    home = _home(owner)
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f"{content}.lock"):
        if (folder := kept(owner, content)) is not None:
            return folder
        aside = Path(tempfile.mkdtemp(dir=home, prefix="."))
        try:
            fill(aside)
            os.replace(aside, home / content)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    _remove_old(home)
    return home / content


def forget(owner: str, content: str) -> None:
    """Remove a folder, if it is here."""
    shutil.rmtree(_home(owner) / content, ignore_errors=True)


def _home(owner: str) -> Path:
    return Path(tempfile.gettempdir()) / "dpo_ray" / hashlib.sha256(owner.encode()).hexdigest()[:16]


def _remove_old(home: Path) -> None:
    folders = [entry for entry in home.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    for old in sorted(folders, key=lambda folder: folder.stat().st_mtime)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
        with suppress(FileNotFoundError):
            Path(f"{old}.lock").unlink()
