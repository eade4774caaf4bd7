"""The run's preference buffer, as a replica asks it."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayTaskError

from dpo_ray.buffer import ConflictError, FeedbackError, ForeignError, UnknownError
from serve.refusal import Refusal

_STATUS: dict[type[FeedbackError], HTTPStatus] = {
    UnknownError: HTTPStatus.NOT_FOUND,
    ForeignError: HTTPStatus.FORBIDDEN,
    ConflictError: HTTPStatus.CONFLICT,
}
_TRIES = 3


class Box(Protocol):
    """Whatever keeps what people say."""

    async def ask(self, method: str, *args: Any, **options: Any) -> Any:
        """What a method of PreferenceBuffer returns. Refusal: the person, or the buffer, is at fault."""
        ...


class BallotBox:
    """Calls the buffer's actor; one that died in between comes back and is asked again."""

    def __init__(self, find_actor: Callable[[], Any]) -> None:
        self._find_actor = find_actor
        self._actor: Any = None

    async def ask(self, method: str, *args: Any, **options: Any) -> Any:
        for _ in range(_TRIES):
            if self._actor is None:
                self._actor = await asyncio.to_thread(self._find_actor)
            try:
                return await getattr(self._actor, method).remote(*args, **options)
            except RayTaskError as error:
                raise refusal(error.cause) from None
            except RayActorError:  # Gone for good, as with a run that another one replaced for a while.
                self._actor = None
        raise refusal(None)


def refusal(cause: BaseException | None) -> Refusal:
    """What to tell a person of the buffer's error."""
    for error_type, status in _STATUS.items():
        if isinstance(cause, error_type):
            return Refusal(str(cause), status=status)
    return Refusal(
        "the preference buffer cannot keep this now, and nothing of it was kept: try again in a second",
        status=HTTPStatus.SERVICE_UNAVAILABLE,
        headers={"retry-after": "1"},
    )
