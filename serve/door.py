"""Which routes there are, and who may use which of them, how often."""

from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from dpo_ray.config import ServingConfig
from serve.limits import RequestRates
from serve.page_routes import PAGE_FILES
from serve.refusal import Refusal
from serve.requests import REQUESTS
from serve.tokens import Caller, Role, Tokens, is_loopback


@dataclass(frozen=True, slots=True)
class Route:
    """Who may use a path, by method."""

    method: str
    role: Role | None = "user"
    """The least that may; None: anyone, also where tokens are asked for."""
    weight: int = 1
    """Requests for completions that it counts as."""


_ROUTES: dict[str, tuple[Route, ...]] = {
    **{path: (Route("GET", None),) for path in PAGE_FILES},
    "/health": (Route("GET", None),),
    "/ping": (Route("GET", None),),
    "/version": (Route("GET"),),
    "/metrics": (Route("GET"),),
    "/openapi.json": (Route("GET"),),
    "/v1/models": (Route("GET"),),
    "/v1/policy": (Route("GET"),),
    "/v1/policy/promote": (Route("POST", "admin"),),
    "/v1/policy/rollback": (Route("POST", "admin"),),
    "/v1/comparisons": (Route("POST", "labeler", weight=2),),
    "/v1/comparisons/prompt": (Route("GET", "labeler"),),
    "/v1/preferences": (Route("POST", "labeler"),),
    "/v1/preferences/undo": (Route("POST", "labeler"),),
    "/v1/preferences/mine": (Route("GET", "labeler"),),
    **{path: (Route("POST"),) for path in REQUESTS},
}
_LOCAL = Caller(name="local", role="labeler")
"""Whoever reaches the loopback address, where the run has no tokens."""
_ANYONE = Caller(name="anyone", role="user")


def is_open(path: str, methods: Collection[str]) -> bool:
    """Whether anybody may use a path with one of these methods."""
    return any(route.method in methods for route in _ROUTES.get(path, ()))


def weight_of(path: str) -> int:
    """How many requests for completions a request that was let in counts as."""
    return max(route.weight for route in _ROUTES[path])


class Door:
    """Says which caller stands behind a request that may go on."""

    def __init__(self, settings: ServingConfig, tokens: Tokens) -> None:
        self._settings = settings
        self._tokens = tokens
        self._rates = RequestRates()

    async def open(self, scope: Scope) -> Caller:
        """Refusal: there is no such route, or not for this caller, or not this often."""
        route = _route(scope)
        if route.role is None:
            return _ANYONE
        caller = await self._caller(scope)
        if not caller.may_act_as(route.role):
            raise Refusal(_too_low(caller, route.role), status=HTTPStatus.FORBIDDEN)
        per_minute = caller.requests_per_minute or self._settings.requests_per_minute
        if per_minute is not None:
            who = caller.name if caller is not _LOCAL else str((scope.get("client") or ["unknown"])[0])
            self._rates.spend(who, per_minute=per_minute, weight=route.weight)
        return caller

    async def _caller(self, scope: Scope) -> Caller:
        try:
            asked_for = await self._tokens.asked_for()
        except (ValueError, OSError):
            raise Refusal(
                "the server cannot read its tokens: ask whoever runs it to look at tokens.json",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
            ) from None
        if not asked_for and is_loopback(self._settings.host):
            _check_local(scope)
            return _LOCAL
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        caller = await self._tokens.caller(token.strip()) if scheme.lower() == "bearer" else None
        if caller is None:
            raise Refusal(
                "no valid token: send `Authorization: Bearer TOKEN` (api_key of an OpenAI client)",
                status=HTTPStatus.UNAUTHORIZED,
                headers={"www-authenticate": "Bearer"},
            )
        return caller


def _check_local(scope: Scope) -> None:
    """A replica also listens where other replicas reach it; and browsers can be lured to another name."""
    try:
        asked_for = urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname or ""
    except ValueError:
        asked_for = ""
    reached_at = (scope.get("server") or ["localhost"])[0]
    if not (is_loopback(asked_for) and is_loopback(reached_at)):
        raise Refusal(
            "this server has no tokens and answers to localhost only: use that name, or add tokens",
            status=HTTPStatus.FORBIDDEN,
        )


def _too_low(caller: Caller, role: Role) -> str:
    if caller is _LOCAL:
        return f"this needs an {role}'s token, and the run has none: add one with `python -m serve.tokens`"
    return f"this needs the role {role}, and {caller.name} is {caller.role}: use another token"


def _route(scope: Scope) -> Route:
    routes = _ROUTES.get(scope["path"])
    if routes is None:
        raise Refusal(
            f"there is no {scope['path'][:128]!a}: see README for the routes",
            status=HTTPStatus.NOT_FOUND,
        )
    for route in routes:
        if route.method == scope["method"]:
            return route
    allowed = ", ".join(route.method for route in routes)
    raise Refusal(
        f"{scope['path']} takes {allowed}, not {scope['method'][:16]}",
        status=HTTPStatus.METHOD_NOT_ALLOWED,
        headers={"allow": allowed},
    )
