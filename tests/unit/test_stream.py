"""A version's files arrive as they were published, or not at all."""

import multiprocessing as mp
from pathlib import Path

import pytest

from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage
from dpo_ray.stream import meeting_place, receive, send
from dpo_ray.types import Stream

HOST = "127.0.0.1"
FILES = {"big.bin": bytes(range(256)) * 5000, "empty.txt": b"", "adapter/small.bin": b"weights"}


def publish(run: Path, source: Path) -> PolicyRegistry:
    for name, content in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    registry = PolicyRegistry(Storage(str(run)))
    registry.publish(source, PolicyManifest(version=0))
    return registry


def node(run: Path, stream: Stream, name: str, temporary: Path) -> None:
    """The process of a receiver, with a temporary folder of its own."""
    import tempfile

    tempfile.tempdir = str(temporary)
    registry = PolicyRegistry(Storage(str(run)))
    receive(stream, registry, name)
    folder = registry.fetch(stream.version, part=stream.part)
    assert temporary in folder.parents
    prefix = f"{stream.part}/" if stream.part else ""
    expected = {name: content for name, content in FILES.items() if name.startswith(prefix)}
    assert {name: (folder / name.removeprefix(prefix)).read_bytes() for name in expected} == expected
    assert len([file for file in folder.rglob("*") if file.is_file()]) == len(expected)


@pytest.mark.parametrize("part", ["", "adapter"])
def test_two_nodes_get_the_files_that_one_process_sends(tmp_path: Path, part: str) -> None:
    registry = publish(tmp_path / "run", tmp_path / "source")
    store = meeting_place(HOST)
    stream = Stream(0, part, HOST, store.port, ("one", "two"), "cpu")
    context = mp.get_context("spawn")
    nodes = []
    for name in stream.receivers:
        (tmp_path / name).mkdir()
        arguments = (tmp_path / "run", stream, name, tmp_path / name)
        nodes.append(context.Process(target=node, args=arguments))
        nodes[-1].start()
    send(stream, registry)
    for process in nodes:
        process.join(60)
        assert process.exitcode == 0


def test_a_copy_that_was_changed_is_refused_and_then_read_from_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    registry = publish(tmp_path / "run", tmp_path / "source")

    def corrupted(folder: Path) -> None:
        (folder / "big.bin").write_bytes(FILES["big.bin"][:-1] + b"!")

    registry.bring(0, corrupted)
    with pytest.raises(ValueError, match="is not the file that version 0 was published with"):
        registry.fetch(0)
    assert (registry.fetch(0) / "big.bin").read_bytes() == FILES["big.bin"]
