"""Which pairs made a policy version, and which versions saw a pair, as the run's folder has it."""

import hashlib
import io
from collections.abc import Collection
from typing import NamedTuple

import pyarrow.parquet as pq

from dpo_ray.buffer.snapshots import snapshot_file
from dpo_ray.registry import PolicyRegistry, SnapshotRef
from dpo_ray.storage import Storage


class Use(NamedTuple):
    """What a version knows of some pairs."""

    version: int
    own: frozenset[str]
    """Those in the snapshot that it was trained on."""
    inherited: frozenset[str]
    """Those that a version before it in its line was trained on."""


def pairs_of_version(storage: Storage, version: int) -> dict[int, frozenset[str]]:
    """Ids of the pairs that a version and those before it in its line were trained on, by round."""
    registry = PolicyRegistry(storage)
    rounds: dict[int, frozenset[str]] = {}
    ancestor: int | None = version
    while ancestor is not None:
        manifest = registry.manifest(ancestor)
        if manifest.snapshot is not None:
            rounds[manifest.snapshot.round] = _pair_ids(storage, manifest.snapshot)
        ancestor = manifest.parent
    return dict(sorted(rounds.items()))


def versions_that_saw(storage: Storage, pair_ids: Collection[str]) -> list[Use]:
    """Every version that was trained on one of the pairs, or grew from one that was."""
    registry, wanted = PolicyRegistry(storage), frozenset(pair_ids)
    uses: dict[int, Use] = {}
    for version in registry.versions():  # Parents come first.
        manifest = registry.manifest(version)
        own = wanted & _pair_ids(storage, manifest.snapshot) if manifest.snapshot else frozenset()
        parent = None if manifest.parent is None else uses[manifest.parent]
        uses[version] = Use(version, own, parent.own | parent.inherited if parent else frozenset())
    return [use for use in uses.values() if use.own or use.inherited]


def _pair_ids(storage: Storage, snapshot: SnapshotRef) -> frozenset[str]:
    file = snapshot_file(snapshot.round)
    content = storage.read_bytes(file) if storage.exists(file) else b""
    if hashlib.sha256(content).hexdigest() != snapshot.sha256:
        raise ValueError(
            f"{file} in {storage.root} is missing or not what was trained on: restore it, "
            "without it nobody can say which pairs it held"
        )
    table = pq.ParquetFile(io.BytesIO(content)).read(columns=["pair_id"], use_threads=False)
    return frozenset(table["pair_id"].to_pylist())
