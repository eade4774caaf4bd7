"""Deleting what a person gave, and remembering by hashes alone which pairs that were."""

import hashlib
from collections.abc import Iterable

import sqlalchemy as sa

from dpo_ray.buffer.database import METADATA, PAIR_ID_LENGTH, PAIRS, chunks, now

FORGOTTEN = sa.Table(
    "forgotten_pairs",
    METADATA,
    sa.Column("pair_id", sa.String(PAIR_ID_LENGTH), primary_key=True),
    sa.Column("author_sha256", sa.String(64), nullable=False, index=True),
    sa.Column("forgotten_at", sa.String, nullable=False),
)


def forget_pairs(connection: sa.Connection, author: str) -> list[str]:
    """Delete a person's pairs; the ids of all that were ever deleted for them, sorted."""
    digest = hashlib.sha256(author.encode()).hexdigest()
    of_author = PAIRS.c.author == author
    ids = connection.execute(sa.select(PAIRS.c.pair_id).where(of_author)).scalars().all()
    if ids:
        rows = [{"pair_id": each, "author_sha256": digest, "forgotten_at": now()} for each in ids]
        connection.execute(FORGOTTEN.insert(), rows)
        connection.execute(PAIRS.delete().where(of_author))
    forgotten = sa.select(FORGOTTEN.c.pair_id).where(FORGOTTEN.c.author_sha256 == digest)
    return sorted(connection.execute(forgotten).scalars())


def forgotten_among(connection: sa.Connection, pair_ids: Iterable[str]) -> set[str]:
    """Those that were deleted for a person: they do not come back."""
    return {
        found
        for some in chunks(list(pair_ids))
        for found in connection.execute(
            sa.select(FORGOTTEN.c.pair_id).where(FORGOTTEN.c.pair_id.in_(some))
        ).scalars()
    }
