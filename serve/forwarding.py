"""A request's way to the replica that holds the version it asks for, and its answer's way back."""

import hashlib
import random
import secrets
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.models import Question, not_loaded, read_question
from serve.peers import CALLER, METRICS, SECRET, WANTED, Peers
from serve.placement import PolicyView, holder_of, wanted_versions
from serve.refusal import Refusal
from serve.replica import Replicas, ReplicaState
from serve.tokens import Caller
from serve.versions import COMPLETIONS, PINNED

DRAW = "canary_draw"
"""Key of `scope["state"]`: where in [0, 1] a request's luck falls, if that is not left to chance."""


class Forwarding:
    """Answers here what this replica holds, and has a peer answer what only the peer holds."""

    def __init__(
        self,
        app: ASGIApp,
        own: Callable[[], ReplicaState],
        view: PolicyView,
        replicas: Replicas,
        peers: Peers,
    ) -> None:
        self._app = app
        self._own = own
        self._view = view
        self._replicas = replicas
        self._peers = peers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in COMPLETIONS:
            await self._app(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        question = read_question(await whole_body(receive))
        draw = _draw(scope)
        failed: set[str] = set()
        for fresh in (False, True, True):  # A second look where the first was out of date.
            holder = await self._holder(question.asked, draw, failed, fresh=fresh)
            if holder is not None and holder.replica == self._own().replica:
                await answer_here(self._app, question, scope, receive, send)
                return
            if holder is not None:
                if await self._peers.answer(holder, question, scope, receive, send):
                    return
                failed.add(holder.replica)
        raise await self._refusal(question.asked)

    async def _holder(
        self, asked: int | None, draw: float, failed: set[str], *, fresh: bool
    ) -> ReplicaState | None:
        policy, own = await self._view.get(fresh=fresh), self._own()
        wanted = wanted_versions(asked, policy, draw)
        if own.state == "serving" and own.version == wanted[0]:
            return own
        if fresh and asked is None and policy.candidate is None and own.state == "serving":
            return own  # It will hold what has just gone live; until then, it says what it holds.
        states = [state for state in await self._replicas.states(fresh=fresh) if state.replica not in failed]
        return holder_of(wanted, own, states)

    async def _refusal(self, asked: int | None) -> Refusal:
        policy, states = await self._view.get(), await self._replicas.states()
        if asked is not None:
            loaded = [state.version for state in states if state.state == "serving"]
            candidate = policy.candidate.version if policy.candidate else None
            return not_loaded(asked, loaded, live=policy.live, candidate=candidate)
        reasons = "".join(f" ({state.reason})" for state in states if state.reason)[:500]
        return Refusal(
            f"no replica answers with the live version {policy.live} now: try again{reasons}",
            status=HTTPStatus.SERVICE_UNAVAILABLE,
            headers={"retry-after": "1"},
        )


class PeerDoor:
    """Tells requests that other replicas pass on from all others.

    A peer's request was checked where it came in; it is answered here or not at all, and never goes further.
    """

    def __init__(
        self, public: ASGIApp, answers: ASGIApp, own: Callable[[], ReplicaState], secret: str
    ) -> None:
        assert secret, "an empty header would open the door"
        self._public = public
        self._answers = answers
        self._own = own
        self._secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or SECRET not in Headers(scope=scope):
            await self._public(scope, receive, send)
            return
        try:
            self._check(scope)
            question = read_question(await whole_body(receive))
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
            return
        await answer_here(self._answers, question, _as_caller(scope), receive, send)

    def _check(self, scope: Scope) -> None:
        headers, own = Headers(scope=scope), self._own()
        if not secrets.compare_digest(headers[SECRET].encode(), self._secret.encode()):
            raise Refusal(f"{SECRET} is for other replicas: leave it out", status=HTTPStatus.FORBIDDEN)
        if scope["path"] == METRICS:
            return
        if scope["path"] not in COMPLETIONS:
            raise Refusal("replicas ask each other for completions only", status=HTTPStatus.NOT_FOUND)
        if own.state != "serving" or headers.get(WANTED) != str(own.version):
            raise Refusal(f"version {own.version} is here now", status=HTTPStatus.MISDIRECTED_REQUEST)


def _draw(scope: Scope) -> float:
    """The same for requests of one caller with one id: what asks again is answered by the same version."""
    state, request_id = scope.get("state", {}), Headers(scope=scope).get("x-request-id")
    if DRAW in state:
        return state[DRAW]
    if request_id is None:
        return random.random()
    caller = state["caller"].name if "caller" in state else ""
    return int.from_bytes(hashlib.sha256(f"{caller} {request_id}".encode()).digest()[:6]) / 2**48


def _as_caller(scope: Scope) -> Scope:
    """With the labeler in whose name the other replica asks."""
    name = Headers(scope=scope).get(CALLER)
    if name is None:
        return scope
    return {**scope, "state": {**scope.get("state", {}), "caller": Caller(name=name, role="labeler")}}


async def answer_here(app: ASGIApp, question: Question, scope: Scope, receive: Receive, send: Send) -> None:
    """Give `app` a request whose body has been read, under the one model name that it knows."""
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers["content-length"] = str(len(question.plain))
    state = {**scope.get("state", {}), PINNED: question.asked}
    await app(
        {**scope, "headers": headers.raw, "state": state},
        Replay(question.plain, receive),
        send,
    )


async def whole_body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


class Replay:
    """`receive` once more, for a body that was read already."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
