"""The preference buffer: a durable table of pairs."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import sqlalchemy as sa

from dpo_ray.buffer.database import PAIR_COLUMNS, PAIRS, chunks, now, open_database
from dpo_ray.buffer.snapshots import SnapshotManifest, SnapshotQuery, declare_snapshot
from dpo_ray.storage import Storage
from dpo_ray.types import Pair


@dataclass(frozen=True, slots=True)
class PutReceipt:
    """The pairs of one call that are now durable."""

    added: int
    known: int
    """Pairs that were in the buffer already."""


class PreferenceBuffer:
    """The only owner of the pairs. The commit of `put` is its acknowledgement."""

    def __init__(self, url: str, storage: Storage) -> None:
        self._storage = storage
        self._url = url

    def put(self, pairs: Sequence[Pair]) -> PutReceipt:
        """Add pairs in one transaction: all are durable on return, or none.

        Putting a pair again is a no-op. ValueError: a non-finite number, or a known id with other content.
        """
        rows: dict[str, dict] = {}
        for row in map(_row, pairs):
            _refuse_other_content(row, rows.setdefault(row["pair_id"], row)["content_sha256"])
        with self._engine.begin() as connection:
            known = _known(connection, list(rows))
            for pair_id, content in known.items():
                _refuse_other_content(rows[pair_id], content)
            new = [row for pair_id, row in rows.items() if pair_id not in known]
            if new:
                connection.execute(PAIRS.insert(), new)
        return PutReceipt(added=len(new), known=len(pairs) - len(new))

    def count(self) -> int:
        with self._engine.connect() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(PAIRS)).scalar_one()

    def declare_snapshot(self, query: SnapshotQuery, *, live_version: int) -> SnapshotManifest:
        """Write the immutable snapshot of round `query.max_round`; a declared one is returned as it is."""
        return declare_snapshot(self._engine, self._storage, query, live_version=live_version)

    def close(self) -> None:
        self._engine.dispose()

    @cached_property
    def _engine(self) -> sa.Engine:
        """Opened by the first call: an actor cannot say clearly why its constructor failed."""
        return open_database(self._url)


def _refuse_other_content(row: dict, content: str) -> None:
    if row["content_sha256"] != content:
        raise ValueError(f"pair {row['pair_id']} is there with other content: nothing of this call was kept")


def _known(connection: sa.Connection, ids: list[str]) -> dict[str, str]:
    known: dict[str, str] = {}
    for some in chunks(ids):
        query = sa.select(PAIRS.c.pair_id, PAIRS.c.content_sha256).where(PAIRS.c.pair_id.in_(some))
        known.update((row.pair_id, row.content_sha256) for row in connection.execute(query))
    return known


def _row(pair: Pair) -> dict:
    values = {name: getattr(pair, name) for name in PAIR_COLUMNS}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{name}={value} of a pair of round {pair.round} (judge {pair.judge!r}) is not finite"
            )
    # The usual weight is no content: a pair that was kept without one is the same pair.
    hashed = {name: value for name, value in values.items() if (name, value) != ("weight", 1.0)}
    content = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    return {"pair_id": pair.pair_id, "content_sha256": content, "created_at": now(), **values}
