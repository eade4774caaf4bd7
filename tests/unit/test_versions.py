"""Answers name the versions that wrote them: whole ones, streams, several choices, failures."""

import asyncio
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve.sse import EventSplitter, event_json, with_json
from serve.versions import PINNED, VersionedAnswers
from tests.unit.fake_serving import FakeLLM, completions_app, end, stream_chunks, tokens

URL = "http://policy/v1/completions"


def ask(llm: FakeLLM, *, pinned: int | None = None, held: int = 7, **fields: Any) -> httpx.Response:
    app = VersionedAnswers(completions_app(llm), held=lambda: held)

    async def with_pin(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {PINNED: pinned}}, receive, send)

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(with_pin)) as client:
            return await client.post(URL, json=fields)

    return asyncio.run(post())


def span(version: int, start: int, stop: int) -> dict[str, int]:
    return {"version": version, "start": start, "end": stop}


def test_a_whole_answer_names_the_versions_of_its_tokens() -> None:
    answer = ask(FakeLLM([[end(0, "ab", (7, 0, 3), (8, 3, 5))]]))
    body = answer.json()
    assert answer.headers["x-policy-version"] == "8"
    assert body["policy_version"] == 8
    assert body["system_fingerprint"] == "policy-v00008"
    assert body["policy_version_spans"] == [span(7, 0, 3), span(8, 3, 5)]
    assert body["choices"][0]["policy_version_spans"] == body["policy_version_spans"]
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_after_a_rollback_the_last_token_s_version_is_the_smaller_one() -> None:
    answer = ask(FakeLLM([[end(0, "ab", (8, 0, 3), (7, 3, 5))]]))
    assert answer.headers["x-policy-version"] == "7"
    assert answer.json()["policy_version"] == 7


def test_choices_of_several_prompts_have_spans_of_their_own() -> None:
    scripts = [
        [end(0, "a", (1, 0, 1)), end(1, "b", (2, 0, 1))],
        [end(0, "c", (3, 0, 1)), end(1, "d", (4, 0, 1))],
    ]
    body = ask(FakeLLM(scripts), prompts=2, n=2).json()
    assert [(choice["text"], choice["policy_version"]) for choice in body["choices"]] == [
        ("a", 1),
        ("b", 2),
        ("c", 3),
        ("d", 4),
    ]
    assert body["policy_version_spans"] == [span(version, 0, 1) for version in (1, 2, 3, 4)]


def test_an_error_says_nothing_of_versions_in_its_body() -> None:
    answer = ask(FakeLLM([]), refused=True)
    assert answer.status_code == 400
    assert answer.json() == {"error": {"message": "no"}}
    assert answer.headers["x-policy-version"] == "7"


SCRIPT = [tokens(0, "finish_reason: \n\ndata: {}"), tokens(0, "é"), end(0, "!", (5, 0, 2), (6, 2, 3))]


@pytest.mark.parametrize("cut", [0, 1, 7, 100_000])
def test_a_stream_names_the_first_version_in_its_header_and_all_in_its_last_chunk(cut: int) -> None:
    answer = ask(FakeLLM([SCRIPT], starts=[("5", 0)]), stream=True, cut=cut)
    chunks = stream_chunks(answer.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "finish_reason: \n\ndata: {}é!"
    assert ["policy_version" in chunk for chunk in chunks] == [False, False, True]
    assert chunks[-1]["policy_version"] == chunks[-1]["choices"][0]["policy_version"] == 6
    assert chunks[-1]["policy_version_spans"] == [span(5, 0, 2), span(6, 2, 3)]
    assert chunks[-1]["system_fingerprint"] == "policy-v00006"
    assert answer.text.endswith("data: [DONE]\n\n")
    # In pieces, all of it had been written when the first was sent.
    assert answer.headers["x-policy-version"] == "5"


def test_the_usage_chunk_sums_up_all_choices() -> None:
    script = [end(1, "b", (2, 0, 1)), end(0, "a", (1, 0, 1))]
    chunks = stream_chunks(ask(FakeLLM([script]), n=2, stream=True, usage=True).text)
    assert [chunk["policy_version"] for chunk in chunks] == [2, 1, 1]
    assert chunks[2]["policy_version_spans"] == [span(1, 0, 1), span(2, 0, 1)]
    assert chunks[2]["usage"] == {"completion_tokens": 1}
    assert chunks[2]["choices"] == []


def test_an_error_in_mid_stream_is_passed_on_as_it_is() -> None:
    answer = ask(FakeLLM([[tokens(0, "a")]], starts=[("5", 0)]), stream=True, fails=True)
    assert answer.headers["x-policy-version"] == "5"
    assert stream_chunks(answer.text)[-1] == {"error": {"message": "broken", "code": 500}}


def test_a_pinned_answer_that_another_version_wrote_is_refused() -> None:
    answer = ask(FakeLLM([[end(0, "ab", (7, 0, 3), (8, 3, 5))]]), pinned=7)
    assert answer.status_code == 409
    assert "policy@v7 was replaced by policy@v8" in answer.json()["error"]["message"]
    assert "ab" not in answer.text


def test_a_pinned_stream_that_another_version_begins_is_refused() -> None:
    answer = ask(
        FakeLLM([[tokens(0, "a"), end(0, "b", (8, 0, 2))]], starts=[("8", 0)]), pinned=7, stream=True
    )
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/json"
    assert "[DONE]" not in answer.text


def test_a_pinned_stream_that_another_version_ends_ends_with_an_error() -> None:
    script = [tokens(0, "a"), end(0, "b", (7, 0, 1), (8, 1, 2))]
    answer = ask(FakeLLM([script], starts=[("7", 0)]), pinned=7, stream=True)
    assert answer.status_code == 200
    assert "policy@v7 was replaced by policy@v8" in stream_chunks(answer.text)[-1]["error"]["message"]


def test_a_pinned_answer_of_that_version_is_given() -> None:
    assert ask(FakeLLM([[end(0, "ab", (7, 0, 3))]]), pinned=7).json()["policy_version"] == 7


STREAM = b'data: {"a": 1}\n\n: wait\r\n\r\ndata: {"b":\r\ndata: 2}\r\n\r\ndata: [DONE]\n\nrest'


@pytest.mark.parametrize("size", range(1, len(STREAM) + 1))
def test_events_are_the_same_however_the_stream_is_cut(size: int) -> None:
    splitter = EventSplitter()
    events = [e for i in range(0, len(STREAM), size) for e in splitter.feed(STREAM[i : i + size])]
    assert b"".join(events) + splitter.rest() == STREAM
    assert [event_json(event) for event in events] == [{"a": 1}, None, {"b": 2}, None]


def test_other_lines_of_an_event_stay() -> None:
    event = b': comment\nid: 4\ndata: {"a": 1}\n\n'
    assert with_json(event, {"a": 2}) == b': comment\nid: 4\ndata: {"a":2}\n\n'
