"""Every format gives the same rows, and a source that cannot be read is named."""

import functools
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from dpo_ray.records import Row, as_text, read_rows


def read(source: object) -> list[Row]:
    return read_rows(str(source), split="train")


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "one, two\u2028", "key": "1"}, {"prompt": 'a "quoted"\nline', "key": "2"}]
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    (tmp_path / "lines.json").write_text(f"{lines}\n")
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "table.csv").write_text('\ufeffprompt,key\n"one, two\u2028",1\n"a ""quoted""\nline",2\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
    for name in (
        *("lines.json", "array.json", "packed.jsonl.gz", "table.csv", "table.parquet"),
        *("saved", "splits"),
    ):
        assert read(tmp_path / name) == rows, name


def test_a_folders_files_are_read_by_name_but_for_json_that_tells_about_them(tmp_path: Path) -> None:
    for name, text in (("b.jsonl", "2"), ("a.jsonl.gz", "1")):
        line = json.dumps({"prompt": text}).encode()
        (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    pq.write_table(pa.table({"prompt": ["3", "4"]}), tmp_path / "c.parquet")
    (tmp_path / "about.json").write_text('{"rows": 4}')
    (tmp_path / "README.md").write_text("four rows")
    (tmp_path / "z.jsonl").mkdir()
    assert read(tmp_path) == [{"prompt": text} for text in "1234"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """URL at which the files of the folder can be had."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_give_the_rows_of_their_files(tmp_path: Path, web: str) -> None:
    rows = [{"prompt": "one"}, {"prompt": "two"}]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    urls = (
        f"{web}/packed.jsonl.gz",
        f"{web}/table.parquet?download=true",
        f"file://{tmp_path}/table.parquet",
    )
    for url in urls:
        assert read(url) == rows, url
    assert read(f"file://{tmp_path}") == rows + rows
    with pytest.raises(FileNotFoundError, match=r"no such file: http://.*/nowhere\.parquet"):
        read(f"{web}/nowhere.parquet")


def test_a_url_of_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"carrier://pigeon/a\.jsonl: .*; copy the files"):
        read("carrier://pigeon/a.jsonl")


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": "one two"},
        {"from": "human", "value": "one two"},
        {"role": "user", "content": [{"type": "text", "text": "one two"}]},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "one two", "name": None},
    ],
)
def test_every_way_to_write_a_turn_gives_the_same_message(turn: object) -> None:
    assert as_text([turn]) == [{"role": "user", "content": "one two"}]


@pytest.mark.parametrize(
    "content", [[{"type": "image"}], [{"type": "text", "text": "x"}, {"type": "image"}], [], ["x"], None]
)
def test_a_turn_that_is_not_all_text_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="a message needs a role and a content, both text, found dict"):
        as_text([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n\n{"prompt', r"a\.jsonl, line 3: invalid JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n"y"', r"a\.jsonl, line 2: expected an object .* found str"),
        ("a.json", b'[{"prompt": "x"}, 3]', r"a\.json, item 2: expected an object .* found int"),
        ("a.jsonl", b'{"prompt": "\xff"}', r"a\.jsonl cannot be read"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz cannot be read"),
        ("a.parquet", b"plain", r"a\.parquet cannot be read"),
        ("a.csv", b"prompt,key\nx\n", r"a\.csv, line 2: the number of fields"),
        ("a.csv", b"prompt\nx,1\n", r"a\.csv, line 2: the number of fields"),
        ("a.txt", b"plain", r"a\.txt is in no known format: convert it to one of \.jsonl"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere", "nowhere.parquet"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path / name)):
        read(tmp_path / name)


def test_a_missing_split_names_those_that_exist(tmp_path: Path) -> None:
    DatasetDict({"test": Dataset.from_list([{"prompt": "hi"}])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="no split 'train', only test"):
        read(tmp_path / "splits")


def test_a_folder_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(
        ValueError, match="was not written by save_to_disk, and no name in it ends with one of"
    ):
        read(tmp_path)


def test_a_saved_data_set_that_lost_a_file_is_named(tmp_path: Path) -> None:
    Dataset.from_list([{"prompt": "hi"}]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="saved lacks a file that save_to_disk writes, save it anew"):
        read(tmp_path / "saved")


@pytest.mark.parametrize(
    ("source", "expected"),
    [("openai/gsm8k:main", ("openai/gsm8k", "main", "train")), ("imdb", ("imdb", None, "train"))],
)
def test_a_data_set_is_named_with_or_without_configuration(
    monkeypatch: pytest.MonkeyPatch, source: str, expected: tuple[str, str | None, str]
) -> None:
    def load_dataset(name: str, configuration: str | None, *, split: str) -> Dataset:
        assert (name, configuration, split) == expected
        return Dataset.from_list([{"prompt": "hi"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read(source) == [{"prompt": "hi"}]


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (ConnectionError("offline"), FileNotFoundError, "some/name is no file here, .* offline"),
        (
            ValueError("pick main"),
            ValueError,
            r"some/name, split 'train': pick main \(write name:configuration",
        ),
    ],
)
def test_a_data_set_that_cannot_be_had_is_named(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, error: type[Exception], message: str
) -> None:
    def load_dataset(name: str, configuration: str | None, *, split: str) -> Dataset:
        raise failure

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(error, match=message):
        read("some/name")
