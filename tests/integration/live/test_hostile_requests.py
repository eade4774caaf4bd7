"""A served policy answers whatever is sent to it with a reason, and goes on."""

import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx

from tests.integration.live.conftest import Service

CASES = 400
CHAT, COMPLETION, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
HELLO = {"role": "user", "content": "the film"}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 20, 21, 64, 65, 128, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63),
    10**400, 0.0, -0.0, 0.5, 1.0, 1e-300, 5e-324, 2.0, 1e308, float("nan"), float("inf"),
    "", " ", "a", "\0", "\ud800", "\u202e", "x" * 300, "the film " * 200, "<pad>", "{% for %}",
    "policy@v0", [], [0], [1, 1], [81], [82], [2**31 - 1], [-1], [[]], [[1], [2]], [[1] * 129], ["a", "b"],
    ["", "a"],
    [None], {}, {"5": 1}, {"82": 1}, {"type": "json_object"}, {"type": "text"}, {"include_usage": True},
    [HELLO], [HELLO, {"role": "assistant", "content": ""}], [{"role": "tool"}],
    [{"role": "user", "content": [{}]}],
]  # fmt: skip
FIELDS = {
    CHAT: [
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "chat_template",
        "tools",
        "add_generation_prompt",
    ],
    COMPLETION: ["prompt", "echo", "best_of", "suffix", "prompt_embeds", "structured_outputs", "min_p"],
    TOKENIZE: ["prompt", "messages", "return_token_strs", "add_special_tokens"],
    DETOKENIZE: ["tokens", "model"],
}
COMMON = [
    "model", "n", "max_tokens", "min_tokens", "stream", "stream_options", "seed", "temperature", "top_p",
    "top_k", "repetition_penalty", "presence_penalty", "logit_bias", "logprobs", "stop", "stop_token_ids",
    "ignore_eos", "response_format", "prompt_logprobs", "priority", "vllm_xargs", "return_token_ids",
    "user", "unheard_of",
]  # fmt: skip
EDGES: dict[str, list[Any]] = {
    "n": [1, 64], "max_tokens": [1, 128], "min_tokens": [0, 4], "seed": [-(2**63) + 1, 2**63 - 1],
    "temperature": [0, 5e-324, 2], "top_p": [1e-300, 1], "top_k": [-1, 2**31 - 1], "min_p": [0, 1],
    "repetition_penalty": [1e-300, 10], "presence_penalty": [-2, 2],
    "logit_bias": [{"0": -100, "5": 100}, {"99999": 1}], "stop_token_ids": [[0, 5], [2**31 - 1]],
    "stream": [True], "stop": ["a", ["x" * 256] * 16], "echo": [True],
    "prompt": [[0], [5] * 128, "a" * 8192, "\u202e\U0001f600"], "tokens": [[], [2**31 - 1] * 128],
    "messages": [[HELLO] * 256, [{"role": "assistant", "content": "a"}]], "logprobs": [0, 20, True],
    "ignore_eos": [True], "return_token_ids": [True], "model": ["policy@live", "policy@v99"], "user": [""],
}  # fmt: skip
"""The largest and smallest that the guard lets through, for the engine to cope with."""
STARTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [HELLO], "max_tokens": 4},
    COMPLETION: {"prompt": "the film", "max_tokens": 4},
    TOKENIZE: {"prompt": "the film"},
    DETOKENIZE: {"tokens": [5, 6]},
}


def hostile(seed: int) -> Iterator[tuple[str, bytes]]:
    """A path, and a body that is a good one with one or two hostile fields, and sometimes damaged."""
    draw = random.Random(seed)
    for _ in range(CASES):
        path = draw.choice([CHAT, CHAT, COMPLETION, COMPLETION, TOKENIZE, DETOKENIZE])
        names = FIELDS[path] + (COMMON if path in (CHAT, COMPLETION) else [])
        names = [name for name in names if name in EDGES or draw.random() < 0.3]
        pool = draw.choice([EDGES, EDGES, {}])
        wrong = {name: draw.choice(pool.get(name, VALUES)) for name in draw.sample(names, draw.randint(1, 2))}
        content = bytearray(json.dumps({**STARTS[path], **wrong}).encode())
        if draw.random() < 0.1:
            content[draw.randrange(len(content))] = draw.randrange(256)
        yield path, bytes(content)


def works(service: Service) -> None:
    with service.client() as client:
        answer = client.post(COMPLETION, json={"prompt": "the film", "max_tokens": 3, "model": "policy"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-policy-version"] == str(service.registry.live())


def test_no_content_makes_a_server_error(live: Service) -> None:
    replicas = {state["replica"] for state in live.policy()["replicas"]}
    statuses: dict[int, int] = {}
    with live.client() as client:
        for path, content in hostile(seed=0):
            answer = client.post(path, content=content, headers={"content-type": "application/json"})
            assert answer.status_code < 500, (path, content, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"], (path, content)
            else:
                assert '"error"' not in answer.text, (path, content, answer.text)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
    assert statuses[200] > CASES // 10 < statuses[400], statuses
    assert {state["replica"] for state in live.policy()["replicas"]} == replicas  # None was replaced.
    works(live)


def test_who_has_no_right_hears_so_through_the_proxy(live: Service) -> None:
    with httpx.Client(base_url=live.base_url) as nobody, live.client() as user:
        assert nobody.get("/health").status_code == 200
        assert nobody.post(COMPLETION, json={"prompt": "a"}).status_code == 401
        assert user.post("/v1/policy/rollback", json={}).status_code == 403
        assert user.post("/collective_rpc", json={}).status_code == 404
        wrong_method = user.delete("/v1/models")
        assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "GET")


def request(service: Service, *headers: str) -> bytes:
    lines = [f"POST {COMPLETION} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
    return "\r\n".join([*lines, f"authorization: Bearer {service.user}", *headers, "", ""]).encode()


def status_of(sent: socket.socket) -> int:
    return int(sent.makefile("rb").readline().split()[1])


def test_a_body_that_is_too_large_or_too_slow_is_not_waited_for(live: Service) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as large:
        large.sendall(request(live, f"content-length: {2 << 20}") + b"{")
        assert status_of(large) == 413
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as slow:
        slow.sendall(request(live, "content-length: 100") + b'{"prompt":')
        assert status_of(slow) == 408
    assert 9 < time.monotonic() - started < 20
    works(live)


def test_clients_that_hang_up_leave_nothing_behind(live: Service) -> None:
    body = json.dumps(
        {"prompt": "the", "max_tokens": 120, "ignore_eos": True, "stream": True, "n": 8}
    ).encode()
    streams = []
    for _ in range(40):
        stream = socket.create_connection(("127.0.0.1", live.port), timeout=30)
        stream.sendall(request(live, f"content-length: {len(body)}") + body)
        streams.append(stream)
    assert {status_of(stream) for stream in streams} == {200}
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + 10
    while running(live):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    works(live)


def running(service: Service) -> float:
    """Sequences that the engines work on."""
    with service.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def test_the_document_has_the_open_routes_with_the_fields_that_are_taken(live: Service) -> None:
    with live.client(admin=True) as client:
        paths = client.get("/openapi.json").raise_for_status().json()["paths"]
        answers = [client.request(method, path) for path, methods in paths.items() for method in methods]
    assert {CHAT, COMPLETION, TOKENIZE, DETOKENIZE, "/v1/policy", "/v1/preferences"} <= paths.keys()
    assert 405 not in [answer.status_code for answer in answers]
    assert not any("see README for the routes" in answer.text for answer in answers)
    chat = paths[CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert chat["additionalProperties"] is False
    assert "tools" not in chat["properties"]
