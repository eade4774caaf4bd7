"""A buffer that dies is asked again; what a person did wrong is that person's to hear."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from dpo_ray.buffer import ConflictError, FeedbackError, ForeignError, StoreError, UnknownError
from serve.ballot_box import BallotBox
from serve.refusal import Refusal


def actor(answer: Callable[[], Any]) -> Any:
    """One whose method `tally` does so."""

    async def tally(name: str) -> Any:
        return answer()

    return SimpleNamespace(tally=SimpleNamespace(remote=tally))


def failing(error: Exception) -> Any:
    def fail() -> None:
        raise error

    return actor(fail)


def ask(*actors: Any) -> Any:
    """The answer, where each look finds the next actor."""
    found = iter(actors)
    return asyncio.run(BallotBox(lambda: next(found)).ask("tally", "ann"))


def test_an_actor_that_is_gone_is_looked_for_again() -> None:
    assert ask(failing(ActorDiedError()), actor(lambda: 3)) == 3


def test_who_is_found_dead_again_and_again_is_given_up_with_a_sentence() -> None:
    with pytest.raises(Refusal, match="try again in a second") as refusal:
        ask(*[failing(ActorDiedError())] * 3)
    assert refusal.value.status == 503


@pytest.mark.parametrize(
    ("error_type", "status"),
    [(UnknownError, 404), (ForeignError, 403), (ConflictError, 409)],
)
def test_what_the_person_did_is_told_as_it_was_said(error_type: type[FeedbackError], status: int) -> None:
    with pytest.raises(Refusal, match=r"^so it is$") as refusal:
        ask(failing(RayTaskError("tally", "a long traceback", error_type("so it is"))))
    assert refusal.value.status == HTTPStatus(status)


def test_what_the_buffer_did_is_no_fault_of_the_person_and_names_no_file() -> None:
    with pytest.raises(Refusal) as refusal:
        ask(failing(RayTaskError("tally", "", StoreError("sqlite:////secret/place is full"))))
    assert refusal.value.status == 503
    assert "secret" not in str(refusal.value)
