"""The names that the policy answers to: `policy`, `policy@live`, and `policy@v12` for one version."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

from serve.refusal import Refusal

SERVED_NAME = "policy"
LIVE_NAME = "policy@live"
_PINNED = re.compile(r"policy@v(0|[1-9][0-9]{0,8})")


def pinned_name(version: int) -> str:
    return f"policy@v{version}"


def asked_version(model: object) -> int | None:
    """The version that a request's `model` names; None: what is live."""
    # No name means the only model. What is no name at all is for the route to refuse.
    if not isinstance(model, str) or model in ("", SERVED_NAME, LIVE_NAME):
        return None
    match = _PINNED.fullmatch(model)
    if match is None:
        raise Refusal(
            f"there is no model {model[:100]!r}: ask for {SERVED_NAME}, {LIVE_NAME} or {pinned_name(12)}",
            status=HTTPStatus.NOT_FOUND,
            param="model",
        )
    return int(match[1])


@dataclass(frozen=True, slots=True)
class Question:
    """A request's body, and the version that it asks for."""

    asked: int | None
    body: bytes
    """As the client sent it."""
    plain: bytes
    """With the one model name that the routes below know."""


def read_question(body: bytes) -> Question:
    try:
        fields = json.loads(body)
    except ValueError:
        return Question(None, body, body)  # For the route to refuse.
    if not isinstance(fields, dict):
        return Question(None, body, body)
    asked = asked_version(fields.get("model"))
    if fields.get("model") in (None, SERVED_NAME):
        return Question(asked, body, body)
    renamed = SERVED_NAME if isinstance(fields["model"], str) else fields["model"]
    return Question(asked, body, json.dumps({**fields, "model": renamed}).encode())


def not_loaded(version: int, loaded: Iterable[int], *, live: int, candidate: int | None) -> Refusal:
    """For a version that no replica holds."""
    notes = {candidate: " (candidate)", live: " (live)"}
    names = ", ".join(f"v{other}{notes.get(other, '')}" for other in sorted(set(loaded))) or "none"
    return Refusal(
        f"{pinned_name(version)} is not loaded: loaded are {names}",
        status=HTTPStatus.NOT_FOUND,
        param="model",
    )
