"""Files of a run, below one root that is a local folder or a URL."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from pyarrow import fs


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
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)

    def write_text(self, path: str, text: str) -> None:
        self.write_bytes(path, text.encode())

    def publish_folder(self, source: Path, path: str, *, marker: str) -> None:
        """Copy a local folder here; its file `marker` comes last and says that the rest is whole."""
        target = self._at(path)
        if self.local_root is not None:
            aside = Path(f"{target}.tmp")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            for file in source.iterdir():
                shutil.copyfile(
                    file, aside / file.name
                )  # Not the mode: the folder is for all who may read here.
            _sync_files(aside)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
            return
        self._fs.create_dir(target, recursive=True)
        names = sorted((p.name for p in source.iterdir()), key=lambda name: name == marker)
        for name in names:
            fs.copy_files(str(source / name), f"{target}/{name}", _LOCAL, self._fs)

    def local_copy(self, path: str) -> Path:
        """The folder as local files: itself on a local root, else a download kept in the temporary folder."""
        if self.local_root is not None:
            return self.local_root / path
        key = hashlib.sha256(self.root.encode()).hexdigest()[:16]
        copy = Path(tempfile.gettempdir()) / "dpo_ray" / key / path
        if not copy.exists():
            aside = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
            aside.mkdir(parents=True)
            fs.copy_files(self._at(path), str(aside), self._fs, _LOCAL)
            os.replace(aside, copy)
        return copy

    def remove(self, path: str) -> None:
        """Delete a file; a missing one is no error."""
        if self.exists(path):
            self._fs.delete_file(self._at(path))

    def _at(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base


_LOCAL = fs.LocalFileSystem()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
