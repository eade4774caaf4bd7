"""What routes of our own share: bodies by a schema, the caller, and refusals as answers."""

import functools
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ValidationError

from serve.refusal import Refusal

Body = TypeVar("Body", bound=BaseModel)


def parsed(body_type: type[Body], content: bytes) -> Body:
    """Refusal: the body is not as its schema says."""
    try:
        return body_type.model_validate_json(content or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refusal(
            f"{where or 'the body'}: {first['msg']}",
            status=HTTPStatus.UNPROCESSABLE_ENTITY,
            param=where or None,
        ) from None


def caller_name(request: Request) -> str:
    caller = getattr(request.state, "caller", None)
    return "anonymous" if caller is None else caller.name


def body_schema(body_type: type[BaseModel]) -> dict[str, Any]:
    """What /openapi.json says of a body."""
    schema = body_type.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """With each definition in its place: the document has no room for those of one body."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(value, definitions) for name, value in schema.items()}


def refusable(route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """A refusal is the route's answer, before vLLM's handlers take it for a failure of the server."""

    @functools.wraps(route)
    async def answer(request: Request) -> Response:
        try:
            return await route(request)
        except Refusal as refusal:
            return refusal.response()

    return answer
