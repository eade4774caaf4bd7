"""An answer that says which policy version wrote it: in its header, its body and the end of its stream."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.authors import Authors, Span, request_authors
from serve.models import pinned_name
from serve.refusal import Refusal
from serve.sse import EventSplitter, compact_json, event_json, refusal_event, with_json

COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
PINNED = "pinned_version"
"""Key of `scope["state"]`: the one version that may answer, where the request asks for one."""


class VersionedAnswers:
    """Adds `x-policy-version` to the header of a completion, and three fields to its body.

    `policy_version` is that of the last token, `policy_version_spans` has all tokens, and
    `system_fingerprint` names the version where clients look for such a thing. A stream has these fields in
    the last chunk of each choice and in the one with the usage. Its header is sent before its end is known,
    and names the version of the first token.
    """

    def __init__(self, app: ASGIApp, held: Callable[[], int]) -> None:
        self._app = app
        self._held = held
        """The version in the engine, for answers that no token was written for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in COMPLETIONS:
            await self._app(scope, receive, send)
            return
        authors = Authors()
        pinned = scope.get("state", {}).get(PINNED)
        token = request_authors.set(authors)
        try:
            await self._app(scope, receive, _Answer(scope, send, authors, self._held, pinned))
        finally:
            request_authors.reset(token)


class _Answer:
    """The `send` of one answer."""

    def __init__(
        self, scope: Scope, send: Send, authors: Authors, held: Callable[[], int], pinned: int | None
    ) -> None:
        self._scope = scope
        self._send = send
        self._authors = authors
        self._held = held
        self._pinned = pinned
        self._start: Message | None = None
        self._is_sse = False
        self._refused = False
        self._body = b""
        self._events = EventSplitter()

    async def __call__(self, message: Message) -> None:
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self._start = message
            self._is_sse = _content_type(message).startswith(b"text/event-stream")
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._is_sse:
            await self._send_events(message)
        else:
            await self._send_whole(message)

    async def _send_events(self, message: Message) -> None:
        if self._start is not None and not await self._begin({}, versions={self._first()}):
            return
        more = message.get("more_body", False)
        events = [self._versioned_event(event) for event in self._events.feed(message.get("body", b""))]
        body = b"".join(events) + (b"" if more else self._events.rest())
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _send_whole(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = self._versioned_body(self._body)
        spans = [span for spans in self._authors.choices.values() for span in spans]
        length = {b"content-length": str(len(body)).encode()}
        if await self._begin(length, versions={span.version for span in spans}):
            await self._send({"type": "http.response.body", "body": body})

    async def _begin(self, extra: dict[bytes, bytes], *, versions: set[int]) -> bool:
        """Send the header; False where a pinned answer was written by others, and is refused instead."""
        assert self._start is not None
        start, self._start = self._start, None
        others = versions - {self._pinned}
        if self._pinned is not None and start["status"] == HTTPStatus.OK and others:
            self._refused = True
            await _replaced(self._pinned, others).response()(self._scope, _nothing, self._send)
            return False
        version = self._first() if self._is_sse else self._last()
        extra = {b"x-policy-version": str(version).encode(), **extra}
        headers = [(name, value) for name, value in start["headers"] if name.lower() not in extra]
        await self._send({**start, "headers": [*headers, *extra.items()]})
        return True

    def _first(self) -> int:
        return self._held() if self._authors.first is None else self._authors.first

    def _last(self) -> int:
        return self._first() if self._authors.last is None else self._authors.last

    def _versioned_event(self, event: bytes) -> bytes:
        chunk = event_json(event)
        if chunk is None or not isinstance(chunk.get("choices"), list):
            return event
        ended = [choice for choice in chunk["choices"] if choice.get("finish_reason") is not None]
        if ended:
            chunk = self._versioned(chunk, ended)
            others = {span["version"] for span in chunk["policy_version_spans"]} - {self._pinned}
            if self._pinned is not None and others:
                return refusal_event(_replaced(self._pinned, others))
            return with_json(event, chunk)
        if not chunk["choices"] and chunk.get("usage"):
            return with_json(event, self._versioned(chunk, [{"index": i} for i in self._authors.choices]))
        return event

    def _versioned_body(self, body: bytes) -> bytes:
        try:
            answer = json.loads(body)
        except ValueError:
            return body
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            return body
        return compact_json(self._versioned(answer, answer["choices"]))

    def _versioned(self, answer: dict[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer, or chunk, in which these choices end."""
        spans = {choice["index"]: self._authors.choices.get(choice["index"], []) for choice in choices}
        for choice in choices:
            version = spans[choice["index"]][-1].version if spans[choice["index"]] else self._last()
            choice.update(_fields(version, spans[choice["index"]]))
        version = choices[0]["policy_version"] if len(choices) == 1 else self._last()
        fields = _fields(version, [span for index in sorted(spans) for span in spans[index]])
        return {**answer, "system_fingerprint": f"policy-v{version:05d}", **fields}


def _fields(version: int, spans: Iterable[Span]) -> dict[str, Any]:
    return {"policy_version": version, "policy_version_spans": [asdict(span) for span in spans]}


def _content_type(start: Message) -> bytes:
    return next((value for name, value in start["headers"] if name.lower() == b"content-type"), b"")


def _replaced(pinned: int, others: set[int]) -> Refusal:
    names = ", ".join(map(pinned_name, sorted(others)))
    return Refusal(
        f"{pinned_name(pinned)} was replaced by {names} while it answered: ask for what is loaded",
        status=HTTPStatus.CONFLICT,
        param="model",
    )


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
