"""Votes of people: each is kept once, and can be undone until a round takes it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import sqlalchemy as sa
from pydantic import TypeAdapter

from dpo_ray.buffer.database import METADATA
from dpo_ray.buffer.feedback import (
    COMPARISONS,
    SERVED,
    ConflictError,
    ForeignError,
    UnknownError,
    comparison,
    served_completion,
)
from dpo_ray.buffer.opinions import (
    Choice,
    Opinion,
    VoteKind,
    of_comparison,
    of_completion,
    of_record,
    sha256,
)
from dpo_ray.types import Pair

VoteState = Literal["quarantined", "released", "refused", "withdrawn"]
PAIR = TypeAdapter(Pair)

VOTES = sa.Table(
    "votes",
    METADATA,
    sa.Column("vote_id", sa.String, primary_key=True),
    sa.Column("author", sa.String, nullable=False, index=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("subject", sa.String, nullable=False),
    sa.Column("choice", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("trust", sa.Double, nullable=False),
    sa.Column("texts_sha256", sa.String, nullable=False, index=True),
    sa.Column("prefers", sa.String, nullable=False),
    sa.Column("pair", sa.Text),
    sa.Column("versions", sa.JSON, nullable=False),
    sa.Column("state", sa.String, nullable=False, index=True),
    sa.Column("why", sa.String, nullable=False),
    sa.Column("round", sa.Integer),
    sa.Column("idempotency_key", sa.String),
    sa.Column("body_sha256", sa.String, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.UniqueConstraint("author", "idempotency_key"),
)


@dataclass(frozen=True, slots=True)
class Ballot:
    """Who votes, and how the request can be told from others."""

    author: str
    trust: float
    """In the person, from 0 to 1."""
    at: float
    """Seconds since 1970."""
    body_sha256: str
    idempotency_key: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class VoteReceipt:
    """A vote that is durable."""

    vote_id: str
    kind: VoteKind
    choice: str
    state: VoteState
    versions: dict[str, int]
    """Which policy version wrote what was voted on."""
    is_new: bool = True


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the votes of one person, or of all."""

    waiting: int
    released: int
    refused: int
    rounds: dict[int, int]
    """Pairs that were released, by round."""


@dataclass(frozen=True, slots=True)
class TrialVotes:
    """What people say of a candidate beside the live version; votes that were undone do not count."""

    wins: int = 0
    losses: int = 0
    ties: int = 0
    """Comparisons of the two, both bad among them."""
    thumbs: dict[str, int] = field(default_factory=dict)
    """Single answers of each that were praised or blamed: `candidate_up`, `live_down` and so on."""

    @property
    def compared(self) -> int:
        return self.wins + self.losses + self.ties


def vote_on_comparison(
    connection: sa.Connection, ballot: Ballot, comparison_id: str, choice: Choice
) -> VoteReceipt:
    """Keep what a person says of two answers that this person was shown."""
    shown = comparison(connection, comparison_id)
    if shown.author != ballot.author:
        raise ForeignError(f"comparison {comparison_id} is another person's: ask for your own")
    return _keep(connection, ballot, of_comparison(shown, choice))


def vote_on_completion(
    connection: sa.Connection, ballot: Ballot, completion_id: str, index: int, *, is_good: bool
) -> VoteReceipt:
    """Keep what a person says of one completion that this person got."""
    served = served_completion(connection, completion_id, index, author=ballot.author)
    return _keep(connection, ballot, of_completion(served, is_good=is_good))


def vote_on_record(connection: sa.Connection, ballot: Ballot, pair: Pair) -> VoteReceipt:
    """Keep a preference that a person brings along."""
    return _keep(connection, ballot, of_record(pair))


def undo_vote(connection: sa.Connection, vote_id: str, *, author: str) -> VoteReceipt:
    """Take a vote back while it waits; doing so again changes nothing."""
    row = connection.execute(sa.select(VOTES).where(VOTES.c.vote_id == vote_id)).first()
    if row is None:
        raise UnknownError(f"there is no vote {vote_id}: POST /v1/preferences gives the id of each")
    if row.author != author:
        raise ForeignError(f"vote {vote_id} is another person's: undo your own")
    if row.state == "released":
        raise ConflictError(f"vote {vote_id} was released in round {row.round}: a policy is trained on it")
    if row.state == "refused":
        raise ConflictError(f"vote {vote_id} was refused ({row.why}): there is nothing to undo")
    connection.execute(VOTES.update().where(VOTES.c.vote_id == vote_id).values(state="withdrawn"))
    return _receipt(row, state="withdrawn")


def tally(connection: sa.Connection, author: str | None = None) -> Tally:
    """Of one person's votes, or of all; those that were undone do not count."""
    query = sa.select(VOTES.c.state, VOTES.c.round, sa.func.count().label("num"))
    if author is not None:
        query = query.where(VOTES.c.author == author)
    states: Counter[str] = Counter()
    rounds: dict[int, int] = {}
    for row in connection.execute(query.group_by(VOTES.c.state, VOTES.c.round).order_by(VOTES.c.round)):
        states[row.state] += row.num
        if row.state == "released":
            rounds[row.round] = row.num
    return Tally(states["quarantined"], states["released"], states["refused"], rounds)


def trial_votes(connection: sa.Connection, candidate: int, live: int) -> TrialVotes:
    """Of all comparisons of these two versions, and of all thumbs on either."""
    query = sa.select(VOTES.c.kind, VOTES.c.choice, VOTES.c.versions)
    query = query.where(VOTES.c.kind.in_(("comparison", "thumb")), VOTES.c.state != "withdrawn")
    names = {candidate: "candidate", live: "live"}
    outcomes: Counter[str] = Counter()
    for kind, choice, versions in connection.execute(query):
        if kind == "thumb" and versions["completion"] in names:
            outcomes[f"{names[versions['completion']]}_{choice}"] += 1
        elif kind == "comparison" and set(versions.values()) == set(names):
            outcomes[names[versions[choice]] if choice in versions else "tie"] += 1
    compared = outcomes.pop("candidate", 0), outcomes.pop("live", 0), outcomes.pop("tie", 0)
    return TrialVotes(*compared, thumbs=dict(outcomes))


def forget_votes(connection: sa.Connection, author: str) -> None:
    """Delete all that a person was shown and said."""
    for table in (VOTES, COMPARISONS, SERVED):
        connection.execute(table.delete().where(table.c.author == author))


def _keep(connection: sa.Connection, ballot: Ballot, opinion: Opinion) -> VoteReceipt:
    """Add a vote; the same again is the same vote. ConflictError: another one is there in its place."""
    sent = _sent_before(connection, ballot)
    if sent is not None:
        return _receipt(sent)
    vote_id = f"vote-{sha256(ballot.author, opinion.kind, opinion.subject)[:24]}"
    values = _values(ballot, opinion)
    known = connection.execute(sa.select(VOTES).where(VOTES.c.vote_id == vote_id)).first()
    if known is None:
        connection.execute(VOTES.insert(), {"vote_id": vote_id, **values})
    elif known.state == "withdrawn":
        connection.execute(VOTES.update().where(VOTES.c.vote_id == vote_id).values(values))
    elif known.choice == opinion.choice:
        return _receipt(known)
    else:
        raise ConflictError(f"you voted {known.choice} on this before: undo vote {vote_id} first")
    return VoteReceipt(vote_id, opinion.kind, opinion.choice, "quarantined", opinion.versions)


def _sent_before(connection: sa.Connection, ballot: Ballot) -> sa.Row | None:
    """The vote that came with this key. ConflictError: it came with another body."""
    if ballot.idempotency_key is None:
        return None
    of_key = VOTES.c.author == ballot.author, VOTES.c.idempotency_key == ballot.idempotency_key
    row = connection.execute(sa.select(VOTES).where(*of_key)).first()
    if row is not None and row.body_sha256 != ballot.body_sha256:
        raise ConflictError(
            "this Idempotency-Key came with another body before: take a new one for each vote"
        )
    return row


def _values(ballot: Ballot, opinion: Opinion) -> dict[str, object]:
    return {
        "author": ballot.author,
        "kind": opinion.kind,
        "subject": opinion.subject,
        "choice": opinion.choice,
        "reason": ballot.reason,
        "trust": ballot.trust,
        "texts_sha256": opinion.texts_sha256,
        "prefers": opinion.prefers,
        "pair": None if opinion.pair is None else PAIR.dump_json(opinion.pair).decode(),
        "versions": opinion.versions,
        "state": "quarantined",
        "why": opinion.why,
        "idempotency_key": ballot.idempotency_key,
        "body_sha256": ballot.body_sha256,
        "at": ballot.at,
    }


def _receipt(row: sa.Row, *, state: VoteState | None = None) -> VoteReceipt:
    return VoteReceipt(row.vote_id, row.kind, row.choice, state or row.state, row.versions, is_new=False)
