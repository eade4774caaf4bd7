"""Versions are complete or absent, never change, and one of them is live: since when, and by whom."""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from dpo_ray.node_files import sha256_file
from dpo_ray.registry import Canary, Candidate, PolicyManifest, PolicyRegistry, SnapshotRef
from dpo_ray.storage import Storage
from dpo_ray.tensors import read_tensors

WEIGHTS = {"weights": torch.arange(64, dtype=torch.float32)}


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
    save_file(WEIGHTS, folder / "model.safetensors")
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
    ours = {"files": {}, "tensors": {}, "created_at": "", "git_commit": None}
    assert read.model_copy(update=ours) == given
    assert read.files == {name: sha256_file(model / name) for name in ("config.json", "model.safetensors")}
    assert read.tensors == read_tensors(model)
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
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(b"other weights")
    assert registry.publish(model, PolicyManifest(version=1, step=9)) == first
    assert registry.manifest(1) == first
    assert storage.read_bytes("policies/v00001/model.safetensors") == weights


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


@pytest.fixture
def three(registry: PolicyRegistry, model: Path) -> PolicyRegistry:
    """Versions 0 to 3, of which 0, 1 and 2 were promoted one after the other."""
    for version in range(4):
        registry.publish(model, PolicyManifest(version=version))
    for version in range(3):
        registry.promote(version)
    return registry


def moves(registry: PolicyRegistry) -> list[tuple[str, int, int | None]]:
    return [(event.kind, event.version, event.previous) for event in registry.events()]


FIRST_MOVES = [("promote", 0, None), ("promote", 1, 0), ("promote", 2, 1)]


def test_every_move_of_live_is_written_down(three: PolicyRegistry) -> None:
    assert moves(three) == FIRST_MOVES
    event = three.promote(3, by="ann", reason="sounds kinder")
    assert (event.by, event.reason) == ("ann", "sounds kinder")
    assert event.at.endswith("+00:00")
    assert three.events()[-1] == event


def test_promoting_what_is_live_adds_no_event(three: PolicyRegistry) -> None:
    before = three.events()
    assert three.promote(2, by="ann") == before[-1]
    assert three.events() == before


def test_each_rollback_goes_one_version_further_back(three: PolicyRegistry) -> None:
    assert three.rollback(by="ann", reason="too short").version == 1
    assert three.rollback(by="ann", reason="still").version == 0
    assert three.live() == 0
    assert moves(three) == [*FIRST_MOVES, ("rollback", 1, 2), ("rollback", 0, 1)]
    with pytest.raises(ValueError, match="no version was live before 0, which came after nothing: promote"):
        three.rollback(by="ann", reason="")


def test_a_rollback_after_a_rollback_and_a_promotion_passes_over_the_refused_one(
    three: PolicyRegistry,
) -> None:
    three.rollback(by="job", reason="")
    three.promote(3)
    assert three.rollback(by="job", reason="").version == 1


def test_a_rollback_to_a_named_version_takes_one_that_was_live(three: PolicyRegistry) -> None:
    with pytest.raises(ValueError, match=r"version 3 was live before 2, which came after \[0, 1\]: promote"):
        three.rollback(3, by="ann", reason="")
    assert three.live() == 2
    assert three.rollback(0, by="ann", reason="").previous == 2
    assert three.rollback(0, by="ann", reason="again") == three.events()[-1]
    assert len(three.events()) == 4


def test_a_move_that_was_cut_short_has_not_happened(three: PolicyRegistry, storage: Storage) -> None:
    """The event is there and LIVE is not moved: the same move, or another one, can follow."""
    three.promote(3)
    storage.write_text("policies/LIVE", "2\n")
    assert moves(three) == FIRST_MOVES
    assert three.rollback(by="ann", reason="").version == 1
    assert moves(three) == [*FIRST_MOVES, ("rollback", 1, 2)]


def test_a_candidate_is_on_offer_until_it_is_withdrawn(three: PolicyRegistry) -> None:
    assert three.candidate() is None
    assert three.offer(3, share=0.25) == Candidate(version=3, share=0.25)
    assert three.candidate() == Candidate(version=3, share=0.25)
    assert three.live() == 2
    for _ in range(2):
        three.withdraw()
        assert three.candidate() is None


def test_every_move_of_live_ends_the_offer(three: PolicyRegistry) -> None:
    three.offer(3, share=0.0)
    three.promote(3)
    assert three.candidate() is None
    three.offer(2, share=0.0)
    three.rollback(by="ann", reason="")
    assert three.candidate() is None
    three.offer(3, share=0.0)
    three.promote(2)  # Which is live.
    assert three.candidate() is None


def test_what_is_live_is_no_candidate(three: PolicyRegistry, storage: Storage) -> None:
    with pytest.raises(ValueError, match="version 2 is live already: offer another one"):
        three.offer(2, share=0.0)
    with pytest.raises(ValueError, match="policy version 9 is not in"):
        three.offer(9, share=0.0)
    storage.write_text("policies/CANDIDATE", Candidate(version=2, share=0.5).model_dump_json())
    assert three.candidate() is None


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_nothing_and_all(three: PolicyRegistry, share: float) -> None:
    with pytest.raises(ValidationError):
        three.offer(3, share=share)
    assert three.candidate() is None


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
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert json.loads((folder / "manifest.json").read_text())["version"] == 0


def test_a_flipped_bit_is_noticed(registry: PolicyRegistry, storage: Storage, model: Path) -> None:
    registry.publish(model, PolicyManifest(version=0))
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    storage.write_bytes("policies/v00000/model.safetensors", bytes(content))
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that version 0 was published"):
        registry.fetch(0)


def test_a_missing_file_is_noticed(registry: PolicyRegistry, storage: Storage, model: Path) -> None:
    registry.publish(model, PolicyManifest(version=0))
    storage.remove("policies/v00000/config.json")
    with pytest.raises(ValueError, match=r"config\.json is not the file that version 0 was published"):
        registry.fetch(0)


def test_moves_at_the_same_time_lose_no_event_in_a_local_folder(tmp_path: Path, model: Path) -> None:
    registries = [PolicyRegistry(Storage(str(tmp_path / "run"))) for _ in range(4)]
    for version in range(4):
        registries[0].publish(model, PolicyManifest(version=version))
    with ThreadPoolExecutor(4) as people:
        made = list(people.map(lambda n: registries[n % 4].promote(n % 4, by=f"{n}"), range(40)))
    events = registries[0].events()
    assert {event.by for event in made} <= {event.by for event in events}
    assert [event.previous for event in events] == [None, *(event.version for event in events[:-1])]
