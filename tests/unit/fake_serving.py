"""A replica without an engine: scripted outputs, routes that stream them as vLLM's do, and its peers."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dpo_ray.buffer import PreferenceBuffer
from serve.authors import ReportingEngine
from serve.ballot_box import refusal
from serve.replica import ReplicaState


@dataclass
class FakeLLM:
    """Gives the scripted outputs of each prompt, and names versions where AsyncLLM does."""

    scripts: list[list[SimpleNamespace]]
    starts: list[tuple[str, int]] = field(default_factory=list)
    """What the engine knows, before the end, of who writes the first prompt's first choice."""
    closed: int = 0

    def first_version(self, request_id: str) -> int | None:
        return int(self.starts[0][0]) if self.starts and request_id == "request-0" else None

    async def generate(
        self, prompt: Any, params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[SimpleNamespace, None]:
        try:
            for completion in self.scripts[prompt]:
                await asyncio.sleep(0)
                yield SimpleNamespace(request_id=request_id, outputs=[completion])
        finally:
            self.closed += 1


def tokens(index: int, text: str) -> SimpleNamespace:
    """A choice that goes on."""
    return SimpleNamespace(index=index, text=text, finish_reason=None, weight_versions=None)


def end(index: int, text: str, *spans: tuple[int, int, int]) -> SimpleNamespace:
    """The end of a choice, with (version, start, end) of its tokens."""
    versions = [SimpleNamespace(version=str(v), start=start, end=stop) for v, start, stop in spans]
    return SimpleNamespace(index=index, text=text, finish_reason="stop", weight_versions=versions)


def completions_app(llm: FakeLLM) -> Starlette:
    """`/v1/completions` that answers as scripted; the body's fields say in which shape."""
    engine = ReportingEngine(llm)

    async def complete(request: Request) -> Response:
        asked = await request.json()
        if asked.get("refused"):
            return JSONResponse({"error": {"message": "no"}}, status_code=400)
        n = asked.get("n", 1)
        params = SimpleNamespace(n=n)
        prompts = [engine.generate(i, params, f"request-{i}") for i in range(asked.get("prompts", 1))]
        if asked.get("stream"):
            chunks = _chunks(prompts, n, asked)
            return StreamingResponse(_cut(chunks, asked.get("cut", 0)), media_type="text/event-stream")
        choices = {}
        for i, outputs in enumerate(prompts):
            async for output in outputs:
                for done in output.outputs:
                    choices[i * n + done.index] = {
                        "index": i * n + done.index,
                        "text": done.text,
                        "finish_reason": done.finish_reason,
                    }
        return JSONResponse({"choices": [choices[i] for i in sorted(choices)], "asked": asked})

    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


async def _chunks(prompts: Sequence[AsyncGenerator], n: int, asked: dict[str, Any]) -> AsyncIterator[str]:
    for i, outputs in enumerate(prompts):
        async for output in outputs:
            for piece in output.outputs:
                choice = {"index": i * n + piece.index, "text": piece.text}
                yield _event({"choices": [{**choice, "finish_reason": piece.finish_reason}]})
    if asked.get("fails"):
        yield _event({"error": {"message": "broken", "code": 500}})
    if asked.get("usage"):
        yield _event({"choices": [], "usage": {"completion_tokens": 1}})
    yield "data: [DONE]\n\n"


async def _cut(chunks: AsyncIterator[str], size: int) -> AsyncIterator[bytes]:
    """As they come; or in pieces of so many bytes, wherever these end."""
    if not size:
        async for chunk in chunks:
            yield chunk.encode()
        return
    whole = "".join([chunk async for chunk in chunks]).encode()
    for start in range(0, len(whole), size):
        yield whole[start : start + size]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def stream_chunks(body: str) -> list[dict[str, Any]]:
    """The JSON of each event, by an independent reading of the stream."""
    data = [block.removeprefix("data: ") for block in body.split("\n\n") if block]
    return [json.loads(item) for item in data if item != "[DONE]"]


def replica(name: str, version: int, *, address: str = "", refuses: str = "") -> ReplicaState:
    state = "refused" if refuses else "serving"
    return ReplicaState(replica=name, version=version, state=state, reason=refuses, address=address)


class LocalBox:
    """A buffer of this process where replicas ask Ray's actor; it may be away."""

    def __init__(self, buffer: PreferenceBuffer | None) -> None:
        self.buffer = buffer

    async def ask(self, method: str, *args: Any, **options: Any) -> Any:
        if self.buffer is None:
            raise refusal(None)
        try:
            return getattr(self.buffer, method)(*args, **options)
        except ValueError as error:
            raise refusal(error) from None


class FakeReplicas:
    """Says what it is told to say; `after` is what the replicas are once they have converged."""

    def __init__(
        self, states: Sequence[ReplicaState], *, after: Sequence[Sequence[ReplicaState]] = ()
    ) -> None:
        self.now = list(states)
        self._after = [list(states) for states in after]
        self.num_asked = 0
        self.num_converged = 0

    async def states(self, *, fresh: bool = False) -> list[ReplicaState]:
        self.num_asked += 1
        return self.now

    async def converge(self) -> list[ReplicaState]:
        self.num_converged += 1
        self.now = self._after.pop(0) if self._after else self.now
        return self.now
