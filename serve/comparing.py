"""Two answers to one prompt, written at the same time, for a person to compare."""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from typing import Any, Literal, NamedTuple

from starlette.types import ASGIApp

from dpo_ray.buffer import ShownAnswer
from serve.asking import Draft, ask
from serve.feedback_requests import ComparisonRequest
from serve.forwarding import DRAW
from serve.models import LIVE_NAME, pinned_name
from serve.refusal import Refusal
from serve.settings import ReplicaSettings

Side = Literal["first", "second"]
_SIDES: tuple[Side, Side] = ("first", "second")


class Piece(NamedTuple):
    """New text of one answer."""

    side: Side
    text: str


class Answers(NamedTuple):
    """Both, whole."""

    first: ShownAnswer
    second: ShownAnswer


class Comparing:
    """Asks the layers below for both answers, as the job samples unless the request says otherwise."""

    def __init__(self, app: ASGIApp, settings: ReplicaSettings, *, context_length: int) -> None:
        self._app = app
        self._sampling = settings.sampling
        self._most = settings.serving.max_new_tokens_per_request
        self._context_length = context_length

    async def write(
        self, request: ComparisonRequest, prompt_ids: tuple[int, ...], candidate: int | None
    ) -> AsyncGenerator[Piece | Answers, None]:
        """Pieces as they come, then both answers. Refusal: one cannot be had.

        `candidate`: the version that the live one is compared with; None: the live one itself.
        """
        body = self._body(request, prompt_ids)
        models = [LIVE_NAME, LIVE_NAME if candidate is None else pinned_name(candidate)]
        secrets.SystemRandom().shuffle(models)
        seeds = secrets.SystemRandom().sample(range(2**31), 2)  # Equal ones would write equal answers.
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        writers = [
            asyncio.create_task(self._write(side, {**body, "model": model, "seed": seed}, pieces))
            for side, model, seed in zip(_SIDES, models, seeds, strict=True)
        ]
        try:
            for _ in writers:
                while (piece := await pieces.get()) is not None:
                    yield piece
            yield Answers(*[_shown(await writer) for writer in writers])
        finally:
            for writer in writers:
                writer.cancel()
            await asyncio.wait(writers)

    async def _write(self, side: Side, body: dict[str, Any], pieces: "asyncio.Queue[Piece | None]") -> Draft:
        draft = Draft()
        try:
            # A draw of 1 is in no candidate's share: live means live.
            async for text in ask(self._app, body, draft, state={DRAW: 1.0}):
                await pieces.put(Piece(side, text))
        finally:
            await pieces.put(None)
        return draft

    def _body(self, request: ComparisonRequest, prompt_ids: tuple[int, ...]) -> dict[str, Any]:
        room = self._context_length - len(prompt_ids)
        if room < 1:
            raise Refusal(
                f"the prompt has {len(prompt_ids)} tokens, which leaves no room for an answer in a context "
                f"of {self._context_length}: shorten it"
            )
        asked = request.max_tokens or self._sampling.max_new_tokens
        temperature, top_p = request.temperature, request.top_p
        return {
            "prompt": list(prompt_ids),
            "max_tokens": min(asked, room, self._most or room),
            "temperature": self._sampling.temperature if temperature is None else temperature,
            "top_p": self._sampling.top_p if top_p is None else top_p,
        }


def _shown(draft: Draft) -> ShownAnswer:
    return ShownAnswer(
        text=draft.text,
        token_ids=tuple(draft.token_ids),
        logp=draft.logp,
        policy_version=draft.policy_version,
        finish_reason=draft.finish_reason,
    )
