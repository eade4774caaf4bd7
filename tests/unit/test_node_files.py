"""A version is brought to a node once, and its files are those that were published."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpo_ray import node_files


@pytest.fixture(autouse=True)
def own_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


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
