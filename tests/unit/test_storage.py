"""A file or folder appears whole or not at all, on a local disk and behind a URL."""

import os
import tempfile
from pathlib import Path

import pytest
from pyarrow import fs

from dpo_ray.storage import Storage


@pytest.fixture(params=["path", "file url", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty root; `remote` is pyarrow's file system in memory."""
    roots = {"path": str(tmp_path / "run"), "file url": (tmp_path / "run").as_uri(), "remote": "mock:///run"}
    return Storage(roots[request.param])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("a.bin", "manifest.json", "z.bin"):
        (folder / name).write_text(f"content of {name}")
    return folder


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def test_only_a_remote_root_has_no_path(tmp_path: Path) -> None:
    assert Storage(str(tmp_path)).local_root == tmp_path
    assert Storage(tmp_path.as_uri()).local_root == tmp_path
    assert Storage("mock:///run").local_root is None


def test_a_relative_root_is_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs/one")
    monkeypatch.chdir("/")
    storage.write_text("a", "1")
    assert (tmp_path / "runs/one/a").read_text() == "1"


def test_what_is_written_is_read(storage: Storage) -> None:
    assert not storage.exists("rounds/00000/a")
    storage.write_bytes("rounds/00000/a", b"\x00\xff")
    storage.write_text("rounds/00000/b", "Zwölf €")
    assert storage.read_bytes("rounds/00000/a") == b"\x00\xff"
    assert storage.read_text("rounds/00000/b") == "Zwölf €"
    assert storage.exists("rounds/00000/a")
    assert storage.exists("rounds")


def test_a_file_is_replaced_and_nothing_is_left_aside(storage: Storage) -> None:
    storage.write_text("LIVE", "a longer text")
    storage.write_text("LIVE", "2")
    assert storage.read_text("LIVE") == "2"
    assert storage.list("") == ["LIVE"]


def test_content_is_never_unpacked_by_its_name(storage: Storage) -> None:
    storage.write_bytes("a.gz", b"no gzip")
    assert storage.read_bytes("a.gz") == b"no gzip"


def test_names_are_listed_in_order(storage: Storage) -> None:
    for name in ("b", "a", "c/d"):
        storage.write_text(f"folder/{name}", "")
    assert storage.list("folder") == ["a", "b", "c"]


def test_a_missing_folder_lists_nothing(storage: Storage) -> None:
    assert storage.list("nowhere") == []
    assert storage.list("") == []


def test_a_missing_file_is_an_error_to_read_and_none_to_remove(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("nowhere")
    storage.remove("nowhere")
    storage.write_text("here", "")
    storage.remove("here")
    assert not storage.exists("here")


def test_a_published_folder_is_read_back_as_local_files(storage: Storage, source: Path) -> None:
    storage.publish_folder(source, "policies/v00001", marker="manifest.json", text="whole")
    assert storage.list("policies") == ["v00001"]
    copy = storage.local_copy("policies/v00001", content="v1")
    names = {path.name: path.read_text() for path in source.iterdir()}
    assert {path.name: path.read_text() for path in copy.iterdir()} == {**names, "manifest.json": "whole"}
    assert storage.local_copy("policies/v00001", content="v1") == copy


def test_publishing_again_replaces_what_was_left_half_done(storage: Storage, source: Path) -> None:
    storage.write_text("policies/v00001/a.bin", "half")
    storage.publish_folder(source, "policies/v00001", marker="manifest.json", text="whole")
    assert storage.read_text("policies/v00001/a.bin") == "content of a.bin"


@pytest.mark.parametrize("at", ["os.replace", "os.fsync"])
def test_a_crash_before_the_rename_leaves_the_old_content(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    storage = Storage(str(tmp_path / "run"))
    storage.write_text("LIVE", "1")
    with monkeypatch.context() as patch:
        patch.setattr(os, at.removeprefix("os."), crash)
        for write in (
            lambda: storage.write_text("LIVE", "2"),
            lambda: storage.publish_folder(source, "policies/v00001", marker="manifest.json", text="whole"),
        ):
            with pytest.raises(KeyboardInterrupt):
                write()
    assert storage.read_text("LIVE") == "1"
    assert not storage.exists("policies/v00001")
    storage.publish_folder(source, "policies/v00001", marker="manifest.json", text="whole")
    assert storage.list("policies") == ["v00001"]


def test_remote_the_marker_is_the_given_text_alone(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, copied = Storage("mock:///run"), []
    copy_files = fs.copy_files

    def note_and_copy(one: str, other: str, *file_systems: fs.FileSystem) -> None:
        copied.append(Path(other).name)
        copy_files(one, other, *file_systems)

    monkeypatch.setattr(fs, "copy_files", note_and_copy)
    storage.publish_folder(source, "policies/v00001", marker="manifest.json", text="whole")
    assert copied == ["a.bin", "z.bin"]  # And not the file of that name in the source.
    assert storage.read_text("policies/v00001/manifest.json") == "whole"
