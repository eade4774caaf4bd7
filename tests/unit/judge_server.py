"""A real HTTP server that judges as a test says, fails on demand, and counts."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class JudgeServer:
    """Answers each request with what `respond` makes of its body, after the faults are used up."""

    respond: Callable[[Body], Body]
    faults: list[int | str] = field(default_factory=list)
    """An HTTP status, a body that is no answer, or `slow`: one for each of the next requests."""
    requests: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    most_at_once: int = 0
    delay_s: float = 0.0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: Body, headers: dict[str, str]) -> tuple[int, bytes]:
        with self._lock:
            self.requests.append(body)
            self.headers.append(headers)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            fault = self.faults.pop(0) if self.faults else None
        time.sleep(2.0 if fault == "slow" else self.delay_s)
        with self._lock:
            self._now -= 1
        if isinstance(fault, int):
            return fault, json.dumps({"error": {"message": f"fault {fault} {headers}"}}).encode()
        if fault is not None and fault != "slow":
            return 200, fault.encode()
        return 200, json.dumps(self.respond(body)).encode()


@contextmanager
def serving(server: JudgeServer) -> Iterator[JudgeServer]:
    """On a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, content = server.answer(body, {key.lower(): value for key, value in self.headers.items()})
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda request, client_address: None  # Clients hang up on slow answers.
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def chat(text: str, *, prompt_tokens: int = 100, completion_tokens: int = 10) -> Body:
    """A chat completion as OpenAI's API has it."""
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "fake",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
