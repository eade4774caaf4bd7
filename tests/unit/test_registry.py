"""Versions are complete or absent, never change, and one of them is live."""

import json
import tempfile
from pathlib import Path

import pytest

from dpo_ray.registry import Canary, PolicyManifest, PolicyRegistry, SnapshotRef
from dpo_ray.storage import Storage, sha256_file


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture(params=["local", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run") if request.param == "local" else "mock:///run")


@pytest.fixture
def registry(storage: Storage) -> PolicyRegistry:
    return PolicyRegistry(storage)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "config.json").write_text("{}")
    return folder


def test_an_empty_registry_has_neither_versions_nor_a_live_one(registry: PolicyRegistry) -> None:
    assert registry.versions() == []
    assert registry.live() is None
    assert not registry.has(0)


def test_a_manifest_comes_back_as_it_was_published(registry: PolicyRegistry, model: Path) -> None:
    given = PolicyManifest(
        version=3,
        parent=1,
        snapshot=SnapshotRef(round=2, rows=17, sha256="ab" * 32),
        step=40,
        metrics={"loss": 0.1 + 0.2, "step": 40},
        canaries=[Canary(token_ids=[1, 2, 3], logprobs=[-0.1, -1 / 3])],
        config={"loss": {"type": "ipo", "beta": 0.1}, "epochs": 2, "max_failures": None},
    )
    published = registry.publish(model, given)
    read = registry.manifest(3)
    assert read == published
    assert read.model_copy(update={"files": {}, "created_at": "", "git_commit": None}) == given
    assert read.files == {name: sha256_file(model / name) for name in ("config.json", "model.safetensors")}
    assert read.created_at


def test_only_complete_versions_count(registry: PolicyRegistry, storage: Storage, model: Path) -> None:
    for version in (2, 0, 10):
        registry.publish(model, PolicyManifest(version=version))
    storage.write_text("policies/v00001/model.safetensors", "half a copy")
    storage.write_text("policies/v00003.tmp/manifest.json", "{}")
    registry.promote(0)
    assert registry.versions() == [0, 2, 10]
    assert not registry.has(1)


def test_publishing_a_version_again_changes_nothing(
    registry: PolicyRegistry, storage: Storage, model: Path
) -> None:
    first = registry.publish(model, PolicyManifest(version=1, step=8))
    (model / "model.safetensors").write_bytes(b"other weights")
    assert registry.publish(model, PolicyManifest(version=1, step=9)) == first
    assert registry.manifest(1) == first
    assert storage.read_bytes("policies/v00001/model.safetensors") == bytes(range(256))


def test_a_version_can_be_published_again_under_another_number(tmp_path: Path, model: Path) -> None:
    registry = PolicyRegistry(Storage(str(tmp_path / "run")))
    first = registry.publish(model, PolicyManifest(version=0, step=8))
    registry.publish(registry.fetch(0), PolicyManifest(version=1, parent=0))
    assert registry.manifest(0) == first


def test_a_model_folder_may_have_folders(registry: PolicyRegistry, model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    registry.publish(model, PolicyManifest(version=0))
    assert (registry.fetch(0) / "additional_chat_templates" / "rag.jinja").exists()


def test_live_is_a_number_in_a_file(registry: PolicyRegistry, storage: Storage, model: Path) -> None:
    for version in (0, 1):
        registry.publish(model, PolicyManifest(version=version))
        registry.promote(version)
        assert storage.read_text("policies/LIVE") == f"{version}\n"
        assert registry.live() == version
    registry.promote(0)  # Back.
    assert registry.live() == 0


def test_an_unknown_version_cannot_go_live(registry: PolicyRegistry, model: Path) -> None:
    for version in (0, 2):
        registry.publish(model, PolicyManifest(version=version))
    registry.promote(2)
    for call in (registry.promote, registry.manifest, registry.fetch):
        with pytest.raises(ValueError, match=r"policy version 1 is not in .*run: it has \[0, 2\]"):
            call(1)
    assert registry.live() == 2


def test_fetched_files_are_the_published_ones(registry: PolicyRegistry, model: Path) -> None:
    registry.publish(model, PolicyManifest(version=0))
    folder = registry.fetch(0)
    assert (folder / "model.safetensors").read_bytes() == bytes(range(256))
    assert json.loads((folder / "manifest.json").read_text())["version"] == 0


def test_a_flipped_bit_is_noticed(registry: PolicyRegistry, storage: Storage, model: Path) -> None:
    registry.publish(model, PolicyManifest(version=0))
    content = bytearray(range(256))
    content[100] ^= 1
    storage.write_bytes("policies/v00000/model.safetensors", bytes(content))
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that version 0 was published"):
        registry.fetch(0)


def test_a_missing_file_is_noticed(registry: PolicyRegistry, storage: Storage, model: Path) -> None:
    registry.publish(model, PolicyManifest(version=0))
    storage.remove("policies/v00000/config.json")
    with pytest.raises(ValueError, match=r"config\.json is not the file that version 0 was published"):
        registry.fetch(0)
