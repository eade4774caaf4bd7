"""What the routes on which people vote answer."""

from typing import Literal, Self

from pydantic import BaseModel

from dpo_ray.buffer import ShownAnswer, ShownPair, Tally, VoteReceipt, VoteState
from dpo_ray.types import Message, Text


class AnswerShown(BaseModel):
    """One side, without what would give away who wrote it."""

    text: str
    finish_reason: str

    @classmethod
    def of(cls, answer: ShownAnswer) -> Self:
        return cls(text=answer.text, finish_reason=answer.finish_reason)


class ComparisonAnswer(BaseModel):
    """Answer to `POST /v1/comparisons`."""

    id: str
    object: Literal["comparison"] = "comparison"
    created: int
    expires_at: int
    first: AnswerShown
    second: AnswerShown
    identical: bool | None = None
    """true where both have the same text."""

    @classmethod
    def of(cls, shown: ShownPair, *, created: int) -> Self:
        return cls(
            id=shown.comparison_id,
            created=created,
            expires_at=int(shown.expires_at),
            first=AnswerShown.of(shown.first),
            second=AnswerShown.of(shown.second),
            identical=True if shown.first.text == shown.second.text else None,
        )


class PromptAnswer(BaseModel):
    """Answer to `GET /v1/comparisons/prompt`: one of both."""

    prompt: str | None = None
    messages: list[Message] | None = None

    @classmethod
    def of(cls, prompt: Text) -> Self:
        return cls(prompt=prompt) if isinstance(prompt, str) else cls(messages=prompt)


class PreferenceAnswer(BaseModel):
    """Answer to a vote that is durable, and to its undoing."""

    id: str
    object: Literal["preference"] = "preference"
    state: VoteState
    versions: dict[str, int]
    """Which policy version wrote each answer."""

    @classmethod
    def of(cls, receipt: VoteReceipt) -> Self:
        return cls(id=receipt.vote_id, state=receipt.state, versions=receipt.versions)


class RoundPairs(BaseModel):
    round: int
    pairs: int


class Mine(BaseModel):
    """Answer to `GET /v1/preferences/mine`."""

    votes: int
    waiting: int
    released: int
    refused: int
    rounds: list[RoundPairs]
    """Votes that were released, by round."""
    versions: list[int]
    """The policy versions that were trained on them."""

    @classmethod
    def of(cls, tally: Tally, versions: list[int]) -> Self:
        return cls(
            votes=tally.waiting + tally.released + tally.refused,
            waiting=tally.waiting,
            released=tally.released,
            refused=tally.refused,
            rounds=[RoundPairs(round=round_, pairs=num) for round_, num in sorted(tally.rounds.items())],
            versions=versions,
        )
