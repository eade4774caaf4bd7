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

import pyarrow
import pyarrow.parquet

from dpo_ray.types import Message, Text

Row = dict[str, object]

_FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
_DAMAGE = (csv.Error, gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError, pyarrow.ArrowInvalid)


def read_rows(source: str, *, split: str) -> list[Row]:
    """All rows of a file, of a folder that `save_to_disk` wrote, or of a `datasets` name.

    A name may carry its configuration, as in `openai/gsm8k:main`. `split` is for folders and names.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split)
    if source.endswith(_FORMATS):
        return _read_file(path)
    if path.exists():
        raise ValueError(f"{source} is in no known format: convert it to one of {', '.join(_FORMATS)}")
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"no such file or folder: {source}")
    return _read_named(source, split)


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
    turn = cast(Row, value) if isinstance(value, dict) else {}
    role, content = turn.get("role"), turn.get("content")
    if isinstance(role, str) and isinstance(content, str):
        return {"role": role, "content": content}
    raise ValueError(
        f"a message needs a role and a content, both text, found {type(value).__name__} {str(value)[:60]!r}: "
        "convert the value or remove the row"
    )


def _read_file(path: Path) -> list[Row]:
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        content = _decode(path)
        return _parse_csv(path, content) if ".csv" in path.suffixes[-2:] else _parse_json(path, content)
    except _DAMAGE as error:
        raise ValueError(f"{path} cannot be read, write it anew: {error}") from error


def _decode(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    # Spreadsheets write a byte order mark, which would become part of the first column's name.
    return content.decode("utf-8-sig")


def _parse_csv(path: Path, content: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    rows: list[Row] = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {reader.line_num}: the number of fields is not the header's")
        rows.append(dict(row))
    return rows


def _parse_json(path: Path, content: str) -> list[Row]:
    """An array of objects, or one object per line."""
    if content.lstrip().startswith("["):
        array = _parse_value(content, f"{path}")
        return [_as_row(value, f"{path}, item {number}") for number, value in enumerate(array, start=1)]
    # Not splitlines(): it also splits at separators that JSON allows inside of strings.
    lines = ((f"{path}, line {number}", line) for number, line in enumerate(content.split("\n"), start=1))
    return [_as_row(_parse_value(line, place), place) for place, line in lines if line.strip()]


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


def _read_folder(path: Path, split: str) -> list[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} was not written by save_to_disk: name a file, or such a folder") from error
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
