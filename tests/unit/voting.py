"""People who vote on what they were shown."""

import time
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from dpo_ray.buffer import (
    Ballot,
    PreferenceBuffer,
    ServedCompletion,
    ShownAnswer,
    ShownPair,
    SnapshotQuery,
    VoteReceipt,
    read_snapshot,
)
from dpo_ray.buffer.opinions import Choice
from dpo_ray.config import VotesConfig
from dpo_ray.storage import Storage
from dpo_ray.types import Pair

AT_ONCE = VotesConfig(min_wait_s=0)


def answer(text: str, version: int = 4) -> ShownAnswer:
    ids = tuple(text.encode())
    return ShownAnswer(text, ids, logp=-float(len(ids)), policy_version=version, finish_reason="stop")


def shown(name: str = "cmp-1", author: str = "ann", **fields: Any) -> ShownPair:
    start = ShownPair(
        comparison_id=name,
        author=author,
        prompt="the film",
        prompt_ids=(7, 8),
        first=answer("is good", 5),
        second=answer("is bad", 4),
        expires_at=time.time() + 60,
    )
    return replace(start, **fields)


def ballot(author: str = "ann", **fields: Any) -> Ballot:
    start = Ballot(author=author, trust=1.0, at=time.time() - 1, body_sha256="0")
    return replace(start, **fields)


def vote(buffer: PreferenceBuffer, author: str, choice: Choice = "first", **fields: Any) -> VoteReceipt:
    """On the same two texts, unless the fields of the comparison say otherwise."""
    by = {
        name: fields.pop(name) for name in ("trust", "at", "idempotency_key", "body_sha256") if name in fields
    }
    name = fields.pop("name", f"cmp-{author}")
    buffer.keep_comparison(shown(name, author, **fields))
    return buffer.vote_on_comparison(ballot(author, **by), name, choice)


def about(number: int) -> dict[str, Any]:
    """A comparison of texts of their own."""
    return {"name": f"cmp-{number}", "prompt": f"prompt {number}", "prompt_ids": (7, number)}


def states(buffer: PreferenceBuffer) -> dict[str, tuple[str, str]]:
    """State of each vote and why, by its author and choice."""
    query = sa.text("select author, choice, state, why from votes order by at, vote_id")
    rows = buffer._open.run(lambda connection: connection.execute(query).all())
    return {f"{row.author} {row.choice}": (row.state, row.why) for row in rows}


def pairs(buffer: PreferenceBuffer, storage: Storage, round_: int) -> list[Pair]:
    query = SnapshotQuery(max_round=round_, min_policy_version=0, limit=10_000, seed=0)
    return read_snapshot(storage, buffer.declare_snapshot(query, live_version=9))


def served(completion_id: str = "chatcmpl-1", author: str = "ann", **fields: Any) -> ServedCompletion:
    start = ServedCompletion(
        completion_id=completion_id,
        index=0,
        author=author,
        prompt="the film",
        prompt_ids=(7,),
        text="is good",
        token_ids=(1, 2),
        logp=None,
        policy_version=6,
    )
    return replace(start, **fields)
