"""What the guard lets in, what it turns away, and what it passes on."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message

from dpo_ray.config import ServingConfig
from dpo_ray.storage import Storage
from serve.guard import Abilities, check_environment, check_exposure, guarded
from serve.tokens import Tokens

CONTEXT = 64
ASK = {"prompt": "a fine"}


async def echo(request: Request) -> Response:
    """What arrived: the body, the headers, and who sent it."""
    caller = request.state.caller
    body = json.loads(await request.body() or b"null")
    return JSONResponse({"body": body, "headers": dict(request.headers), "caller": caller.model_dump()})


class Gate:
    """A route that answers in two parts, the second when the test says so."""

    def __init__(self) -> None:
        self.running = 0
        self.most_running = 0
        self.open = asyncio.Event()

    async def answer(self, request: Request) -> Response:
        await request.body()
        return StreamingResponse(self._parts())

    async def _parts(self) -> AsyncIterator[bytes]:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            yield b"first "
            await self.open.wait()
            yield b"last"
        finally:
            self.running -= 1


PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/preferences")
POLICY = ("/v1/policy/promote", "/v1/policy/rollback")


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return Tokens(Storage(str(tmp_path)))


@pytest.fixture
def guard(tokens: Tokens) -> Callable[..., ASGIApp]:
    def build(answer: Any = echo, **settings: Any) -> ASGIApp:
        posts = [Route(path, answer, methods=["POST"]) for path in PATHS + POLICY]
        gets = [Route(path, echo) for path in ("/", "/health", "/v1/models", "/docs")]
        app = Starlette(routes=[*posts, *gets])
        return guarded(app, ServingConfig(**settings), tokens, Abilities(CONTEXT, writes_json=True))

    return build


def client(app: ASGIApp, *, address: str = "http://127.0.0.1:8000", **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=address, **options)


def ask(
    app: ASGIApp, path: str, body: object = None, *, method: str = "POST", **headers: str
) -> httpx.Response:
    """One request; a body that is no text or bytes is sent as JSON."""
    content = body if isinstance(body, str | bytes) else json.dumps(body)

    async def send() -> httpx.Response:
        async with client(app) as asking:
            given = {"content-type": "application/json", **headers}
            return await asking.request(
                method, path, content=None if method == "GET" else content, headers=given
            )

    return asyncio.run(send())


def refusal(response: httpx.Response) -> tuple[int, str]:
    """Its status and sentence, of an answer in OpenAI's shape."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "code", "param"}
    assert error["code"] == response.status_code
    return response.status_code, error["message"]


def test_json_that_can_be_read_in_two_ways_is_refused_on_every_route(guard: Callable[..., ASGIApp]) -> None:
    for path in PATHS:
        assert refusal(ask(guard(), path, '{"prompt": "a", "prompt": "b"}'))[0] == 400


def test_the_app_gets_the_checked_body_and_no_header_that_steers_it(guard: Callable[..., ASGIApp]) -> None:
    body = '{ "prompt" : "\\u0061 fine", "max_tokens": null, "temperature": 1 }'
    steering = {
        "x-vllm-priority": "-9",
        "x-data-parallel-rank": "7",
        "origin": "http://evil",
        "cookie": "a=b",
    }
    arrived = ask(guard(), "/v1/completions", body, **steering, **{"x-request-id": "mine-1"}).json()
    assert arrived["body"] == {"prompt": "a fine", "temperature": 1}
    assert arrived["headers"].keys() & steering.keys() == set()
    assert arrived["headers"]["x-request-id"] == "mine-1"
    assert arrived["headers"]["content-length"] == str(len('{"temperature":1.0,"prompt":"a fine"}'))
    assert (
        "x-request-id"
        not in ask(guard(), "/v1/completions", ASK, **{"x-request-id": "a b"}).json()["headers"]
    )


def test_only_listed_routes_are_reached_and_only_with_their_method(guard: Callable[..., ASGIApp]) -> None:
    for path in ("/docs", "/v1/completions/", "/v1/completions/render", "/collective_rpc"):
        assert refusal(ask(guard(), path, {}))[0] == 404, path
    for method, path, allowed in (
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
    ):
        response = ask(guard(), path, {}, method=method)
        assert refusal(response)[0] == 405
        assert response.headers["allow"] == allowed


def test_a_websocket_is_closed(guard: Callable[..., ASGIApp]) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    asyncio.run(asyncio.wait_for(guard()(scope, receive, send), 5))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_sizes_are_bounded(guard: Callable[..., ASGIApp]) -> None:
    fits = {"prompt": "x" * 100}
    most = len(json.dumps(fits))
    app = guard(max_body_bytes=most, max_header_bytes=500)
    assert ask(app, "/v1/completions", fits).status_code == 200
    assert refusal(ask(app, "/v1/completions", json.dumps(fits) + " "))[0] == 413
    assert refusal(ask(app, "/v1/completions", fits, **{"content-length": "9" * 30}))[0] == 413
    assert refusal(ask(app, "/v1/completions", fits, filler="x" * 500))[0] == 431
    assert refusal(ask(app, "/v1/completions", "a=b", **{"content-type": "text/plain"}))[0] == 415


async def parts(*chunks: bytes, pause_s: float = 0) -> AsyncIterator[bytes]:
    for chunk in chunks:
        await asyncio.sleep(pause_s)
        yield chunk


def test_a_body_in_parts_is_bounded_in_size_and_time(guard: Callable[..., ASGIApp]) -> None:
    async def statuses() -> list[int]:
        async with client(guard(max_body_bytes=20, body_timeout_s=0.2)) as asking:
            json_type = {"content-type": "application/json"}
            bodies = parts(b'{"prompt":', b'"ab"}'), parts(*[b"x"] * 21), parts(*[b" "] * 9, pause_s=0.1)
            posts = [asking.post("/v1/completions", content=body, headers=json_type) for body in bodies]
            return [response.status_code for response in await asyncio.gather(*posts)]

    assert asyncio.run(statuses()) == [200, 413, 408]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def run(scenario: Callable[[Gate], Coroutine[Any, Any, None]]) -> None:
    async def started() -> None:
        await scenario(Gate())

    asyncio.run(started())


def test_streams_run_two_at_a_time_and_the_fourth_request_is_turned_away(
    guard: Callable[..., ASGIApp],
) -> None:
    async def scenario(gate: Gate) -> None:
        app = guard(gate.answer, max_concurrent_requests=2, max_queued_requests=1)
        async with client(app) as asking:
            posts = [asyncio.create_task(asking.post("/v1/completions", json=ASK)) for _ in range(3)]
            await until(lambda: gate.running == 2)
            turned_away = await asking.post("/v1/completions", json=ASK)
            assert refusal(turned_away)[0] == 429
            assert turned_away.headers["retry-after"] == "1"
            assert (await asking.get("/health")).status_code == 200
            gate.open.set()
            answers = [await post for post in posts]
            assert [answer.text for answer in answers] == ["first last"] * 3
            assert gate.most_running == 2

    run(scenario)


async def raw_post(app: ASGIApp, hung_up: asyncio.Event) -> int | None:
    """The status of a request whose client hangs up when told; None where it hears nothing."""
    messages = [{"type": "http.request", "body": json.dumps(ASK).encode()}]
    statuses: list[int] = []

    async def receive() -> Message:
        if not messages:
            await hung_up.wait()
            return {"type": "http.disconnect"}
        return messages.pop()

    async def send(message: Message) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    await asyncio.wait_for(app({**scope, "query_string": b""}, receive, send), 5)
    return statuses[0] if statuses else None


@pytest.mark.parametrize("goes", ["running", "waiting"])
@pytest.mark.parametrize("how", ["hangs up", "is cancelled"])
def test_a_client_that_goes_frees_its_place_and_no_other(
    guard: Callable[..., ASGIApp], goes: str, how: str
) -> None:
    async def scenario(gate: Gate) -> None:
        app = guard(gate.answer, max_concurrent_requests=1, max_queued_requests=2)
        stays, hung_up = asyncio.Event(), asyncio.Event()
        leaver = 0 if goes == "running" else 2
        posts = [asyncio.create_task(raw_post(app, hung_up if i == leaver else stays)) for i in range(3)]
        await until(lambda: gate.running == 1)
        if how == "hangs up":
            hung_up.set()
        else:
            posts[leaver].cancel()
        await asyncio.wait([posts[leaver]])
        posts[leaver] = asyncio.create_task(raw_post(app, stays))
        await asyncio.sleep(0.01)
        gate.open.set()
        assert [await post for post in posts] == [200] * 3
        assert gate.most_running == 1

    run(scenario)


def test_a_rollback_needs_no_place(guard: Callable[..., ASGIApp], tokens: Tokens) -> None:
    admin = {"authorization": f"Bearer {tokens.add('ann', 'admin')}"}

    async def scenario(gate: Gate) -> None:
        app = guard(gate.answer, max_concurrent_requests=1, max_queued_requests=0)
        async with client(app, headers=admin) as asking:
            asked = asyncio.create_task(asking.post("/v1/completions", json=ASK))
            await until(lambda: gate.running == 1)
            rollback = asyncio.create_task(asking.post("/v1/policy/rollback", json={}))
            await until(lambda: gate.running == 2 or rollback.done())
            gate.open.set()
            assert [(await asked).status_code, (await rollback).status_code] == [200, 200]

    run(scenario)


def test_an_address_has_an_allowance_where_there_are_no_tokens(guard: Callable[..., ASGIApp]) -> None:
    app = guard(requests_per_minute=2)
    assert [ask(app, "/v1/models", method="GET").status_code for _ in range(3)] == [200, 200, 429]
    assert ask(app, "/health", method="GET").status_code == 200


@pytest.mark.parametrize("name", ["VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION"])
def test_nothing_starts_under_an_environment_that_opens_the_engine(name: str) -> None:
    check_environment({name: "0"})
    with pytest.raises(ValueError, match=f"{name} is set, and it .*: unset it"):
        check_environment({name: "1"})


def test_other_machines_are_served_only_with_tokens(tmp_path: Path, tokens: Tokens) -> None:
    check_exposure(str(tmp_path), ServingConfig())
    with pytest.raises(ValueError, match=r"serving\.host=0\.0\.0\.0 is reached by other machines"):
        check_exposure(str(tmp_path), ServingConfig(host="0.0.0.0"))
    tokens.add("ann", "user")
    check_exposure(str(tmp_path), ServingConfig(host="0.0.0.0"))
