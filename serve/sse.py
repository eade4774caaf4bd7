"""Server-sent events as bytes: whole ones out of a stream that is cut anywhere, and their JSON."""

import json
import re
from typing import Any

from serve.refusal import Refusal

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_DATA = b"data:"


class EventSplitter:
    """Gives out each event when its last byte has come."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that end in `chunk`, each with the empty line that ends it."""
        buffered, begin, events = self._rest + chunk, 0, []
        for end in _END.finditer(buffered):
            events.append(buffered[begin : end.end()])
            begin = end.end()
        self._rest = buffered[begin:]
        return events

    def rest(self) -> bytes:
        """What came after the last whole event."""
        return self._rest


def event_json(event: bytes) -> dict[str, Any] | None:
    """The JSON object that the event carries; None for comments, `[DONE]` and whatever else."""
    lines = [line.removeprefix(_DATA) for line in event.splitlines() if line.startswith(_DATA)]
    try:
        content = json.loads(b"\n".join(line.removeprefix(b" ") for line in lines))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def with_json(event: bytes, content: dict[str, Any]) -> bytes:
    """The event with other data; its other lines stay."""
    others = [line for line in event.splitlines() if line and not line.startswith(_DATA)]
    return b"\n".join([*others, b"data: " + compact_json(content)]) + b"\n\n"


def refusal_event(refusal: Refusal) -> bytes:
    """An error in mid-stream, where OpenAI clients look for it."""
    return b"data: " + bytes(refusal.response().body) + b"\n\n"


def compact_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
