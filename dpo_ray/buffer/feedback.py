"""What people are shown, so that they can vote on it: comparisons, and completions that were served."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from pydantic import TypeAdapter

from dpo_ray.buffer.database import METADATA, PAIRS
from dpo_ray.types import Text


class FeedbackError(ValueError):
    """What a person asks for cannot be; the text says why, to that person."""


class UnknownError(FeedbackError):
    """There is no such thing."""


class ForeignError(FeedbackError):
    """It is another person's."""


class ConflictError(FeedbackError):
    """It contradicts what was said before."""


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """One side of a comparison."""

    text: str
    token_ids: tuple[int, ...]
    logp: float
    """Under the policy that wrote it, at temperature 1: summed, in nats."""
    policy_version: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class ShownPair:
    """A comparison: two answers to one prompt, shown to one person."""

    comparison_id: str
    author: str
    """The person who asked for it, and the only one who may vote on it."""
    prompt: Text
    prompt_ids: tuple[int, ...]
    first: ShownAnswer
    second: ShownAnswer
    expires_at: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class ServedCompletion:
    """A completion that somebody got who may praise or blame it."""

    completion_id: str
    index: int
    author: str
    """Who asked for it; a client may choose ids, so they are an author's own."""
    prompt: Text
    prompt_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    logp: float | None
    """Where the request asked for log-probs."""
    policy_version: int


_PAIR = TypeAdapter(ShownPair)
_COMPLETION = TypeAdapter(ServedCompletion)

COMPARISONS = sa.Table(
    "comparisons",
    METADATA,
    sa.Column("comparison_id", sa.String, primary_key=True),
    sa.Column("author", sa.String, nullable=False, index=True),
    sa.Column("expires_at", sa.Double, nullable=False, index=True),
    sa.Column("content", sa.Text, nullable=False),
)
SERVED = sa.Table(
    "served",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("completion_id", sa.String, nullable=False, index=True),
    sa.Column("index", sa.Integer, nullable=False),
    sa.Column("author", sa.String, nullable=False, index=True),
    sa.Column("content", sa.Text, nullable=False),
)


def keep_comparison(connection: sa.Connection, shown: ShownPair, *, now_s: float) -> None:
    """Keep a comparison, once; those that have expired go."""
    connection.execute(sa.delete(COMPARISONS).where(COMPARISONS.c.expires_at < now_s))
    known = sa.select(COMPARISONS.c.comparison_id).where(COMPARISONS.c.comparison_id == shown.comparison_id)
    if connection.execute(known).first() is None:
        row = {
            "comparison_id": shown.comparison_id,
            "author": shown.author,
            "expires_at": shown.expires_at,
            "content": _PAIR.dump_json(shown).decode(),
        }
        connection.execute(COMPARISONS.insert(), row)


def comparison(connection: sa.Connection, comparison_id: str) -> ShownPair:
    """UnknownError: there is none of this id."""
    query = sa.select(COMPARISONS.c.content).where(COMPARISONS.c.comparison_id == comparison_id)
    content = connection.execute(query).scalar()
    if content is None:
        raise UnknownError(f"there is no comparison {comparison_id}: ask for one with POST /v1/comparisons")
    return _PAIR.validate_json(content)


def keep_served(connection: sa.Connection, served: Sequence[ServedCompletion], *, most: int) -> None:
    """Add completions, and drop the oldest beyond `most`."""
    rows = [
        {
            "completion_id": each.completion_id,
            "index": each.index,
            "author": each.author,
            "content": _COMPLETION.dump_json(each).decode(),
        }
        for each in served
    ]
    if rows:
        connection.execute(SERVED.insert(), rows)
    last = connection.execute(sa.select(sa.func.max(SERVED.c.number))).scalar() or 0
    connection.execute(sa.delete(SERVED).where(SERVED.c.number <= last - most))


def served_completion(
    connection: sa.Connection, completion_id: str, index: int, *, author: str
) -> ServedCompletion:
    """The latest that this person got under this id. UnknownError, ForeignError: there is none, for them."""
    of_id = sa.and_(SERVED.c.completion_id == completion_id, SERVED.c.index == index)
    query = sa.select(SERVED.c.author, SERVED.c.content).where(of_id).order_by(SERVED.c.number.desc())
    rows = connection.execute(query).all()
    content = next((row.content for row in rows if row.author == author), None)
    if content is not None:
        return _COMPLETION.validate_json(content)
    if rows:
        raise ForeignError(f"completion {completion_id} is another person's: vote on your own")
    raise UnknownError(
        f"there is no completion {completion_id} with index {index}: only the latest are kept, "
        "and those that a server had not kept yet when it died are gone"
    )


def random_prompt(connection: sa.Connection, draw: random.Random) -> Text | None:
    """The prompt of a pair in the buffer; None where there is no pair."""
    # Ids are hashes: the next one after a random one is a random one, and found without a scan.
    start = f"{draw.getrandbits(128):032x}"
    for bound in (PAIRS.c.pair_id >= start, PAIRS.c.pair_id < start):
        query = sa.select(PAIRS.c.prompt).where(bound).order_by(PAIRS.c.pair_id).limit(1)
        row = connection.execute(query).first()
        if row is not None:
            return row.prompt
    return None
