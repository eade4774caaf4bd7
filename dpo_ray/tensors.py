"""What tensors the weight files of a model folder hold, read without loading a model."""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

_PREFIX = 8
"""Bytes before a file's header: its length, little-endian."""


class TensorSpec(BaseModel):
    """One tensor of a version, without its values."""

    model_config = ConfigDict(frozen=True)

    shape: list[int]
    dtype: str
    """As safetensors spells it: F32, BF16."""
    sha256: str
    """Of its bytes."""


class _Entry(BaseModel):
    """A tensor as the header of its file describes it."""

    shape: list[int]
    dtype: str
    data_offsets: tuple[int, int]
    """First byte, and one past the last; 0 is the first byte after the header."""


def read_tensors(folder: Path) -> dict[str, TensorSpec]:
    """By name, from the folder's safetensors files. ValueError: a file is none, or a name comes twice."""
    tensors: dict[str, TensorSpec] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, spec in _tensors(file):
            if name in tensors:
                raise ValueError(f"tensor {name} is in two files of {folder}: keep one of them")
            tensors[name] = spec
    return tensors


def same_tensors(ours: Mapping[str, TensorSpec], theirs: Mapping[str, TensorSpec]) -> None:
    """ValueError: our names, shapes or number formats are not theirs; values may differ."""
    for name, expected in theirs.items():
        if name not in ours:
            raise ValueError(f"tensor {name} is missing")
        if _layout(ours[name]) != _layout(expected):
            raise ValueError(f"tensor {name} is {_layout(ours[name])}, and must be {_layout(expected)}")
    for name in ours:
        if name not in theirs:
            raise ValueError(f"tensor {name} is unexpected")


def _layout(spec: TensorSpec) -> str:
    return f"{spec.dtype}{spec.shape}"


def _tensors(file: Path) -> Iterator[tuple[str, TensorSpec]]:
    with open(file, "rb") as opened, _mapped(opened.fileno(), file) as content:
        first = _PREFIX + int.from_bytes(content[:_PREFIX], "little")
        for name, entry in _entries(content[_PREFIX:first], file).items():
            start, end = entry.data_offsets
            if not 0 <= start <= end <= len(content) - first:
                raise ValueError(f"{file} is cut off: it lacks values of tensor {name}")
            with memoryview(content) as values:
                sha256 = hashlib.sha256(values[first + start : first + end]).hexdigest()
            yield name, TensorSpec(shape=entry.shape, dtype=entry.dtype, sha256=sha256)


def _mapped(descriptor: int, file: Path) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except ValueError:  # Nothing to map.
        raise ValueError(f"{file} is empty") from None


def _entries(header: bytes, file: Path) -> dict[str, _Entry]:
    try:
        entries = json.loads(header)
        return {name: _Entry(**entry) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, TypeError, AttributeError, ValidationError):
        raise ValueError(f"{file} has no header of the safetensors format") from None
