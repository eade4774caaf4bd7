"""What a labeler got is what a thumb is about, whichever replica wrote it."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dpo_ray.buffer import ServedCompletion
from serve.authors import ReportingEngine
from serve.served import BATCH_S, RecordedAnswers, ServedLog
from serve.tokens import Caller, Role
from serve.versions import VersionedAnswers
from tests.unit.fake_serving import LocalBox


class Kept:
    """A buffer that only notes what it is asked to keep."""

    def __init__(self) -> None:
        self.batches: list[list[ServedCompletion]] = []

    def keep_served(self, served: list[ServedCompletion], *, most: int) -> None:
        self.batches.append(served)


class Engine:
    """Writes two tokens to each choice, in two parts, as version 7; a prompt of id 99 it leaves open."""

    output_processor = SimpleNamespace(request_states={}, external_req_ids={})

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        for part in range(1 if prompt == [99] else 2):
            for index in range(params.n):
                choice = SimpleNamespace(
                    index=index,
                    text=f" {'ab'[part]}{index}",
                    token_ids=[10 * part + index],
                    cumulative_logprob=-0.5 * (part + 1),
                    weight_versions=[SimpleNamespace(version="7", start=0, end=2)] if part else None,
                )
                prompt_ids = None if part else prompt
                yield SimpleNamespace(request_id=request_id, prompt_token_ids=prompt_ids, outputs=[choice])


TWO = SimpleNamespace(n=2)


async def complete(request: Request) -> Response:
    """As vLLM's route: each prompt is a request of its own, whose id goes on from the answer's."""
    body, engine = await request.json(), ReportingEngine(Engine())
    prompts = body.get("prompt", "chat")
    chat = request.url.path == "/v1/chat/completions"
    for number in range(1 if isinstance(prompts, str) else len(prompts)):
        request_id = "chatcmpl-1" if chat else f"cmpl-1-{number}"
        async for _ in engine.generate([99 if prompts == "open" else 50 + number], TWO, request_id):
            pass
    return JSONResponse({})


async def decoded(token_ids: list[int]) -> str:
    return f"text of {token_ids}"


def kept(path: str, body: dict[str, Any], *, role: Role | None = "labeler") -> list[ServedCompletion]:
    """What is kept of one request."""
    buffer: Any = Kept()
    paths = ("/v1/completions", "/v1/chat/completions", "/tokenize")
    routes = Starlette(routes=[Route(each, complete, methods=["POST"]) for each in paths])

    async def scenario() -> None:
        app = VersionedAnswers(
            RecordedAnswers(routes, ServedLog(LocalBox(buffer), most=9), decoded), held=lambda: 7
        )
        state = {} if role is None else {"caller": Caller(name="ann", role=role)}

        async def called(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "state": state}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(called)) as client:
            assert (await client.post(f"http://policy{path}", json=body)).status_code == 200
        await asyncio.sleep(2 * BATCH_S)

    asyncio.run(scenario())
    return [each for batch in buffer.batches for each in batch]


def test_each_choice_of_each_prompt_is_kept_with_its_tokens() -> None:
    served = kept("/v1/completions", {"prompt": ["the", "a"]})
    assert [(each.completion_id, each.index, each.prompt) for each in served] == [
        ("cmpl-1", 0, "the"),
        ("cmpl-1", 1, "the"),
        ("cmpl-1", 2, "a"),
        ("cmpl-1", 3, "a"),
    ]
    assert served[3] == ServedCompletion("cmpl-1", 3, "ann", "a", (51,), " a1 b1", (1, 11), -1.0, 7)


def test_a_chat_is_kept_as_messages_and_ids_as_their_text() -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "film"}]
    chat = kept("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
    assert [(each.completion_id, each.prompt) for each in chat] == [
        ("chatcmpl-1", [{"role": "user", "content": "the film"}])
    ] * 2
    assert kept("/v1/completions", {"prompt": [[50]]})[0].prompt == "text of [50]"


def test_an_answer_that_was_broken_off_is_not_kept() -> None:
    assert kept("/v1/completions", {"prompt": "open"}) == []


@pytest.mark.parametrize("role", ["user", None])
def test_what_nobody_may_vote_on_is_not_kept(role: Role | None) -> None:
    assert kept("/v1/completions", {"prompt": "the"}, role=role) == []


def test_what_the_buffer_misses_while_it_is_away_is_kept_later_as_far_as_it_fits() -> None:
    completions = [ServedCompletion(f"cmpl-{n}", 0, "ann", "p", (1,), "t", (2,), None, 0) for n in range(5)]
    buffer: Any = Kept()
    box = LocalBox(None)

    async def scenario() -> None:
        log = ServedLog(box, most=3)
        for completion in completions:
            log.add(completion)
        await asyncio.sleep(1.5 * BATCH_S)
        box.buffer = buffer
        await asyncio.sleep(1.5 * BATCH_S)

    asyncio.run(scenario())
    assert buffer.batches == [completions[2:]]
