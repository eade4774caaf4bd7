"""The rules by which votes leave their quarantine and become pairs of a round."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import sqlalchemy as sa

from dpo_ray.buffer.database import METADATA, chunks
from dpo_ray.buffer.votes import PAIR, VOTES
from dpo_ray.config import VotesConfig
from dpo_ray.types import Pair

RELEASES = sa.Table(
    "releases",
    METADATA,
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    *(sa.Column(name, sa.Integer, nullable=False) for name in ("released", "refused", "waiting")),
)


@dataclass(frozen=True, slots=True)
class Released:
    """What a round made of the votes that waited."""

    released: int
    """Votes that became pairs."""
    refused: int
    waiting: int
    """Votes that are left for a later round."""


class _Vote(NamedTuple):
    vote_id: str
    author: str
    kind: str
    trust: float
    texts_sha256: str
    prefers: str
    why: str
    state: str


_COLUMNS = [VOTES.c[name] for name in _Vote._fields]
_REPEATED = "the same person has said so of the same texts before"
_Opinions = dict[str, dict[str, set[str]]]
"""Of each pair of texts, what each person prefers."""


def release(
    connection: sa.Connection,
    round_: int,
    config: VotesConfig,
    *,
    now_s: float,
    put: Callable[[sa.Connection, Sequence[Pair]], object],
) -> Released:
    """Make pairs of the votes that satisfy the rules, once in each round; what is refused says why."""
    done = connection.execute(sa.select(RELEASES).where(RELEASES.c.round == round_)).first()
    if done is not None:
        return Released(done.released, done.refused, done.waiting)
    ready = _ready(connection, config, now_s)
    reasons = _refusals(connection, ready, config)
    pairs: dict[str, Pair] = {}
    accepted: list[str] = []
    for vote in _within_bound([vote for vote in ready if vote.vote_id not in reasons], config):
        pair = _pair(connection, vote, round_, config)
        if pairs.setdefault(pair.pair_id, pair) is pair:
            accepted.append(vote.vote_id)
        else:
            reasons[vote.vote_id] = _REPEATED  # In other words, but in the same tokens.
    put(connection, list(pairs.values()))
    _mark(connection, accepted, state="released", round=round_)
    for vote_id, why in reasons.items():
        _mark(connection, [vote_id], state="refused", why=why)
    waiting = sa.select(sa.func.count()).where(VOTES.c.state == "quarantined")
    counts = Released(len(accepted), len(reasons), connection.execute(waiting).scalar_one())
    row = {"released": counts.released, "refused": counts.refused, "waiting": counts.waiting}
    connection.execute(RELEASES.insert(), {"round": round_, **row})
    return counts


def _ready(connection: sa.Connection, config: VotesConfig, now_s: float) -> list[_Vote]:
    """The votes that have waited long enough, oldest first."""
    old_enough = VOTES.c.at <= now_s - config.min_wait_s
    query = sa.select(*_COLUMNS).where(VOTES.c.state == "quarantined", old_enough)
    if not config.take_unpaired:
        query = query.where(VOTES.c.kind != "thumb")
    return [_Vote(*row) for row in connection.execute(query.order_by(VOTES.c.at, VOTES.c.vote_id))]


def _refusals(connection: sa.Connection, ready: list[_Vote], config: VotesConfig) -> dict[str, str]:
    """Why each vote that breaks a rule is refused, by its id."""
    reasons = {vote.vote_id: why for vote in ready if (why := _distrust(vote, config) or vote.why)}
    trusted = [vote for vote in ready if not _distrust(vote, config)]
    released = _released_on(connection, sorted({vote.texts_sha256 for vote in trusted}))
    opinions = _opinions([*trusted, *released])
    said = {(vote.author, vote.texts_sha256) for vote in released}
    for vote in trusted:
        if vote.vote_id not in reasons:
            person = (vote.author, vote.texts_sha256)
            why = _disagreement(vote, opinions[vote.texts_sha256], config)
            if why or person in said:
                reasons[vote.vote_id] = why or _REPEATED
            said.add(person)
    return reasons


def _distrust(vote: _Vote, config: VotesConfig) -> str:
    """Why a vote is refused for its author's sake; empty: it is not."""
    if vote.trust < config.min_trust:
        return f"the person's trust {vote.trust:g} is below votes.min_trust={config.min_trust:g}"
    return "" if vote.trust else "the person's trust is 0"


def _released_on(connection: sa.Connection, texts: list[str]) -> list[_Vote]:
    """The votes on these texts that are pairs already."""
    votes: list[_Vote] = []
    for some in chunks(texts):
        of_texts = VOTES.c.texts_sha256.in_(some)
        query = sa.select(*_COLUMNS).where(VOTES.c.state == "released", of_texts)
        votes.extend(_Vote(*row) for row in connection.execute(query))
    return votes


def _opinions(votes: list[_Vote]) -> _Opinions:
    opinions: _Opinions = defaultdict(lambda: defaultdict(set))
    for vote in votes:
        opinions[vote.texts_sha256][vote.author].add(vote.prefers)
    return opinions


def _disagreement(vote: _Vote, opinions: dict[str, set[str]], config: VotesConfig) -> str:
    """Whom a vote contradicts too much: its own author, or the others."""
    if len(opinions[vote.author]) > 1:
        return "the same person has said something else of the same texts"
    steady = [prefers for prefers in opinions.values() if len(prefers) == 1]
    share = steady.count({vote.prefers}) / len(steady)
    if share < config.min_agreement:
        return (
            f"a share of {share:.2f} of {len(steady)} people says so of these texts, "
            f"which is below votes.min_agreement={config.min_agreement:g}"
        )
    return ""


def _within_bound(votes: list[_Vote], config: VotesConfig) -> list[_Vote]:
    """The first votes of each person, as many as one round may take."""
    most = config.max_per_person_per_round
    if most is None:
        return votes
    taken: Counter[str] = Counter()
    within: list[_Vote] = []
    for vote in votes:
        taken[vote.author] += 1
        if taken[vote.author] <= most:
            within.append(vote)
    return within


def _pair(connection: sa.Connection, vote: _Vote, round_: int, config: VotesConfig) -> Pair:
    content = connection.execute(sa.select(VOTES.c.pair).where(VOTES.c.vote_id == vote.vote_id)).scalar_one()
    weight = vote.trust if config.weight_by_trust else 1.0
    return replace(PAIR.validate_json(content), author=vote.author, round=round_, weight=weight)


def _mark(connection: sa.Connection, vote_ids: list[str], **values: object) -> None:
    for some in chunks(vote_ids):
        connection.execute(VOTES.update().where(VOTES.c.vote_id.in_(some)).values(values))
