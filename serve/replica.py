"""What a replica says of itself, and how it asks all others."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One replica, as it describes itself."""

    replica: str
    """Serve's id of it."""
    version: int
    """The policy version that it holds."""
    state: Literal["serving", "refused"]
    """refused: it could not prove the version that it should hold, and answers nothing."""
    reason: str = ""
    """Why it refuses."""
    canary_error: float = 0.0
    """Largest difference from the learner's log-prob of one canary token when last proven, in nats."""
    push_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of each phase of its last push."""
    address: str = ""
    """http://ip:port at which other replicas reach it; empty where there are none."""
    node: str = ""
    """Ray's id of the node that it runs on."""


class Replicas:
    """All running replicas of this replica's deployment; those that are starting or gone are left out."""

    _FRESH_S = 1.0

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._states: list[ReplicaState] = []
        self._asked_at = float("-inf")

    async def states(self, *, fresh: bool = False) -> list[ReplicaState]:
        """What they say, or said at most a second ago."""
        if fresh or time.monotonic() - self._asked_at > self._FRESH_S:
            await self._ask("describe")
        return self._states

    async def converge(self) -> list[ReplicaState]:
        """Tell them that the desired version has changed: each has proven it on return, or refuses."""
        return await self._ask("settle")

    async def _ask(self, method: str) -> list[ReplicaState]:
        answers = await self._handle.broadcast(method).results_async(return_exceptions=True)
        self._states = [answer for answer in answers if isinstance(answer, ReplicaState)]
        self._asked_at = time.monotonic()
        return self._states
