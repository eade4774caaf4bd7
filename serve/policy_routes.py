"""The policy itself over HTTP: what is live where, what it is called, and how another version goes live."""

import asyncio
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from dpo_ray.registry import Candidate, PolicyEvent, PolicyManifest, PolicyRegistry
from serve.json_routes import body_schema, caller_name, parsed, refusable
from serve.models import LIVE_NAME, SERVED_NAME, pinned_name
from serve.refusal import Refusal
from serve.replica import Replicas, ReplicaState

_EVENTS_SHOWN = 20
_ROLLED_BACK_BY = "policy"


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    reason: str = Field(default="", max_length=1000)


class Promotion(_Order):
    """Body of `POST /v1/policy/promote`."""

    version: int = Field(ge=0)


class Rollback(_Order):
    """Body of `POST /v1/policy/rollback`; without a version: to the one that was live before."""

    version: int | None = Field(default=None, ge=0)


class PolicyStatus(BaseModel):
    """Body of `GET /v1/policy`."""

    model_config = ConfigDict(ser_json_inf_nan="null")

    version: int | None
    """What is live."""
    manifest: PolicyManifest
    """Of the version that the answering replica holds."""
    replicas: list[ReplicaState]
    candidate: Candidate | None
    events: list[PolicyEvent]
    """The latest promotions and rollbacks, oldest first."""
    versions: list[int]
    """All that can be promoted."""


class Moved(BaseModel):
    """Answer to a promotion or rollback that every replica has proven."""

    version: int
    event: PolicyEvent
    replicas: list[ReplicaState]


class PolicyRoutes:
    """The routes of one replica, over the registry that all of them follow."""

    def __init__(self, engine: Any, registry: PolicyRegistry, replicas: Replicas) -> None:
        self._engine = engine
        self._registry = registry
        self._replicas = replicas
        self._moving = asyncio.Lock()

    def mount(self, app: FastAPI) -> None:
        """Add the routes to vLLM's application; `/v1/models` takes the place of its own."""
        app.router.routes[:] = [
            route for route in app.router.routes if getattr(route, "path", None) != "/v1/models"
        ]
        router = APIRouter()
        router.get("/v1/policy", response_model=PolicyStatus)(self.status)
        router.get("/v1/models")(self.models)
        router.post("/v1/policy/promote", response_model=Moved, openapi_extra=body_schema(Promotion))(
            refusable(self.promote)
        )
        router.post("/v1/policy/rollback", response_model=Moved, openapi_extra=body_schema(Rollback))(
            refusable(self.rollback)
        )
        app.include_router(router)

    async def status(self) -> Response:
        """The live version, its manifest, and what each replica holds."""
        status = PolicyStatus(
            version=await asyncio.to_thread(self._registry.live),
            manifest=self._engine.manifest,
            replicas=await self._replicas.states(fresh=True),
            candidate=await asyncio.to_thread(self._registry.candidate),
            events=(await asyncio.to_thread(self._registry.events))[-_EVENTS_SHOWN:],
            versions=await asyncio.to_thread(self._registry.versions),
        )
        return _json(status)

    async def models(self, request: Request) -> JSONResponse:
        """The names that requests may give as `model`: now."""
        listed = await request.app.state.openai_serving_models.show_available_models()
        card = listed.model_dump()["data"][0]
        states = await self._replicas.states()
        loaded = sorted({state.version for state in states if state.state == "serving"})
        names = [SERVED_NAME, LIVE_NAME, *map(pinned_name, loaded)]
        # vLLM's root is a folder of the server.
        cards = [{**card, "id": name, "root": SERVED_NAME} for name in names]
        return JSONResponse({"object": "list", "data": cards})

    async def promote(self, request: Request) -> Response:
        """Make a version live; answered when every replica has proven it."""
        order = parsed(Promotion, await request.body())
        await self._check_known(order.version)
        async with self._moving:
            before = await asyncio.to_thread(self._registry.live)
            event = await asyncio.to_thread(
                self._registry.promote, order.version, by=caller_name(request), reason=order.reason
            )
            return await self._settle(event, before)

    async def rollback(self, request: Request) -> Response:
        """Make an earlier version live again; answered when every replica has proven it."""
        order = parsed(Rollback, await request.body())
        if order.version is not None:
            await self._check_known(order.version)
        async with self._moving:
            before = await asyncio.to_thread(self._registry.live)
            try:
                event = await asyncio.to_thread(
                    self._registry.rollback, order.version, by=caller_name(request), reason=order.reason
                )
            except ValueError as error:
                raise Refusal(str(error), status=HTTPStatus.CONFLICT, param="version") from None
            return await self._settle(event, before)

    async def _check_known(self, version: int) -> None:
        if not await asyncio.to_thread(self._registry.has, version):
            kept = await asyncio.to_thread(self._registry.versions)
            raise Refusal(
                f"there is no version {version}: there are {kept}",
                status=HTTPStatus.NOT_FOUND,
                param="version",
            )

    async def _settle(self, event: PolicyEvent, before: int | None) -> Response:
        """Have all replicas hold what is live; where one refuses, what was live before is live again."""
        states = await self._replicas.converge()
        complaints = [
            state.reason or f"{state.replica} still holds version {state.version}"
            for state in states
            if state.state == "refused" or state.version != event.version
        ]
        if states and not complaints:
            return _json(Moved(version=event.version, event=event, replicas=states))
        reason = "; ".join(complaints) or "no replica answered"
        message = f"version {event.version} is not proven by every replica: {reason}"
        if before not in (None, event.version):
            await asyncio.to_thread(self._registry.rollback, before, by=_ROLLED_BACK_BY, reason=message)
            await self._replicas.converge()
            message += f"; version {before} is live again"
        raise Refusal(message, status=HTTPStatus.CONFLICT, param="version")


def _json(answer: BaseModel) -> Response:
    # The address of a replica's own port is nothing for clients.
    text = answer.model_dump_json(exclude={"replicas": {"__all__": {"address"}}})
    return Response(text, media_type="application/json")
