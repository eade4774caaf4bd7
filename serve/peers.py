"""The other replicas over HTTP: requests that are passed on to them, and what they tell of themselves."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus

import anyio
import httpx
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from serve.models import Question
from serve.refusal import Refusal
from serve.replica import ReplicaState
from serve.sse import refusal_event

METRICS = "/metrics"
SECRET = "x-dpo-ray-peer"
WANTED = "x-dpo-ray-version"
CALLER = "x-dpo-ray-caller"
"""Who may vote on the answer."""
_NOT_PASSED_ON = {
    "host", "connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-length",
    "accept-encoding", "authorization", "cookie", SECRET, WANTED, CALLER,
}  # fmt: skip
"""Headers of one connection, and those that are for the public port alone."""
_GET_TIMEOUT_S = 2.0


class Peers:
    """Asks other replicas, in the name of this one."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        # Peers are on the cluster's own network: no proxy, and no limit but the guard's.
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=2.0),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
            trust_env=False,
        )

    async def get_all(self, path: str, peers: Sequence[ReplicaState]) -> dict[str, str]:
        """What each of them has at `path`, by its id; those that do not tell at once are left out."""
        texts = await asyncio.gather(*(self._get(peer.address + path) for peer in peers if peer.address))
        reached = [peer.replica for peer in peers if peer.address]
        return {name: text for name, text in zip(reached, texts, strict=True) if text is not None}

    async def _get(self, url: str) -> str | None:
        try:
            response = await self._client.get(url, headers={SECRET: self._secret}, timeout=_GET_TIMEOUT_S)
        except httpx.TransportError:
            return None
        return response.text if response.is_success else None

    async def answer(
        self, peer: ReplicaState, question: Question, scope: Scope, receive: Receive, send: Send
    ) -> bool:
        """Whether the peer has answered, or the client has gone; a peer that cannot answer sends nothing."""
        headers = [(key, value) for key, value in Headers(scope=scope).items() if key not in _NOT_PASSED_ON]
        headers += [(SECRET, self._secret), (WANTED, str(peer.version))]
        caller = scope.get("state", {}).get("caller")
        headers += [(CALLER, caller.name)] if caller and caller.may_act_as("labeler") else []
        request = self._client.build_request(
            "POST", peer.address + scope["path"], headers=headers, content=question.body
        )
        answered = True
        async with until_disconnect(receive):
            answered = await self._relay(request, send)
        return answered

    async def _relay(self, request: httpx.Request, send: Send) -> bool:
        try:
            response = await self._client.send(request, stream=True)
        except httpx.TransportError:
            return False
        try:
            if response.status_code == HTTPStatus.MISDIRECTED_REQUEST:
                return False
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                await _relay_stream(response, send)
                return True
            return await _relay_whole(response, send)
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()


async def _relay_whole(response: httpx.Response, send: Send) -> bool:
    try:
        body = await response.aread()
    except httpx.TransportError:
        return False
    await send(_start(response))
    await send({"type": "http.response.body", "body": body})
    return True


async def _relay_stream(response: httpx.Response, send: Send) -> None:
    await send(_start(response))
    try:
        async for chunk in response.aiter_raw():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except httpx.TransportError:
        gone = Refusal(
            "the replica that wrote this answer has gone: ask again", status=HTTPStatus.SERVICE_UNAVAILABLE
        )
        last = refusal_event(gone) + b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _start(response: httpx.Response) -> Message:
    headers = [(name, value) for name, value in response.headers.raw if name.lower() not in _CONNECTION]
    return {"type": "http.response.start", "status": response.status_code, "headers": headers}


_CONNECTION = {b"connection", b"keep-alive", b"transfer-encoding", b"date", b"server"}


@asynccontextmanager
async def until_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel what runs inside when the client goes away."""
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        yield
        group.cancel_scope.cancel()
