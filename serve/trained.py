"""Which policy versions were trained on a person's votes."""

import io

import pyarrow.parquet as pq

from dpo_ray.registry import PolicyRegistry
from dpo_ray.storage import Storage


class TrainedVersions:
    """Reads who is in each round's snapshot; a snapshot never changes, so that is read once."""

    def __init__(self, storage: Storage, registry: PolicyRegistry) -> None:
        self._storage = storage
        self._registry = registry
        self._people: dict[int, frozenset[str]] = {}

    def of(self, person: str, *, first_round: int) -> list[int]:
        """The versions that rounds from `first_round` on made of snapshots with this person's pairs."""
        versions = [version for version in self._registry.versions() if version > first_round]
        return [version for version in versions if person in self._people_of(version - 1)]

    def _people_of(self, round_: int) -> frozenset[str]:
        if round_ not in self._people:
            content = io.BytesIO(self._storage.read_bytes(f"rounds/{round_:05d}/pairs.parquet"))
            authors = pq.read_table(content, columns=["author"]).column("author").unique()
            self._people[round_] = frozenset(map(str, authors.to_pylist()))
        return self._people[round_]
