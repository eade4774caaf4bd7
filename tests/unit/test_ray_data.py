"""The parts of a file give each of its rows once, in order, and know their numbers."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from characters import write_jsonl

from dpo_ray.ray_data import Part, divide_file, load_pairs_with_ray, read_part
from dpo_ray.records import Row, read_file

ROWS = [{"prompt": "é\u2028" * (number % 7), "number": number} for number in range(40)]


def in_parts(file: Path, part_bytes: int) -> tuple[list[Part], list[Row]]:
    parts = divide_file(str(file), part_bytes=part_bytes)
    return parts, [row for part in parts for row in read_part(part)]


@pytest.mark.parametrize("part_bytes", [*range(1, 60), 10**6])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_jsonl_is_divided_at_any_byte(tmp_path: Path, part_bytes: int, end: str) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (tmp_path / "a.jsonl").write_text(f"{lines}{end}")
    parts, rows = in_parts(tmp_path / "a.jsonl", part_bytes)
    assert rows == ROWS
    assert len(parts) == -(-len(f"{lines}{end}".encode()) // part_bytes)


def test_a_line_longer_than_a_part_and_a_scan_is_read_whole(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 200_000}, {"prompt": "y"}]
    parts, read = in_parts(write_jsonl(tmp_path / "a.jsonl", *rows), 50_000)
    assert (len(parts), read) == (5, rows)


@pytest.mark.parametrize(("part_bytes", "num_parts"), [(1, 6), (10**9, 1)])
def test_parquet_is_divided_at_its_row_groups(tmp_path: Path, part_bytes: int, num_parts: int) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=7)
    parts, rows = in_parts(tmp_path / "a.parquet", part_bytes)
    assert rows == ROWS
    assert len(parts) == num_parts
    assert [part.first_row for part in parts] == [1, 8, 15, 22, 29, 36][:num_parts]


def test_row_groups_of_one_part_are_about_as_large_as_asked(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=1)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    largest = max(metadata.row_group(number).total_byte_size for number in range(40))
    parts, rows = in_parts(tmp_path / "a.parquet", 5 * largest)
    assert rows == ROWS
    assert 2 < len(parts) <= 8


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv"])
def test_what_cannot_be_divided_is_one_part(tmp_path: Path, name: str) -> None:
    content = {
        "a.jsonl": json.dumps(ROWS).encode(),
        "a.json": json.dumps(ROWS).encode(),
        "a.jsonl.gz": gzip.compress(json.dumps(ROWS).encode()),
        "a.csv": b"prompt\nx\ny\n",
    }
    (tmp_path / name).write_bytes(content[name])
    parts, rows = in_parts(tmp_path / name, 5)
    assert parts == [Part(str(tmp_path / name))]
    assert rows == read_file(str(tmp_path / name))


@pytest.mark.parametrize("content", ["", "\n"])
def test_a_file_without_rows_has_none_in_any_part(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    assert in_parts(tmp_path / "a.jsonl", 1)[1] == []
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert in_parts(tmp_path / "a.parquet", 1)[1] == []


def test_an_error_in_a_later_part_names_its_byte(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\nnothing\n')
    last = divide_file(str(tmp_path / "a.jsonl"), part_bytes=17)[-1]
    assert last.place == f"{tmp_path}/a.jsonl from byte 34"
    with pytest.raises(ValueError, match=r"a\.jsonl from byte 17, line 1: invalid JSON"):
        read_part(Part(str(tmp_path / "a.jsonl"), 17, 34))


def test_the_name_of_a_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="imdb is no file, folder or URL: save the data set as Parquet"):
        next(load_pairs_with_ray("imdb", model="nowhere", max_tokens=8))
