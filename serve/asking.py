"""A completion that a replica asks of its own layers as a client would, with its tokens and log-prob."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from serve.refusal import Refusal
from serve.sse import EventSplitter, compact_json, event_json

_PATH = "/v1/completions"


@dataclass(slots=True)
class Draft:
    """What is written so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logp: float = 0.0
    """Of all tokens, at temperature 1: in nats."""
    finish_reason: str = ""
    policy_version: int = -1
    """That wrote the last token; -1 until it is there."""

    def add(self, choice: dict[str, Any]) -> str:
        """The text that this part of a stream adds."""
        self.text += choice["text"]
        self.token_ids += choice["token_ids"]
        self.logp += sum((choice["logprobs"] or {}).get("token_logprobs", ()))
        self.finish_reason = choice["finish_reason"] or ""
        self.policy_version = choice.get("policy_version", -1)
        return choice["text"]


async def ask(
    app: ASGIApp, body: dict[str, Any], draft: Draft, *, state: dict[str, Any]
) -> AsyncGenerator[str, None]:
    """Fill `draft` with one completion, giving each new piece of its text. Refusal: it cannot be had."""
    asked = {**body, "stream": True, "logprobs": 0, "return_token_ids": True}
    async with aclosing(_chunks(app, compact_json(asked), state)) as chunks:
        async for chunk in chunks:
            if "error" in chunk:
                raise _refusal(chunk)
            for choice in chunk["choices"]:
                yield draft.add(choice)


async def _chunks(
    app: ASGIApp, content: bytes, state: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    answering = asyncio.create_task(_answer(app, content, state, messages))
    try:
        start = await messages.get()
        splitter, body = EventSplitter(), b""
        while start is not None and (message := await messages.get()) is not None:
            part = message.get("body", b"")
            if start["status"] != HTTPStatus.OK:
                body += part
            for event in splitter.feed(part):
                chunk = event_json(event)
                if chunk is not None:
                    yield chunk
        if body:
            raise _refusal(json.loads(body))
        await answering
    finally:
        answering.cancel()
        await asyncio.wait([answering])


async def _answer(
    app: ASGIApp, content: bytes, state: dict[str, Any], messages: "asyncio.Queue[Message | None]"
) -> None:
    body: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        return await asyncio.get_running_loop().create_future()  # Nobody hangs up in here.

    try:
        await app(_scope(len(content), state), receive, messages.put)
    finally:
        await messages.put(None)


def _scope(length: int, state: dict[str, Any]) -> Scope:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": _PATH,
        "raw_path": _PATH.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": None,
        "server": None,
        "state": state,
    }


def _refusal(answer: dict[str, Any]) -> Refusal:
    """As vLLM's routes and our own layers write it."""
    error = answer["error"]
    return Refusal(error["message"], status=HTTPStatus(error["code"]))
