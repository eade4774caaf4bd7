"""Files of a run, below one root that is a local folder or a URL."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from pyarrow import fs

from dpo_ray import node_files


class Storage:
    """Reads and writes by relative path; a file appears whole or not at all."""

    def __init__(self, root: str) -> None:
        self.root = root if "://" in root else str(Path(root).expanduser().absolute())
        self._fs, self._base = fs.FileSystem.from_uri(self.root) if "://" in root else (_LOCAL, self.root)

    @property
    def local_root(self) -> Path | None:
        """The root as a path, or None where it is a remote URL."""
        return Path(self._base) if isinstance(self._fs, fs.LocalFileSystem) else None

    def exists(self, path: str) -> bool:
        return self._fs.get_file_info(self._at(path)).type != fs.FileType.NotFound

    def list(self, path: str) -> list[str]:
        """Sorted names in a folder; [] where there is none."""
        selector = fs.FileSelector(self._at(path), allow_not_found=True)
        return sorted(entry.base_name for entry in self._fs.get_file_info(selector))

    def read_bytes(self, path: str) -> bytes:
        with self._fs.open_input_stream(self._at(path), compression=None) as stream:
            return stream.read()

    def read_text(self, path: str) -> str:
        return self.read_bytes(path).decode()

    def write_bytes(self, path: str, content: bytes) -> None:
        """Replace a file atomically; on a local disk it is durable on return."""
        target = self._at(path)
        self._fs.create_dir(target.rpartition("/")[0], recursive=True)
        if self.local_root is None:
            with self._fs.open_output_stream(target, compression=None) as stream:
                stream.write(content)  # Object stores publish on close.
            return
        aside = f"{target}.{os.getpid()}.tmp"
        with open(aside, "wb") as file:
            file.write(content)
        _make_durable(Path(aside))
        os.replace(aside, target)
        _make_durable(Path(target).parent)

    @contextmanager
    def locked(self, path: str) -> Iterator[None]:
        """One process at a time, where the root is a local folder: object stores have no locks."""
        if self.local_root is None:
            yield
            return
        file = self.local_root / f"{path}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file):
            yield

    def write_text(self, path: str, text: str) -> None:
        self.write_bytes(path, text.encode())

    def write_private(self, path: str, text: str) -> None:
        """The same of a secret: on a local disk, only this user can read the file, from its first moment."""
        before = os.umask(0o077)
        try:
            self.write_text(path, text)
        finally:
            os.umask(before)

    def publish_folder(self, source: Path, path: str, *, marker: str, text: str) -> None:
        """Copy a local folder here, and one more file, `marker`: it comes last and says that all is there."""
        target = self._at(path)
        files = [file for file in files_below(source) if file != marker]
        if self.local_root is None:
            for file in files:
                self._fs.create_dir(f"{target}/{file}".rpartition("/")[0], recursive=True)
                fs.copy_files(str(source / file), f"{target}/{file}", _LOCAL, self._fs)
            self.write_text(f"{path}/{marker}", text)
            return
        aside = Path(f"{target}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        for file in files:
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, aside / file)  # Not its mode: others may read what is here.
            _make_durable(aside / file)
        (aside / marker).write_text(text)
        _make_durable(aside / marker)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        _make_durable(Path(target).parent)

    def local_copy(self, path: str, *, content: str) -> Path:
        """The folder as local files: itself on a local root, else a download that all of this node share.

        `content` is a name for what the folder holds.
        """
        if self.local_root is not None:
            return self.local_root / path

        def download(folder: Path) -> None:
            fs.copy_files(self._at(path), str(folder), self._fs, _LOCAL)

        return node_files.bring(self.root, content, download)

    def remove(self, path: str) -> None:
        """Delete a file; a missing one is no error."""
        if self.exists(path):
            self._fs.delete_file(self._at(path))

    def _at(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base


_LOCAL = fs.LocalFileSystem()


def cache_folder() -> Path:
    """Where this machine keeps what several runs use: $DPO_RAY_CACHE, or ~/.cache/dpo_ray."""
    return Path(os.environ.get("DPO_RAY_CACHE") or Path.home() / ".cache" / "dpo_ray")


def files_below(folder: Path) -> list[str]:
    """Sorted relative paths of all files in a folder and its subfolders."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _make_durable(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
