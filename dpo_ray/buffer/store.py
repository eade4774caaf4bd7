"""The preference buffer: a durable table of pairs."""

import hashlib
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from dpo_ray.buffer.database import PAIR_COLUMNS, PAIRS, chunks, now
from dpo_ray.buffer.feedback import ServedCompletion, ShownPair, keep_comparison, keep_served, random_prompt
from dpo_ray.buffer.forgetting import forget_pairs, forgotten_among
from dpo_ray.buffer.opening import Opening
from dpo_ray.buffer.opinions import Choice
from dpo_ray.buffer.quarantine import Released, release
from dpo_ray.buffer.sampling import SnapshotQuery
from dpo_ray.buffer.snapshots import SnapshotManifest, declare_snapshot
from dpo_ray.buffer.votes import (
    Ballot,
    Tally,
    TrialVotes,
    VoteReceipt,
    forget_votes,
    tally,
    trial_votes,
    undo_vote,
    vote_on_comparison,
    vote_on_completion,
    vote_on_record,
)
from dpo_ray.config import VotesConfig
from dpo_ray.storage import Storage
from dpo_ray.types import Pair, Text

_SOURCES = (
    sa.select(
        PAIRS.c.source,
        sa.func.count().label("pairs"),
        sa.func.count(sa.distinct(sa.func.nullif(PAIRS.c.author, ""))).label("people"),
        sa.func.min(PAIRS.c.round).label("first_round"),
        sa.func.max(PAIRS.c.round).label("last_round"),
        sa.func.min(PAIRS.c.policy_version).label("first_version"),
        sa.func.max(PAIRS.c.policy_version).label("last_version"),
        sa.func.sum(PAIRS.c.cost).label("cost"),
        sa.func.max(PAIRS.c.created_at).label("newest"),
    )
    .group_by(PAIRS.c.source)
    .order_by(PAIRS.c.source)
)


@dataclass(frozen=True, slots=True)
class PutReceipt:
    """The pairs of one call that are now durable."""

    added: int
    known: int
    """Pairs that were in the buffer already."""


class PreferenceBuffer:
    """The owner of the pairs, for many threads at a time. The commit of `put` is its acknowledgement."""

    def __init__(self, url: str, storage: Storage, *, is_held: bool = True) -> None:
        self._storage = storage
        # Opened by the first call: an actor cannot say clearly why its constructor failed.
        self._open = Opening(url, is_held=is_held)

    def put(self, pairs: Sequence[Pair]) -> PutReceipt:
        """Add pairs in one transaction: all are durable on return, or none.

        Putting a pair again is a no-op. ValueError: a non-finite number, or a known id with other content.
        """
        rows = _rows(pairs)
        added = self._open.run(lambda connection: _insert(connection, rows)) if rows else 0
        return PutReceipt(added=added, known=len(pairs) - added)

    def count(self) -> int:
        query = sa.select(sa.func.count()).select_from(PAIRS)
        return self._open.run(lambda connection: connection.execute(query).scalar_one())

    def declare_snapshot(
        self, query: SnapshotQuery, *, live_version: int, retention_rounds: int | None = None
    ) -> SnapshotManifest:
        """Write the immutable snapshot of round `query.max_round`; a declared one is returned as it is.

        Then delete the pairs that are older than `retention_rounds`.
        """
        manifest = declare_snapshot(self._open, self._storage, query, live_version=live_version)
        if retention_rounds is not None:
            too_old = PAIRS.delete().where(PAIRS.c.round < query.max_round - retention_rounds)
            self._open.run(lambda connection: connection.execute(too_old).rowcount)
        return manifest

    def keep_comparison(self, shown: ShownPair) -> None:
        self._open.run(lambda connection: keep_comparison(connection, shown, now_s=time.time()))

    def keep_served(self, served: Sequence[ServedCompletion], *, most: int) -> None:
        self._open.run(lambda connection: keep_served(connection, served, most=most))

    def random_prompt(self) -> Text | None:
        return self._open.run(lambda connection: random_prompt(connection, random.Random()))

    def vote_on_comparison(self, ballot: Ballot, comparison_id: str, choice: Choice) -> VoteReceipt:
        return self._open.run(
            lambda connection: vote_on_comparison(connection, ballot, comparison_id, choice)
        )

    def vote_on_completion(
        self, ballot: Ballot, completion_id: str, index: int, *, is_good: bool
    ) -> VoteReceipt:
        return self._open.run(
            lambda connection: vote_on_completion(connection, ballot, completion_id, index, is_good=is_good)
        )

    def vote_on_record(self, ballot: Ballot, pair: Pair) -> VoteReceipt:
        return self._open.run(lambda connection: vote_on_record(connection, ballot, pair))

    def undo_vote(self, vote_id: str, *, author: str) -> VoteReceipt:
        return self._open.run(lambda connection: undo_vote(connection, vote_id, author=author))

    def tally(self, author: str | None = None) -> Tally:
        return self._open.run(lambda connection: tally(connection, author))

    def trial_votes(self, candidate: int, live: int) -> TrialVotes:
        return self._open.run(lambda connection: trial_votes(connection, candidate, live))

    def release(self, round_: int, config: VotesConfig) -> Released:
        """Make pairs of the votes that satisfy the rules; again for the same round changes nothing more."""
        now_s = time.time()
        return self._open.run(
            lambda connection: release(connection, round_, config, now_s=now_s, put=_put_pairs)
        )

    def forget(self, author: str) -> list[str]:
        """Delete a person's pairs and votes; the ids of all pairs that were ever deleted stay known."""
        return self._open.run(lambda connection: _forget(connection, author))

    def rows(self, *conditions: sa.ColumnElement[bool]) -> list[dict]:
        """The rows of PAIRS that meet all conditions, by id."""
        query = sa.select(PAIRS).where(*conditions).order_by(PAIRS.c.pair_id)
        return self._open.run(lambda connection: [dict(row) for row in connection.execute(query).mappings()])

    def sources(self) -> list[dict]:
        """What there is of each source."""
        return self._open.run(
            lambda connection: [dict(row) for row in connection.execute(_SOURCES).mappings()]
        )

    def hold(self) -> None:
        """Keep the database open between calls: until `close`, it has no other owner."""
        self._open.hold()

    def close(self) -> None:
        """Let go of the database; calls that come later open it as long as they need it."""
        self._open.close()


def _forget(connection: sa.Connection, author: str) -> list[str]:
    forget_votes(connection, author)
    return forget_pairs(connection, author)


def _put_pairs(connection: sa.Connection, pairs: Sequence[Pair]) -> None:
    if pairs:
        _insert(connection, _rows(pairs))


def _insert(connection: sa.Connection, rows: Sequence[dict]) -> int:
    """How many of the rows are new; ValueError where one is there with other content."""
    gone = forgotten_among(connection, [row["pair_id"] for row in rows if row["author"]])
    rows = [row for row in rows if row["pair_id"] not in gone]
    if not rows:
        return 0
    insert = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[connection.dialect.name]
    counted = insert(PAIRS).on_conflict_do_nothing().execution_options(preserve_rowcount=True)
    added = connection.execute(counted, rows).rowcount
    if added < len(rows):
        contents = _contents(connection, [row["pair_id"] for row in rows])
        for row in rows:
            _refuse_other_content(row, contents[row["pair_id"]])
    return added


def _contents(connection: sa.Connection, ids: list[str]) -> dict[str, str]:
    contents: dict[str, str] = {}
    for some in chunks(ids):
        query = sa.select(PAIRS.c.pair_id, PAIRS.c.content_sha256).where(PAIRS.c.pair_id.in_(some))
        contents.update((row.pair_id, row.content_sha256) for row in connection.execute(query))
    return contents


def _refuse_other_content(row: dict, content: str) -> None:
    if row["content_sha256"] != content:
        raise ValueError(f"pair {row['pair_id']} is there with other content: nothing of this call was kept")


def _rows(pairs: Sequence[Pair]) -> list[dict]:
    """Each pair's once, and ordered by id."""
    rows: dict[str, dict] = {}
    created_at = now()
    for pair in pairs:
        row = _row(pair, created_at)
        _refuse_other_content(row, rows.setdefault(row["pair_id"], row)["content_sha256"])
    # In one order in all processes: none waits for a row while another waits for one of its own.
    return sorted(rows.values(), key=lambda row: row["pair_id"])


def _row(pair: Pair, created_at: str) -> dict:
    values = {name: getattr(pair, name) for name in PAIR_COLUMNS}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{name}={value} of a pair of round {pair.round} (judge {pair.judge!r}) is not finite"
            )
    # What is usual is no content: a pair that was kept before there was such a column is the same pair.
    hashed = {name: value for name, value in values.items() if (name, value) not in _USUAL.items()}
    content = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    return {"pair_id": pair.pair_id, "content_sha256": content, "created_at": created_at, **values}


_USUAL = {"weight": 1.0, "author": "", "cost": 0.0}
