"""Completions that labelers got, told to the buffer in the background for the thumbs that may come."""

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from dpo_ray.buffer import ServedCompletion
from dpo_ray.types import Text
from serve.authors import Written, request_authors
from serve.ballot_box import Box
from serve.feedback_requests import as_text
from serve.forwarding import Replay, whole_body
from serve.refusal import Refusal
from serve.requests import ChatRequest, CompletionRequest
from serve.versions import COMPLETIONS

BATCH_S = 0.5
"""Completions of so many seconds are kept at once; a replica that dies takes them with it."""


class ServedLog:
    """What was served and is not kept yet: the latest, while the buffer does not answer."""

    def __init__(self, box: Box, *, most: int) -> None:
        self._box = box
        self._most = most
        self._waiting: deque[ServedCompletion] = deque(maxlen=most)
        self._keeping: asyncio.Task[None] | None = None

    def add(self, served: ServedCompletion) -> None:
        self._waiting.append(served)
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        while self._waiting:
            await asyncio.sleep(BATCH_S)
            batch = [*self._waiting]
            with suppress(Refusal):  # The buffer is away: again in a moment.
                await self._box.ask("keep_served", batch, most=self._most)
                for _ in batch:
                    self._waiting.popleft()


class RecordedAnswers:
    """Notes what the app below writes for callers who may vote on it."""

    def __init__(self, app: ASGIApp, log: ServedLog, text_of: Callable[[list[int]], Awaitable[str]]) -> None:
        self._app = app
        self._log = log
        self._text_of = text_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller, authors = scope.get("state", {}).get("caller"), request_authors.get()
        if authors is None or caller is None or not caller.may_act_as("labeler"):
            await self._app(scope, receive, send)
            return
        content = await whole_body(receive)
        prompts = await self._prompts(json.loads(content))
        authors.written = {}
        await self._app(scope, Replay(content, receive), send)
        for index, written in authors.written.items():
            spans = authors.choices.get(index)
            if spans:  # It has ended, with tokens.
                self._log.add(
                    ServedCompletion(
                        completion_id=_answer_id(scope["path"], written),
                        index=index,
                        author=caller.name,
                        prompt=prompts[written.prompt_number],
                        prompt_ids=written.prompt_ids,
                        text=written.text,
                        token_ids=tuple(written.token_ids),
                        logp=written.logp,
                        policy_version=spans[-1].version,
                    )
                )

    async def _prompts(self, body: dict[str, Any]) -> list[Text]:
        if "messages" in body:
            return [as_text(ChatRequest.model_validate(body).messages)]
        prompts = CompletionRequest.model_validate(body).prompts()
        return [each if isinstance(each, str) else await self._text_of(each) for each in prompts]


def _answer_id(path: str, written: Written) -> str:
    """vLLM numbers the prompts of one request for completions."""
    assert path in COMPLETIONS
    return written.request_id if "chat" in path else written.request_id.rpartition("-")[0]
