"""The only way in from the network: a request is read whole, checked, and let in when there is room."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpo_ray.config import ServingConfig
from dpo_ray.storage import Storage
from serve.door import Door, weight_of
from serve.feedback_requests import FEEDBACK_REQUESTS
from serve.limits import Admission
from serve.refusal import Refusal
from serve.requests import REQUESTS, Bounds, reviewed
from serve.strict_json import parse_object
from serve.tokens import Tokens, is_loopback

_HEADERS = re.compile(
    rb"(accept|authorization|content-type|host|idempotency-key|traceparent|tracestate|user-agent):.*|x-request-id:[\w.-]{1,128}",
    re.DOTALL,
)
"""Others end here: some would steer the engine (its queue, its ranks), some would open it to web pages."""
_LARGE = 1 << 16
_FORBIDDEN_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "it opens routes that run code in the engine",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "it lets the engine unpickle what it is sent",
}


def check_environment(environment: Mapping[str, str]) -> None:
    """ValueError: a variable is set under which vLLM cannot be served safely."""
    for name, danger in _FORBIDDEN_ENVIRONMENT.items():
        if environment.get(name, "0") not in ("", "0"):
            raise ValueError(f"{name} is set, and {danger}: unset it")


def check_exposure(run_dir: str, settings: ServingConfig) -> None:
    """ValueError: other machines would reach the policy without a token."""
    if not is_loopback(settings.host) and not Tokens(Storage(run_dir)).read():
        raise ValueError(
            f"serving.host={settings.host} is reached by other machines, and the run has no tokens: add one "
            f"with `python -m serve.tokens --run_dir {run_dir} add NAME --role user`, or serve on 127.0.0.1"
        )


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the served model can do."""

    context_length: int
    """Tokens of prompt and completion."""
    writes_json: bool
    """Whether its vocabulary can spell JSON."""


def guarded(app: ASGIApp, settings: ServingConfig, tokens: Tokens, abilities: Abilities) -> ASGIApp:
    """`app`, reached only by requests that the routes, the tokens and the limits allow."""
    return _Guard(app, settings, tokens, abilities)


class _Guard:
    def __init__(self, app: ASGIApp, settings: ServingConfig, tokens: Tokens, abilities: Abilities) -> None:
        self._app = app
        self._settings = settings
        self._door = Door(settings, tokens)
        self._admission = Admission(
            running=settings.max_concurrent_requests, queued=settings.max_queued_requests
        )
        self._bounds = Bounds(
            context_length=abilities.context_length,
            writes_json=abilities.writes_json,
            max_n=settings.max_n,
            max_completions=settings.max_completions_per_request,
            max_messages=settings.max_messages,
            max_new_tokens=settings.max_new_tokens_per_request,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                await self._http(scope, receive, send)
            except Refusal as refusal:  # Only raised before the app is called.
                await refusal.response()(scope, receive, send)
            except _ClientGone:
                pass
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "speak HTTP"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_sizes(Headers(scope=scope))
        caller = await self._door.open(scope)
        scope = {**scope, "headers": _passed_on(scope["headers"])}
        scope["state"] = {**scope.get("state", {}), "caller": caller}
        if scope["method"] == "GET":
            await self._app(scope, receive, send)
        elif scope["path"].startswith("/v1/policy/"):  # Most needed when all places are taken.
            async with self._checked(scope, receive) as (checked, replay):
                await self._app(checked, replay, send)
        else:
            with self._admission.place():
                async with self._checked(scope, receive) as (checked, replay):
                    await self._in_turn(checked, replay, send)

    def _check_sizes(self, headers: Headers) -> None:
        size = sum(len(name) + len(value) for name, value in headers.raw)
        if size > self._settings.max_header_bytes:
            raise Refusal(
                f"the headers have {size} bytes: send at most {self._settings.max_header_bytes}",
                status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            )
        announced = headers.get("content-length", "")
        _check_size(int(announced[:18]) if announced.isdecimal() else 0, self._settings)

    async def _in_turn(self, scope: Scope, replay: "_Replay", send: Send) -> None:
        with self._admission.turn(weight_of(scope["path"])) as turn:
            await replay.unless_gone(turn)
            await self._app(scope, replay, send)

    @asynccontextmanager
    async def _checked(self, scope: Scope, receive: Receive) -> AsyncIterator[tuple[Scope, "_Replay"]]:
        """The request with the body that was checked, and no other: encoded anew."""
        content = await _read(Headers(scope=scope), receive, self._settings)
        check = partial(_checked_body, scope["path"], content, self._bounds)
        # Half a second of a hostile megabyte must not hold up the others.
        content = await asyncio.to_thread(check) if len(content) > _LARGE else check()
        length = (b"content-length", str(len(content)).encode())
        replay = _Replay(content, receive)
        try:
            yield {**scope, "headers": [*scope["headers"], length]}, replay
        finally:
            replay.close()


def _passed_on(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if _HEADERS.fullmatch(name + b":" + value)]


class _ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def _read(headers: Headers, receive: Receive, settings: ServingConfig) -> bytes:
    """The whole body of a request that says it is JSON."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(
            "send JSON, with the header content-type: application/json",
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )
    content = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _ClientGone
                content += message.get("body", b"")
                more = message.get("more_body", False)
                _check_size(len(content), settings)
    except TimeoutError:
        raise Refusal(
            f"the body was not here after {settings.body_timeout_s:g} s: send it faster",
            status=HTTPStatus.REQUEST_TIMEOUT,
            headers={"connection": "close"},
        ) from None
    return bytes(content)


def _checked_body(path: str, content: bytes, bounds: Bounds) -> bytes:
    try:
        body = parse_object(content or b"{}")
    except ValueError as error:
        raise Refusal(str(error)) from None
    request_type = REQUESTS.get(path) or FEEDBACK_REQUESTS.get(path)
    if request_type is not None:
        body = reviewed(request_type, body, bounds)
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def _check_size(size: int, settings: ServingConfig) -> None:
    if size > settings.max_body_bytes:
        raise Refusal(
            f"the body is larger than {settings.max_body_bytes} bytes: send less at once",
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            headers={"connection": "close"},
        )


class _Replay:
    """The `receive` of an app to which a body is given that was read before."""

    def __init__(self, content: bytes, receive: Receive) -> None:
        self._content: bytes | None = content
        self._next = asyncio.ensure_future(receive())

    async def __call__(self) -> Message:
        if self._content is None:
            return await asyncio.shield(self._next)
        content, self._content = self._content, None
        return {"type": "http.request", "body": content, "more_body": False}

    async def unless_gone(self, turn: asyncio.Future[None]) -> None:
        """Wait for `turn`. _ClientGone: the client has hung up first."""
        await asyncio.wait([turn, self._next], return_when=asyncio.FIRST_COMPLETED)
        if not turn.done():
            raise _ClientGone

    def close(self) -> None:
        self._next.cancel()
