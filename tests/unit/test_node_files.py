"""A version is brought to a node once, and its files are those that were published."""

import mmap
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpo_ray import node_files


@pytest.fixture(autouse=True)
def own_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    file = tmp_path / "large"
    file.write_bytes(bytes(1 << 20))
    return file


def fill(folder: Path) -> None:
    (folder / "a").write_text("content")


def test_of_many_at_once_one_brings_the_folder() -> None:
    calls: list[Path] = []

    def counted(folder: Path) -> None:
        calls.append(folder)
        fill(folder)

    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: node_files.bring("run", "v1", counted), range(8)))
    assert len(calls) == 1
    assert {folder / "a" for folder in folders} == {folders[0] / "a"}
    assert (folders[0] / "a").read_text() == "content"


def test_a_folder_that_was_not_filled_is_not_there() -> None:
    def breaks_off(folder: Path) -> None:
        fill(folder)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        node_files.bring("run", "v1", breaks_off)
    assert node_files.kept("run", "v1") is None
    assert node_files.bring("run", "v1", fill) == node_files.kept("run", "v1")


def test_the_newest_of_each_run_stay() -> None:
    node_files.bring("other", "v0", fill)
    for version in range(6):
        node_files.bring("run", f"v{version}", fill)
    assert [node_files.kept("run", f"v{version}") is not None for version in range(6)] == [False] * 2 + [
        True
    ] * 4
    assert node_files.kept("other", "v0") is not None


def test_a_forgotten_folder_is_gone() -> None:
    node_files.bring("run", "v1", fill)
    node_files.forget("run", "v1")
    node_files.forget("run", "v2")
    assert node_files.kept("run", "v1") is None


def test_sha256_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")  # The example of FIPS 180-2.
    assert node_files.sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")
    assert node_files.sha256_once(tmp_path / "a") == node_files.sha256_file(tmp_path / "a")


def test_a_large_file_is_read_once(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = node_files.sha256_once(large)
    assert expected == node_files.sha256_file(large)
    monkeypatch.setattr(node_files, "sha256_file", lambda path: pytest.fail(f"{path} is read again"))
    assert node_files.sha256_once(large) == expected


def test_a_file_that_was_just_written_is_known_by_its_writers_word(large: Path) -> None:
    node_files.note_sha256(large, "what its writer says")
    assert node_files.sha256_once(large) == "what its writer says"


@pytest.mark.parametrize("times", range(20))
def test_one_flipped_bit_is_seen_however_soon(large: Path, times: int) -> None:
    before = node_files.sha256_once(large)
    state = large.stat()
    with large.open("r+b") as file:
        file.write(b"\1")
    os.utime(large, ns=(state.st_atime_ns, state.st_mtime_ns))  # As if nothing had been.
    assert node_files.sha256_once(large) == node_files.sha256_file(large) != before


def test_a_flipped_bit_in_a_mapped_file_is_seen(large: Path) -> None:
    before = node_files.sha256_once(large)
    with large.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        content[5] = 1
    assert node_files.sha256_once(large) != before


def test_files_of_another_user_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    node_files.bring("run", "v1", fill)
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    (Path(tempfile.gettempdir()) / f"dpo_ray_{another}").mkdir()
    with pytest.raises(PermissionError, match="belongs to another user"):
        node_files.bring("run", "v1", fill)
