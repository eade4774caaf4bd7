"""How much a replica takes on at once, and how often each caller may ask."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from serve.refusal import Refusal

_MAX_CALLERS = 10_000


class Admission:
    """Places for requests: some run, some wait for those, and the next one is turned away."""

    def __init__(self, *, running: int, queued: int) -> None:
        self._most_running = running
        self._places = running + queued
        self._taken = 0
        self._running = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place, from before the body is read until the last byte is sent. Refusal: all are taken."""
        if self._taken >= self._places:
            raise Refusal(
                f"all {self._places} places of this replica are taken: try again in a second",
                status=HTTPStatus.TOO_MANY_REQUESTS,
                headers={"retry-after": "1"},
            )
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    @contextmanager
    def turn(self, weight: int = 1) -> Iterator[asyncio.Future[None]]:
        """Done when this request may run, in order of arrival; on exit, the next one may.

        One of a larger weight counts as so many requests while it runs.
        """
        weight = min(weight, self._most_running)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, weight))
        self._start_next()
        try:
            yield turn
        finally:
            if turn.done():
                self._running -= weight
            else:
                self._waiting.remove((turn, weight))
            self._start_next()

    def _start_next(self) -> None:
        while self._waiting and self._running + self._waiting[0][1] <= self._most_running:
            turn, weight = self._waiting.popleft()
            self._running += weight
            turn.set_result(None)


@dataclass(slots=True)
class _Allowance:
    requests: float
    at_s: float


@dataclass(slots=True)
class RequestRates:
    """Each caller's allowance fills up by so many requests a minute, and holds one minute's."""

    now_s: Callable[[], float] = time.monotonic
    _left: dict[str, _Allowance] = field(default_factory=dict)

    def spend(self, caller: str, *, per_minute: int, weight: int = 1) -> None:
        """Take so many requests off the caller's allowance. Refusal: they are not left."""
        weight = min(weight, per_minute)
        now_s = self.now_s()
        left = self._left.pop(caller, None) or _Allowance(per_minute, now_s)
        requests = min(per_minute, left.requests + (now_s - left.at_s) * per_minute / 60)
        allowed = requests >= weight
        self._left[caller] = _Allowance(requests - weight * allowed, now_s)  # The latest caller comes last.
        if len(self._left) > _MAX_CALLERS:
            del self._left[next(iter(self._left))]
        if not allowed:
            wait_s = int((weight - requests) * 60 / per_minute) + 1
            raise Refusal(
                f"more than {per_minute} requests in a minute: try again in {wait_s} s",
                status=HTTPStatus.TOO_MANY_REQUESTS,
                headers={"retry-after": str(wait_s)},
            )
