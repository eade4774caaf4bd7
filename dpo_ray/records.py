"""Rows of JSONL, JSON, Parquet, CSV and `datasets`: one reader for all."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import pyarrow
import pyarrow.parquet
from pyarrow import fs

from dpo_ray.types import Message, Text

Row = dict[str, object]

_FOLDER_FORMATS = (".jsonl", ".csv", ".parquet", ".jsonl.gz", ".csv.gz")
"""Beside other files, JSON tells about them more often than it holds rows."""
_FORMATS = (*_FOLDER_FORMATS, ".json", ".json.gz")
_SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` leaves in a folder: the first for several splits, the second for one."""
_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names."""
_DAMAGE = (csv.Error, gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError, pyarrow.ArrowInvalid)


def read_rows(source: str, *, split: str) -> list[Row]:
    """All rows of a file, of a folder's files, of what `save_to_disk` wrote, or of a `datasets` name.

    Files and folders may be URLs. A name may carry its configuration, as in `openai/gsm8k:main`. `split`
    is for names, and for what `save_to_disk` wrote.
    """
    folder = Path(source).expanduser()
    if any((folder / name).exists() for name in _SAVED):
        return _read_saved(folder, split)
    files = data_files(source)
    return [row for file in files for row in read_file(file)] if files else _read_named(source, split)


def data_files(source: str) -> list[str]:
    """Paths or URLs: `source` itself, or a folder's JSONL, Parquet and CSV files by name; [] for a name."""
    filesystem, path = locate(source)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.Directory:
        entries = filesystem.get_file_info(fs.FileSelector(path))
        return _folder_files(source, [entry.base_name for entry in entries if entry.is_file])
    if file_format(source) is not None:
        if kind == fs.FileType.NotFound:
            raise FileNotFoundError(f"no such file: {source}")
        return [source]
    if kind != fs.FileType.NotFound:
        raise ValueError(f"{source} is in no known format: convert it to one of {', '.join(_FORMATS)}")
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"no such file or folder: {source}")
    return []


def file_format(place: str) -> str | None:
    """How a path or URL ends, where that is known."""
    path = urlsplit(place).path if "://" in place else place
    return next((ending for ending in _FORMATS if path.endswith(ending)), None)


def locate(place: str) -> tuple[fs.FileSystem, str]:
    """Where a path or URL leads."""
    if "://" not in place:
        return fs.LocalFileSystem(), str(Path(place).expanduser())
    if place.startswith(("http://", "https://")):
        import fsspec

        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("http"))), place
    try:
        return fs.FileSystem.from_uri(place)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{place}: {error}; copy the files to where a path leads to them") from error


def read_file(place: str) -> list[Row]:
    """All rows of the file at a path or URL."""
    filesystem, path = locate(place)
    ending = file_format(place) or ""
    try:
        with filesystem.open_input_file(path) as file:
            if ending == ".parquet":
                return pyarrow.parquet.read_table(file).to_pylist()
            content = file.read()
        text = decode(gzip.decompress(content) if ending.endswith(".gz") else content)
        return _parse_csv(place, text) if ending.startswith(".csv") else parse_json(place, text)
    except _DAMAGE as error:
        raise ValueError(f"{place} cannot be read, write it anew: {error}") from error


def decode(content: bytes) -> str:
    # Spreadsheets write a byte order mark, which would become part of the first column's name.
    return content.decode("utf-8-sig")


@contextmanager
def naming_row(source: str, number: int) -> Iterator[None]:
    """Put the source and the row's number (the first is 1) before the text of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}, row {number}: {error}") from error


def as_text(value: object) -> Text:
    """`value`, known to be text or messages from here on; ValueError where it is neither."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_as_message(item) for item in value]
    raise ValueError(
        f"expected text or a list of messages, found {type(value).__name__} {str(value)[:60]!r}: "
        "convert the value or remove the row"
    )


def _as_message(value: object) -> Message:
    """A turn as {role, content} or as ShareGPT's {from, value}; its content is text, or blocks of text."""
    turn = cast(Row, value) if isinstance(value, dict) else {}
    role, content = turn.get("role", turn.get("from")), _joined(turn.get("content", turn.get("value")))
    if isinstance(role, str) and isinstance(content, str):
        return {"role": _ROLES.get(role, role), "content": content}
    raise ValueError(
        f"a message needs a role and a content, both text, found {type(value).__name__} {str(value)[:60]!r}: "
        "convert the value or remove the row"
    )


def _joined(content: object) -> object:
    """The text of content that is a list of text blocks; other content as it is."""
    if not isinstance(content, list):
        return content
    blocks = [block if isinstance(block, dict) else {} for block in content]
    texts = [block.get("text") if block.get("type") == "text" else None for block in blocks]
    return "".join(map(str, texts)) if texts and None not in texts else content


def _parse_csv(place: str, content: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    rows: list[Row] = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"{place}, line {reader.line_num}: the number of fields is not the header's")
        rows.append(dict(row))
    return rows


def parse_json(place: str, content: str) -> list[Row]:
    """Rows of an array of objects, or of one object per line; `place` is what an error names."""
    if content.lstrip().startswith("["):
        array = _parse_value(content, place)
        return [_as_row(value, f"{place}, item {number}") for number, value in enumerate(array, start=1)]
    # Not splitlines(): it also splits at separators that JSON allows inside of strings.
    lines = ((f"{place}, line {number}", line) for number, line in enumerate(content.split("\n"), start=1))
    return [_as_row(_parse_value(line, at), at) for at, line in lines if line.strip()]


def _parse_value(content: str, place: str) -> list[object]:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: invalid JSON ({error}); write one object per line, or one array of objects"
        ) from error


def _as_row(value: object, place: str) -> Row:
    if isinstance(value, dict):
        return cast(Row, value)
    raise ValueError(f'{place}: expected an object like {{"prompt": …}}, found {type(value).__name__}')


def _folder_files(source: str, names: list[str]) -> list[str]:
    files = [f"{source.rstrip('/')}/{name}" for name in sorted(names) if name.endswith(_FOLDER_FORMATS)]
    if not files:
        raise ValueError(
            f"{source} was not written by save_to_disk, and no name in it ends with one of "
            f"{', '.join(_FOLDER_FORMATS)}: name a file, or another folder"
        )
    return files


def _read_saved(path: Path, split: str) -> list[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} lacks a file that save_to_disk writes, save it anew: {error}") from error
    if not isinstance(saved, DatasetDict):
        return cast(list[Row], saved.to_list())
    if split not in saved:
        raise ValueError(f"{path} has no split {split!r}, only {', '.join(map(str, saved))}")
    return cast(list[Row], saved[split].to_list())


def _read_named(source: str, split: str) -> list[Row]:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        loaded = load_dataset(name, configuration or None, split=split)
    except OSError as error:
        raise FileNotFoundError(
            f"{source} is no file here, and not to be had as a data set: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"data set {source}, split {split!r}: {error} (write name:configuration)") from error
    return cast(list[Row], loaded.to_list())
