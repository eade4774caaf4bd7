"""The routes on which people compare, vote, and see what became of their votes."""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from http import HTTPStatus

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from dpo_ray.buffer import Ballot, ShownPair, VoteReceipt
from dpo_ray.config import VotesConfig
from dpo_ray.types import Text
from serve.ballot_box import Box
from serve.comparing import Answers, Comparing, Piece
from serve.comparison_ids import ComparisonIds
from serve.encoding import Encoder
from serve.feedback_answers import ComparisonAnswer, Mine, PreferenceAnswer, PromptAnswer
from serve.feedback_requests import ComparisonRequest, PreferenceRequest, UndoRequest, as_text
from serve.json_routes import body_schema, parsed, refusable
from serve.metrics import count_vote
from serve.peers import until_disconnect
from serve.placement import PolicyView
from serve.refusal import Refusal
from serve.served import BATCH_S
from serve.sse import compact_json, refusal_event
from serve.tokens import Caller
from serve.trained import TrainedVersions

_LOOKS = 4
"""A completion that was served just now may not be kept yet, by this replica or another one."""
_KEY = "idempotency-key"
_MAX_KEY = 256


@dataclass(frozen=True, slots=True)
class FeedbackRoutes:
    """Of one replica, over the buffer that all of them share."""

    box: Box
    ids: ComparisonIds
    encoder: Encoder
    comparing: Comparing
    view: PolicyView
    trained: TrainedVersions
    config: VotesConfig

    def mount(self, app: FastAPI) -> None:
        """Add the routes to vLLM's application."""
        router = APIRouter()
        compare = {"response_model": ComparisonAnswer, "openapi_extra": body_schema(ComparisonRequest)}
        vote = {"response_model": PreferenceAnswer, "openapi_extra": body_schema(PreferenceRequest)}
        undo = {"response_model": PreferenceAnswer, "openapi_extra": body_schema(UndoRequest)}
        router.post("/v1/comparisons", **compare)(refusable(self.compare))
        router.get("/v1/comparisons/prompt", response_model=PromptAnswer)(refusable(self.prompt))
        router.post("/v1/preferences", status_code=HTTPStatus.CREATED, **vote)(refusable(self.vote))
        router.post("/v1/preferences/undo", **undo)(refusable(self.undo))
        router.get("/v1/preferences/mine", response_model=Mine)(refusable(self.mine))
        app.include_router(router)

    async def compare(self, request: Request) -> Response:
        """Two answers to one prompt; which version wrote which is told after the vote."""
        asked = parsed(ComparisonRequest, await request.body())
        prompt = as_text(asked.text)
        prompt_ids = await self.encoder.prompt_ids(prompt)
        candidate = await self._candidate() if asked.against == "candidate" else None
        writing = self.comparing.write(asked, prompt_ids, candidate)
        draft = _Draft(_caller(request).name, prompt, prompt_ids)
        if asked.stream:
            first = await anext(writing)  # What is refused now is no stream.
            return StreamingResponse(self._events(first, writing, draft), media_type="text/event-stream")
        async with until_disconnect(request.receive):
            return await self._whole(writing, draft)
        return Response(status_code=HTTPStatus.NO_CONTENT)  # Nobody is there to read it.

    async def prompt(self, request: Request) -> Response:
        """A prompt to compare answers to, drawn from the pairs in the buffer."""
        prompt: Text | None = await self.box.ask("random_prompt")
        if prompt is None:
            raise Refusal(
                "the buffer has no pair yet, and so no prompt: write one yourself",
                status=HTTPStatus.NOT_FOUND,
            )
        return _json(PromptAnswer.of(prompt))

    async def vote(self, request: Request) -> Response:
        """Keep a vote; it waits in quarantine until a round takes it. Answered when it is durable."""
        content = await request.body()
        asked = parsed(PreferenceRequest, content)
        receipt = await self._vote(asked, _ballot(request, content, asked.reason))
        if receipt.is_new:
            count_vote(receipt.kind, receipt.choice)
        return _json(PreferenceAnswer.of(receipt), status=HTTPStatus.CREATED)

    async def undo(self, request: Request) -> Response:
        """Take back one's own vote while it waits."""
        vote_id = parsed(UndoRequest, await request.body()).id
        author = _caller(request).name
        return _json(PreferenceAnswer.of(await self.box.ask("undo_vote", vote_id, author=author)))

    async def mine(self, request: Request) -> Response:
        """What became of the caller's votes."""
        name = _caller(request).name
        tally = await self.box.ask("tally", name)
        versions: list[int] = []
        if tally.rounds:
            versions = await asyncio.to_thread(self.trained.of, name, first_round=min(tally.rounds))
        return _json(Mine.of(tally, versions))

    async def _candidate(self) -> int:
        candidate = (await self.view.get(fresh=True)).candidate  # One may have been offered just now.
        if candidate is None:
            raise Refusal(
                "no candidate is on offer now: compare with against=live, or ask again later",
                status=HTTPStatus.CONFLICT,
                param="against",
            )
        return candidate.version

    async def _kept(self, draft: "_Draft", answers: Answers) -> ComparisonAnswer:
        """The comparison, once it is durable."""
        now_s = time.time()
        expires_at = int(now_s + self.config.comparison_expires_s)
        shown = ShownPair(
            comparison_id=self.ids.new(draft.author, expires_at=expires_at),
            author=draft.author,
            prompt=draft.prompt,
            prompt_ids=draft.prompt_ids,
            first=answers.first,
            second=answers.second,
            expires_at=expires_at,
        )
        await self.box.ask("keep_comparison", shown)
        return ComparisonAnswer.of(shown, created=int(now_s))

    async def _whole(self, writing: AsyncGenerator[Piece | Answers, None], draft: "_Draft") -> Response:
        """The comparison, or why there is none: what is raised here would reach nobody as it is."""
        try:
            async with aclosing(writing):
                *_, answers = [part async for part in writing]
            assert isinstance(answers, Answers)
            return _json(await self._kept(draft, answers))
        except Refusal as refusal:
            return refusal.response()

    async def _events(
        self, first: Piece | Answers, writing: AsyncGenerator[Piece | Answers, None], draft: "_Draft"
    ) -> AsyncGenerator[bytes, None]:
        async with aclosing(writing):
            try:
                yield await self._event(first, draft)
                async for part in writing:
                    yield await self._event(part, draft)
            except Refusal as refusal:
                yield refusal_event(refusal)
        yield b"data: [DONE]\n\n"

    async def _event(self, part: Piece | Answers, draft: "_Draft") -> bytes:
        if isinstance(part, Answers):
            content = (await self._kept(draft, part)).model_dump(exclude_none=True)
        else:
            content = part._asdict()
        return b"data: " + compact_json(content) + b"\n\n"

    async def _vote(self, asked: PreferenceRequest, ballot: Ballot) -> VoteReceipt:
        if asked.comparison_id is not None:
            self.ids.check(asked.comparison_id, ballot.author, now_s=ballot.at)
            return await self.box.ask("vote_on_comparison", ballot, asked.comparison_id, asked.choice)
        if asked.completion_id is not None:
            return await self._thumb(asked, ballot)
        texts = [as_text(text) for text in (asked.prompt, asked.chosen, asked.rejected) if text is not None]
        pair = await self.encoder.pair(*texts)
        live = (await self.view.get()).live  # A vote is as old as the policy that it wants to change.
        return await self.box.ask(
            "vote_on_record", ballot, replace(pair, source="human", policy_version=live)
        )

    async def _thumb(self, asked: PreferenceRequest, ballot: Ballot) -> VoteReceipt:
        for _ in range(_LOOKS - 1):
            try:
                return await self._thumb_once(asked, ballot)
            except Refusal as refusal:
                if refusal.status != HTTPStatus.NOT_FOUND:
                    raise
                await asyncio.sleep(BATCH_S)
        return await self._thumb_once(asked, ballot)

    async def _thumb_once(self, asked: PreferenceRequest, ballot: Ballot) -> VoteReceipt:
        on = (asked.completion_id, asked.index)
        return await self.box.ask("vote_on_completion", ballot, *on, is_good=asked.label)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A comparison without its answers."""

    author: str
    prompt: Text
    prompt_ids: tuple[int, ...]


def _ballot(request: Request, content: bytes, reason: str) -> Ballot:
    key, caller = request.headers.get(_KEY), _caller(request)
    if key is not None and not 0 < len(key) <= _MAX_KEY:
        raise Refusal(f"Idempotency-Key has {len(key)} characters: send 1 to {_MAX_KEY}", param=_KEY)
    return Ballot(
        author=caller.name,
        trust=caller.trust,
        at=time.time(),
        body_sha256=hashlib.sha256(content).hexdigest(),
        idempotency_key=key,
        reason=reason,
    )


def _caller(request: Request) -> Caller:
    return request.state.caller


def _json(answer: BaseModel, *, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(answer.model_dump_json(exclude_none=True), status, media_type="application/json")
