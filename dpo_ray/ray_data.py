"""Preference pairs of large sources, read and tokenized in parallel by Ray Data."""

import functools
import logging
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pyarrow
import pyarrow.parquet
import ray.data

from dpo_ray.models import load_tokenizer
from dpo_ray.preference_data import LongPrompts, PairReader, PairSet, collect_pairs, no_pairs
from dpo_ray.records import Row, data_files, decode, file_format, locate, parse_json, read_file

PART_BYTES = 64 << 20
"""A file larger than this is divided among tasks."""
_ROWS_PER_SET = 1024
_SCAN_BYTES = 1 << 16

logging.getLogger("ray.data").setLevel(logging.ERROR)  # Jobs show their own progress.


@dataclass(frozen=True, slots=True)
class Part:
    """What one task reads: a whole file, or row groups of a Parquet file, or lines of a JSONL file."""

    file: str
    first: int = 0
    last: int | None = None
    """One past the last row group, or the byte in the last line; None: the whole file."""
    first_row: int = 1
    """Number of the first row; in a JSONL file, counted from byte `first`."""

    @property
    def place(self) -> str:
        """What errors and the log name."""
        is_inside = self.first and file_format(self.file) == ".jsonl"
        return f"{self.file} from byte {self.first}" if is_inside else self.file


def load_pairs_with_ray(
    source: str,
    *,
    model: str,
    max_tokens: int,
    long_prompts: LongPrompts = "drop",
    unpaired_allowed: bool = False,
) -> Iterator[PairSet]:
    """The pairs that `load_pairs` gives, in the same order, in sets of at most 1,024 rows with their counts.

    `source` is a file, or a folder of JSONL, Parquet or CSV files, as a path that every node sees or a
    URL; `model` is the folder or hub name of the tokenizer. Nothing holds all pairs: take each set
    before the next. Row numbers count in each file, in a JSONL file of several parts from the byte that
    the log names.
    """
    files = data_files(source)
    if not files:
        raise ValueError(
            f"{source} is no file, folder or URL: save the data set as Parquet, and name its folder"
        )
    parts = [part for file in files for part in divide_file(file, part_bytes=PART_BYTES)]
    make_reader = functools.partial(_make_reader, model, max_tokens, long_prompts, unpaired_allowed)
    num_pairs, dropped = 0, Counter[str]()
    for pair_set in _read_in_parallel(parts, make_reader):
        num_pairs += len(pair_set.pairs)
        dropped.update(pair_set.dropped)
        yield pair_set
    if not num_pairs:
        raise no_pairs(source, dict(dropped), max_tokens)


def divide_file(file: str, *, part_bytes: int) -> list[Part]:
    """The parts of a file in order, of about `part_bytes` each; what cannot be divided is one part."""
    filesystem, path = locate(file)
    match file_format(file):
        case ".parquet":
            with filesystem.open_input_file(path) as opened:
                return _divide_parquet(file, pyarrow.parquet.read_metadata(opened), part_bytes)
        case ".jsonl":
            with filesystem.open_input_file(path) as opened:
                is_array = opened.read(1) == b"["
                size = opened.size()
            starts = [0] if is_array else list(range(0, size, part_bytes))
            return (
                [Part(file, *ends) for ends in pairwise([*starts, size])] if len(starts) > 1 else [Part(file)]
            )
        case _:
            return [Part(file)]


def read_part(part: Part) -> list[Row]:
    """All rows of a part; the parts of a file together give each row of it once."""
    if part.last is None:
        return read_file(part.file)
    filesystem, path = locate(part.file)
    with filesystem.open_input_file(path) as opened:
        if file_format(part.file) == ".parquet":
            row_groups = list(range(part.first, part.last))
            return pyarrow.parquet.ParquetFile(opened).read_row_groups(row_groups).to_pylist()
        start, end = _line_start(opened, part.first), _line_start(opened, part.last)
        opened.seek(start)
        return parse_json(part.place, decode(opened.read(end - start)))


def _divide_parquet(file: str, metadata: pyarrow.parquet.FileMetaData, part_bytes: int) -> list[Part]:
    parts: list[Part] = []
    first, first_row, num_rows, num_bytes = 0, 1, 0, 0
    for number in range(metadata.num_row_groups):
        num_rows += metadata.row_group(number).num_rows
        num_bytes += metadata.row_group(number).total_byte_size
        if num_bytes >= part_bytes or number == metadata.num_row_groups - 1:
            parts.append(Part(file, first, number + 1, first_row))
            first, first_row, num_rows, num_bytes = number + 1, first_row + num_rows, 0, 0
    return parts


def _line_start(opened: pyarrow.NativeFile, position: int) -> int:
    """Byte after the first line break from byte `position` on; 0 for 0, and the size where none is left."""
    if position == 0:
        return 0
    at = position
    opened.seek(at)
    while chunk := opened.read(_SCAN_BYTES):
        found = chunk.find(b"\n")
        if found >= 0:
            return at + found + 1
        at += len(chunk)
    return at


def _read_in_parallel(parts: Sequence[Part], make_reader: Callable[[], PairReader]) -> Iterator[PairSet]:
    dataset = ray.data.range(len(parts), override_num_blocks=len(parts))
    dataset = dataset.flat_map(functools.partial(_read_sets, parts=parts, make_reader=make_reader))
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    for row in dataset.iter_rows():
        made: PairSet | ValueError = pickle.loads(row["made"])
        if isinstance(made, ValueError):
            raise made
        yield made


def _read_sets(
    row: dict[str, int], *, parts: Sequence[Part], make_reader: Callable[[], PairReader]
) -> Iterator[dict[str, bytes]]:
    """The part's sets, pickled; last, and instead of further ones, the error that the user has to know."""
    part = parts[row["id"]]
    try:
        rows, reader = read_part(part), make_reader()
        for start in range(0, len(rows), _ROWS_PER_SET):
            some, first_row = rows[start : start + _ROWS_PER_SET], part.first_row + start
            made = collect_pairs(some, part.place, reader, first_row=first_row)
            yield {"made": pickle.dumps(made)}
    except ValueError as error:
        yield {"made": pickle.dumps(ValueError(str(error)))}


@functools.cache
def _make_reader(
    model: str, max_tokens: int, long_prompts: LongPrompts, unpaired_allowed: bool
) -> PairReader:
    """One for all tasks that a process gets: a large tokenizer takes seconds to load."""
    return PairReader(load_tokenizer(model), max_tokens, long_prompts, unpaired_allowed=unpaired_allowed)
