"""What this node knows for all of its processes: folders that were brought to it, files that were read."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

_KEPT = 4
_LARGE = 1 << 20
"""Bytes: of a smaller file, a note is not worth its place."""
_TICK_S = 0.012


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


def sha256_once(path: Path) -> str:
    """Of what a file holds. A large one is read once on this node: again only where it has changed since."""
    if path.stat().st_size < _LARGE:
        return sha256_file(path)
    note = _settled_note(path)
    with suppress(FileNotFoundError):
        return note.read_text()
    sha256 = sha256_file(path)
    if note == _note(path):  # Nobody has written to the file meanwhile.
        _write(note, sha256)
    return sha256


def note_sha256(path: Path, sha256: str) -> None:
    """Let this node know it of a file that was just written."""
    if path.stat().st_size >= _LARGE:
        _write(_settled_note(path), sha256)


def sha256_file(path: Path) -> str:
    """Of what a file holds, which is read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _settled_note(path: Path) -> Path:
    """The note's place, when a later change would have a later time: file systems count in ticks."""
    age_s = time.time() - path.stat().st_ctime
    if 0 <= age_s < _TICK_S:
        time.sleep(_TICK_S - age_s)
    return _note(path)


def _note(path: Path) -> Path:
    """Another one whenever the file changes: nobody can set the time of its last change."""
    state = path.stat()
    version = (str(path.absolute()), state.st_ino, state.st_size, state.st_ctime_ns)
    return _root() / "sha256" / hashlib.sha256(repr(version).encode()).hexdigest()


def _write(note: Path, sha256: str) -> None:
    note.parent.mkdir(exist_ok=True)
    aside = note.with_suffix(f".{os.getpid()}")
    aside.write_text(sha256)
    os.replace(aside, note)


def _home(owner: str) -> Path:
    return _root() / hashlib.sha256(owner.encode()).hexdigest()[:16]


def _root() -> Path:
    """Of this user alone. PermissionError: it is another one's."""
    root = Path(tempfile.gettempdir()) / f"dpo_ray_{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user: remove it, or set TMPDIR to another folder")
    return root


def _remove_old(home: Path) -> None:
    folders = [entry for entry in home.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    for old in sorted(folders, key=lambda folder: folder.stat().st_mtime)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
        with suppress(FileNotFoundError):
            Path(f"{old}.lock").unlink()
