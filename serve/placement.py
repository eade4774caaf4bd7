"""Which replica answers a request: a rule over what is live, what is offered, and what each replica holds."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_ray.registry import Candidate, PolicyRegistry
from serve.replica import ReplicaState


@dataclass(frozen=True, slots=True)
class Policy:
    """What the registry says."""

    live: int
    candidate: Candidate | None


class PolicyView:
    """The registry, asked at most once a second."""

    _FRESH_S = 1.0

    def __init__(self, registry: PolicyRegistry) -> None:
        self._registry = registry
        self._policy: Policy | None = None
        self._asked_at = 0.0

    async def get(self, *, fresh: bool = False) -> Policy:
        old = self._policy is None or time.monotonic() - self._asked_at > self._FRESH_S
        if self._policy is None or old or fresh:
            self._policy = await asyncio.to_thread(self._read)
            self._asked_at = time.monotonic()
        return self._policy

    def _read(self) -> Policy:
        live = self._registry.live()
        assert live is not None, "a replica starts with a live version"
        return Policy(live, self._registry.candidate())


def wanted_versions(asked: int | None, policy: Policy, draw: float) -> list[int]:
    """The versions that may answer, best first. `draw` in [0, 1) says where its share of luck falls."""
    if asked is not None:
        return [asked]
    if policy.candidate is not None and draw < policy.candidate.share:
        return [policy.candidate.version, policy.live]
    return [policy.live]


def holder_of(
    versions: Sequence[int], own: ReplicaState, states: Sequence[ReplicaState]
) -> ReplicaState | None:
    """A replica that serves the first of these versions that any serves; this one, where it can."""
    for version in versions:
        if _serves(own, version):
            return own
        peers = [
            state
            for state in states
            if _serves(state, version) and state.address and state.replica != own.replica
        ]
        if peers:
            return random.choice(peers)
    return None


def _serves(state: ReplicaState, version: int) -> bool:
    return state.state == "serving" and state.version == version
