"""The HTTP face of a replica: vLLM's OpenAI routes, each answer with the policy version that made it."""

import json
from types import SimpleNamespace
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from serve.engine import SERVED_NAME, PolicyEngine, VersionSpans, request_spans

_VERSIONED = ("/v1/chat/completions", "/v1/completions")


async def build_http_app(engine: PolicyEngine) -> ASGIApp:
    """vLLM's own application on our engine, and `GET /v1/policy`."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    assert args is not None
    args.model, args.served_model_name = engine.llm.model_config.model, [SERVED_NAME]
    tasks = await engine.llm.get_supported_tasks()
    app = build_app(args, tasks, engine.llm.model_config)
    await init_app_state(engine.llm, app.state, args, tasks)
    app.state.server = (
        SimpleNamespace()
    )  # vLLM's error handlers tell their own server to stop; ours is Serve.

    @app.get("/v1/policy")
    async def policy() -> dict[str, Any]:
        return {"version": engine.version, "manifest": engine.manifest.model_dump()}

    return PolicyVersionMiddleware(app, engine)


class PolicyVersionMiddleware:
    """Adds `x-policy-version` to the header of a completion, and `policy_version` to its body.

    Both name the version of the last token. A stream's header is sent before that is known: it names the
    version of the first token, and the terminal chunk that of the last.
    """

    def __init__(self, app: ASGIApp, engine: PolicyEngine) -> None:
        self.app = app
        self.engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _VERSIONED:
            await self.app(scope, receive, send)
            return
        spans = VersionSpans()
        token = request_spans.set(spans)
        try:
            await self.app(scope, receive, _VersionedAnswer(send, spans, self.engine))
        finally:
            request_spans.reset(token)


class _VersionedAnswer:
    """The `send` of one answer."""

    def __init__(self, send: Send, spans: VersionSpans, engine: PolicyEngine) -> None:
        self._send = send
        self._spans = spans
        self._engine = engine
        self._start: Message | None = None
        self._streams = False
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self._streams = content_type.startswith(b"text/event-stream")
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._streams:
            await self._send_chunk(message)
        else:
            await self._send_whole(message)

    def _version(self) -> int:
        return max((version for version, _, _ in self._spans.spans), default=self._engine.version)

    async def _send_start(self, extra: dict[bytes, bytes]) -> None:
        assert self._start is not None
        extra = {b"x-policy-version": str(self._version()).encode(), **extra}
        headers = [(name, value) for name, value in self._start["headers"] if name not in extra]
        await self._send({**self._start, "headers": [*headers, *extra.items()]})
        self._start = None

    async def _send_chunk(self, message: Message) -> None:
        if self._start is not None:
            await self._send_start({})
        body = message.get("body", b"")
        if b'"finish_reason":"' in body:
            body = b"\n\n".join(map(self._versioned_event, body.split(b"\n\n")))
        await self._send({**message, "body": body})

    def _versioned_event(self, event: bytes) -> bytes:
        if b'"finish_reason":"' not in event:
            return event
        return b"data: " + self._versioned(event.removeprefix(b"data: "))

    async def _send_whole(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = self._versioned(self._body)
        await self._send_start({b"content-length": str(len(body)).encode()})
        await self._send({"type": "http.response.body", "body": body})

    def _versioned(self, body: bytes) -> bytes:
        try:
            answer = json.loads(body)
        except ValueError:
            return body
        if not isinstance(answer, dict) or "error" in answer:
            return body
        answer["policy_version"] = self._version()
        answer["policy_version_spans"] = [
            {"version": version, "start": start, "end": end} for version, start, end in self._spans.spans
        ]
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
