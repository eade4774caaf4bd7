"""What Prometheus sees of the policy: versions, pushes and proofs, beside vLLM's own metrics."""

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.ballot_box import Box
from serve.peers import METRICS, Peers
from serve.placement import PolicyView
from serve.refusal import Refusal
from serve.replica import Replicas, ReplicaState

LIVE_VERSION = Gauge("dpo_ray_live_version", "The version that is live.")
CANDIDATE_VERSION = Gauge("dpo_ray_candidate_version", "The candidate that is on offer; NaN: none.")
REPLICA_VERSION = Gauge("dpo_ray_replica_version", "The version that a replica holds.")
REPLICA_SERVING = Gauge("dpo_ray_replica_serving", "1: proven, and answers; 0: refused.")
CANARY_ERROR = Gauge(
    "dpo_ray_canary_error_nats", "Largest error of one canary token's log-prob at a replica's last proof."
)
CANARY_TOLERANCE = Gauge("dpo_ray_canary_tolerance_nats", "The error beyond which a replica refuses.")
PUSH_SECONDS = Histogram(
    "dpo_ray_push_seconds",
    "Seconds of each phase of a push.",
    ["phase"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
PUSHES = Counter("dpo_ray_push", "Pushes, by outcome.", ["outcome"])
REQUESTS = Counter(
    "dpo_ray_requests",
    "Answered requests, by route, status and policy version.",
    ["route", "code", "version"],
)
VOTES = Counter("dpo_ray_votes", "Votes that were kept, by kind and choice.", ["kind", "choice"])
VOTES_WAITING = Gauge("dpo_ray_votes_waiting", "Votes of all people that no round has taken or refused.")
VOTES_RELEASED = Gauge("dpo_ray_votes_released", "Votes of all people that are pairs.")
IN_FLIGHT = Gauge("dpo_ray_requests_in_flight", "Requests under way, streams until their last byte.")

_PATHS = """
/ /health /ping /version /metrics /openapi.json /tokenize /detokenize /v1/models /v1/chat/completions
/v1/completions /v1/comparisons /v1/comparisons/prompt /v1/preferences /v1/preferences/undo
/v1/preferences/mine /v1/policy /v1/policy/promote /v1/policy/rollback
"""
_ROUTES = frozenset(_PATHS.split())
"""Paths that are told apart; a label has as many series as it has values."""
_NO_VERSION = b""
_TALLY_TIMEOUT_S = 1.0


def count_push(phases_ms: Mapping[str, float], outcome: Literal["proven", "refused"]) -> None:
    """One push of this replica, with the phases that it came to."""
    PUSHES.labels(outcome).inc()
    for phase, milliseconds in phases_ms.items():
        PUSH_SECONDS.labels(phase).observe(milliseconds / 1000)


def count_vote(kind: str, choice: str) -> None:
    """One vote that this replica had kept."""
    VOTES.labels(kind, choice).inc()


class CountedRequests:
    """Counts requests when they end, by the status that the client saw."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        outcome = _Outcome(send)
        with IN_FLIGHT.track_inprogress():
            try:
                await self._app(scope, receive, outcome)
            finally:
                route = scope["path"] if scope["path"] in _ROUTES else "other"
                REQUESTS.labels(route, str(outcome.status), outcome.version.decode()).inc()


class _Outcome:
    """The `send` that remembers how an answer began."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = int(HTTPStatus.INTERNAL_SERVER_ERROR)
        self.version = _NO_VERSION

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.version = dict(message["headers"]).get(b"x-policy-version", _NO_VERSION)
        await self._send(message)


class OwnMetrics:
    """Answers `/metrics` with what this replica knows of itself and its engine."""

    def __init__(self, app: ASGIApp, own: Callable[[], ReplicaState], view: PolicyView, box: Box) -> None:
        self._app = app
        self._own = own
        self._view = view
        self._box = box

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != METRICS:
            await self._app(scope, receive, send)
            return
        response = Response(await self.text(), media_type=CONTENT_TYPE_LATEST)
        await response(scope, receive, send)

    async def text(self) -> str:
        policy, own = await self._view.get(), self._own()
        LIVE_VERSION.set(policy.live)
        CANDIDATE_VERSION.set(policy.candidate.version if policy.candidate else math.nan)
        REPLICA_VERSION.set(own.version)
        REPLICA_SERVING.set(own.state == "serving")
        CANARY_ERROR.set(own.canary_error)
        await self._count_votes()
        return generate_latest(REGISTRY).decode()

    async def _count_votes(self) -> None:
        """The counts stay as they were while the buffer does not answer."""
        with suppress(Refusal, TimeoutError):
            tally = await asyncio.wait_for(self._box.ask("tally"), _TALLY_TIMEOUT_S)
            VOTES_WAITING.set(tally.waiting)
            VOTES_RELEASED.set(tally.released)


class AllMetrics(OwnMetrics):
    """Answers it with what every replica knows: a scrape reaches only one of them."""

    def __init__(
        self,
        app: ASGIApp,
        own: Callable[[], ReplicaState],
        view: PolicyView,
        box: Box,
        replicas: Replicas,
        peers: Peers,
    ) -> None:
        super().__init__(app, own, view, box)
        self._replicas = replicas
        self._peers = peers

    async def text(self) -> str:
        own = self._own().replica
        others = [state for state in await self._replicas.states() if state.replica != own]
        texts = {own: await super().text(), **await self._peers.get_all(METRICS, others)}
        return generate_latest(_Merged(texts)).decode()


class _Merged:
    """The metrics of several replicas, each sample with the label `replica`."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                samples = [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
                family.samples = []
                families.setdefault(family.name, family).samples += samples
        return families.values()
