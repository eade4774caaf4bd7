"""The OpenAPI document of the policy: the routes that are open, with the bodies that are taken."""

from typing import Any

from fastapi import FastAPI

from serve.door import is_open
from serve.json_routes import body_schema
from serve.requests import REQUESTS


def close_unused(app: FastAPI) -> None:
    """Take out what no request reaches, and document vLLM's routes with the fields that the guard passes."""
    app.router.routes[:] = [route for route in app.router.routes if _is_open(route)]
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()  # Kept by the app: the second time it is what it was changed to.
        for path, request in REQUESTS.items():
            document["paths"][path]["post"] |= body_schema(request)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _is_open(route: Any) -> bool:
    return is_open(getattr(route, "path", ""), getattr(route, "methods", None) or ())
