"""The preference buffer: a durable table of pairs."""

import hashlib
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import sqlalchemy as sa

from dpo_ray.buffer.commits import Commits
from dpo_ray.buffer.database import PAIR_COLUMNS, PAIRS, chunks, now, open_database
from dpo_ray.buffer.feedback import ServedCompletion, ShownPair, keep_comparison, keep_served, random_prompt
from dpo_ray.buffer.opinions import Choice
from dpo_ray.buffer.quarantine import Released, release
from dpo_ray.buffer.snapshots import SnapshotManifest, SnapshotQuery, declare_snapshot
from dpo_ray.buffer.votes import (
    Ballot,
    Tally,
    VoteReceipt,
    tally,
    undo_vote,
    vote_on_comparison,
    vote_on_completion,
    vote_on_record,
)
from dpo_ray.config import VotesConfig
from dpo_ray.storage import Storage
from dpo_ray.types import Pair, Text

_USUAL = (("weight", 1.0), ("author", ""), ("cost", 0.0))


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
        return self._commits.run(lambda connection: put_pairs(connection, pairs))

    def count(self) -> int:
        count = sa.select(sa.func.count()).select_from(PAIRS)
        return self._commits.run(lambda connection: connection.execute(count).scalar_one())

    def declare_snapshot(self, query: SnapshotQuery, *, live_version: int) -> SnapshotManifest:
        """Write the immutable snapshot of round `query.max_round`; a declared one is returned as it is."""
        return declare_snapshot(self._engine, self._storage, query, live_version=live_version)

    def keep_comparison(self, shown: ShownPair) -> None:
        self._commits.run(lambda connection: keep_comparison(connection, shown, now_s=time.time()))

    def keep_served(self, served: Sequence[ServedCompletion], *, most: int) -> None:
        self._commits.run(lambda connection: keep_served(connection, served, most=most))

    def random_prompt(self) -> Text | None:
        return self._commits.run(lambda connection: random_prompt(connection, random.Random()))

    def vote_on_comparison(self, ballot: Ballot, comparison_id: str, choice: Choice) -> VoteReceipt:
        return self._commits.run(
            lambda connection: vote_on_comparison(connection, ballot, comparison_id, choice)
        )

    def vote_on_completion(
        self, ballot: Ballot, completion_id: str, index: int, *, is_good: bool
    ) -> VoteReceipt:
        return self._commits.run(
            lambda connection: vote_on_completion(connection, ballot, completion_id, index, is_good=is_good)
        )

    def vote_on_record(self, ballot: Ballot, pair: Pair) -> VoteReceipt:
        return self._commits.run(lambda connection: vote_on_record(connection, ballot, pair))

    def undo_vote(self, vote_id: str, *, author: str) -> VoteReceipt:
        return self._commits.run(lambda connection: undo_vote(connection, vote_id, author=author))

    def tally(self, author: str | None = None) -> Tally:
        return self._commits.run(lambda connection: tally(connection, author))

    def release(self, round_: int, config: VotesConfig) -> Released:
        """Make pairs of the votes that satisfy the rules; again for the same round changes nothing more."""
        now_s = time.time()
        return self._commits.run(
            lambda connection: release(connection, round_, config, now_s=now_s, put=put_pairs)
        )

    def close(self) -> None:
        self._engine.dispose()

    @cached_property
    def _engine(self) -> sa.Engine:
        """Opened by the first call: an actor cannot say clearly why its constructor failed."""
        return open_database(self._url)

    @cached_property
    def _commits(self) -> Commits:
        return Commits(self._engine)


def put_pairs(connection: sa.Connection, pairs: Sequence[Pair]) -> PutReceipt:
    """Add pairs that are not there. ValueError: a non-finite number, or a known id with other content."""
    rows: dict[str, dict] = {}
    for row in map(_row, pairs):
        _refuse_other_content(row, rows.setdefault(row["pair_id"], row)["content_sha256"])
    known = _known(connection, list(rows))
    for pair_id, content in known.items():
        _refuse_other_content(rows[pair_id], content)
    new = [row for pair_id, row in rows.items() if pair_id not in known]
    if new:
        connection.execute(PAIRS.insert(), new)
    return PutReceipt(added=len(new), known=len(pairs) - len(new))


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
    hashed = {name: value for name, value in values.items() if (name, value) not in _USUAL}
    content = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    return {"pair_id": pair.pair_id, "content_sha256": content, "created_at": now(), **values}
