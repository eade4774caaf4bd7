"""Comparisons and votes over HTTP: real routes and a real buffer, with a policy that answers as scripted."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dpo_ray.buffer import PreferenceBuffer, ServedCompletion, SnapshotQuery, read_snapshot
from dpo_ray.config import SamplingConfig, ServingConfig, VotesConfig
from dpo_ray.models import load_tokenizer
from dpo_ray.registry import Candidate, PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage
from dpo_ray.tokenization import tokenize_prompt
from serve.comparing import Comparing
from serve.comparison_ids import ComparisonIds, run_secret
from serve.encoding import Encoder
from serve.feedback_requests import ComparisonRequest
from serve.feedback_routes import FeedbackRoutes
from serve.guard import Abilities, guarded
from serve.placement import Policy
from serve.settings import ReplicaSettings
from serve.tokens import Tokens
from serve.trained import TrainedVersions
from tests.unit.fake_serving import LocalBox, stream_chunks

VERSIONS = {"policy@live": 4, "policy@v5": 5}
ROUND_0 = SnapshotQuery(max_round=0, min_policy_version=0, limit=9, seed=0)
WORDS = ("dull", "superb")


class Policies:
    """`/v1/completions` as the layers below answer it: a word for each version, or what the test wants."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.words: Callable[[dict[str, Any]], str] = lambda asked: WORDS[asked["seed"] % 2]
        self.refusal = ""
        self.num_open = 0

    async def complete(self, request: Request) -> Response:
        asked = await request.json()
        self.asked.append(asked)
        if self.refusal:
            return JSONResponse({"error": {"message": self.refusal, "code": 404}}, status_code=404)
        return StreamingResponse(self._chunks(asked), media_type="text/event-stream")

    async def _chunks(self, asked: dict[str, Any]) -> AsyncIterator[str]:
        version = VERSIONS[asked["model"]]
        parts = [("it is ", [3, 4], None), (self.words(asked), [5], "stop")]
        self.num_open += 1
        try:
            for text, ids, finish in parts:
                yield self._event(version, text, ids, finish)
                await asyncio.sleep(0)
        finally:
            self.num_open -= 1
        yield "data: [DONE]\n\n"

    def _event(self, version: int, text: str, ids: list[int], finish: str | None) -> str:
        choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": finish}
        choice |= {"policy_version": version} if finish else {}
        logprobs = {"token_logprobs": [-0.5] * len(ids)}
        return f"data: {json.dumps({'choices': [{**choice, 'logprobs': logprobs}]})}\n\n"


class View:
    def __init__(self) -> None:
        self.candidate: Candidate | None = None

    async def get(self, *, fresh: bool = False) -> Policy:
        return Policy(4, self.candidate if fresh else None)


class Service:
    """What clients reach, each with a token."""

    def __init__(self, buffer: PreferenceBuffer, storage: Storage, model: Path, **votes: Any) -> None:
        self.policies, self.view, self.box, tokens = Policies(), View(), LocalBox(buffer), Tokens(storage)
        routes, config = FastAPI(), VotesConfig(**{"min_wait_s": 0, **votes})
        below = Starlette(routes=[Route("/v1/completions", self.policies.complete, methods=["POST"])])
        settings = ReplicaSettings(SamplingConfig(max_new_tokens=9), ServingConfig(), config)
        self.comparing = Comparing(below, settings, context_length=64)
        feedback: dict[str, Any] = {
            "box": self.box,
            "ids": ComparisonIds(run_secret(storage)),
            "encoder": Encoder(load_tokenizer(model), context_length=64),
            "comparing": self.comparing,
            "view": self.view,
            "trained": TrainedVersions(storage, PolicyRegistry(storage)),
            "config": config,
        }
        FeedbackRoutes(**feedback).mount(routes)
        self._app = guarded(routes, ServingConfig(), tokens, Abilities(64, writes_json=True))
        self._tokens = {name: tokens.add(name, "labeler", trust=0.5) for name in ("ann", "bob")}

    def ask(self, method: str, path: str, *, who: str = "ann", key: str = "", **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self._tokens[who]}"} | ({"idempotency-key": key} if key else {})

        async def request() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                content = None if method == "GET" else body
                return await client.request(method, path, json=content, headers=headers)

        return asyncio.run(request())

    def compare(self, **body: Any) -> dict[str, Any]:
        answer = self.ask("POST", "/v1/comparisons", **{"prompt": "the film", **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def vote(self, **body: Any) -> httpx.Response:
        return self.ask("POST", "/v1/preferences", **body)


@pytest.fixture
def buffer(tmp_path: Path) -> PreferenceBuffer:
    return PreferenceBuffer(f"sqlite:///{tmp_path}/buffer.sqlite", Storage(str(tmp_path)))


@pytest.fixture
def service(buffer: PreferenceBuffer, storage: Storage, tiny_model: Path) -> Service:
    return Service(buffer, storage, tiny_model)


def sentence(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["message"]


def test_a_comparison_hides_who_wrote_it_until_the_vote(service: Service, buffer: PreferenceBuffer) -> None:
    shown = service.compare()
    assert {side["text"] for side in (shown["first"], shown["second"])} <= {"it is dull", "it is superb"}
    assert "version" not in json.dumps(shown)
    assert shown["expires_at"] - shown["created"] == 3600
    voted = service.vote(comparison_id=shown["id"], choice="second", reason="warmer")
    assert voted.status_code == 201
    assert voted.json()["versions"] == {"first": 4, "second": 4}
    assert voted.json()["state"] == "quarantined"
    assert buffer.tally("ann").waiting == 1


def test_both_sides_see_the_tokens_that_training_sees_and_sample_as_the_job_does(
    service: Service, tiny_model: Path
) -> None:
    service.compare()
    first, second = service.policies.asked
    assert first["seed"] != second["seed"]
    assert first["prompt"] == list(tokenize_prompt("the film", load_tokenizer(tiny_model)))
    assert (first["max_tokens"], first["temperature"], first["model"]) == (9, 1.0, "policy@live")
    service.compare(max_tokens=3, temperature=0.0, top_p=0.5)
    assert [service.policies.asked[-1][name] for name in ("max_tokens", "temperature", "top_p")] == [
        3,
        0,
        0.5,
    ]


def test_against_the_candidate_each_side_is_written_by_one_and_the_order_is_drawn(service: Service) -> None:
    assert sentence(service.ask("POST", "/v1/comparisons", prompt="the film", against="candidate"))[0] == 409
    service.view.candidate = Candidate(version=5, share=0.0)
    orders = set()
    for _ in range(16):
        shown = service.compare(against="candidate")
        voted = service.vote(comparison_id=shown["id"], choice="tie").json()["versions"]
        assert set(voted.values()) == {4, 5}
        orders.add(voted["first"])
    assert orders == {4, 5}


def test_answers_that_are_the_same_are_marked(service: Service) -> None:
    service.policies.words = lambda asked: "dull"
    assert service.compare()["identical"] is True
    service.policies.words = lambda asked: str(asked["seed"])
    assert "identical" not in service.compare()


def test_a_stream_tells_both_sides_as_they_come_and_ends_with_the_whole(service: Service) -> None:
    answer = service.ask("POST", "/v1/comparisons", prompt="the film", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *pieces, whole = stream_chunks(answer.text)
    for side in ("first", "second"):
        assert "".join(piece["text"] for piece in pieces if piece["side"] == side) == whole[side]["text"]
    assert answer.text.endswith("data: [DONE]\n\n")
    assert service.vote(comparison_id=whole["id"], choice="first").status_code == 201


def test_who_hangs_up_ends_both_answers(service: Service) -> None:
    async def scenario() -> None:
        request = ComparisonRequest(prompt="the film")
        writing = service.comparing.write(request, (1, 2), None)
        await anext(writing)
        assert service.policies.num_open > 0
        await writing.aclose()
        assert service.policies.num_open == 0

    asyncio.run(scenario())


def test_what_the_policy_refuses_is_refused(service: Service) -> None:
    service.policies.refusal = "policy@live is not loaded"
    for stream in (False, True):
        answer = service.ask("POST", "/v1/comparisons", prompt="the film", stream=stream)
        assert sentence(answer) == (404, "policy@live is not loaded")


def test_no_id_is_given_out_for_what_is_not_kept(service: Service) -> None:
    service.box.buffer = None
    assert service.ask("POST", "/v1/comparisons", prompt="the film").status_code == 503
    answer = service.ask("POST", "/v1/comparisons", prompt="the film", stream=True)
    assert "cmp-" not in answer.text
    assert '"code":503' in answer.text


def test_ids_that_are_made_up_anothers_or_old_are_told_apart_without_the_buffer(
    service: Service, buffer: PreferenceBuffer, storage: Storage, tiny_model: Path
) -> None:
    own = service.compare()["id"]
    ids = ComparisonIds(run_secret(storage))
    old = ids.new("ann", expires_at=1)
    service.box.buffer = None
    plain = own.rsplit(".", 2)[0]
    for made_up in ("cmp-1", "x", own[:-3] + "...", f"{plain}x.{'0' * 32}.{'0' * 32}", "é" * 9):
        assert service.vote(comparison_id=made_up, choice="first").status_code in (403, 404), made_up
    assert service.vote(comparison_id="cmp-ff.aa.bb.cc", choice="first").status_code == 404
    assert service.vote(who="bob", comparison_id=own, choice="first").status_code == 403
    assert service.vote(comparison_id=old, choice="first").status_code == 410
    assert service.vote(comparison_id=own, choice="first").status_code == 503


def test_the_secret_is_the_runs_own_and_nobody_elses(storage: Storage, tmp_path: Path) -> None:
    assert run_secret(storage) == run_secret(Storage(str(tmp_path)))
    assert run_secret(storage) != run_secret(Storage(str(tmp_path / "another")))
    assert (tmp_path / "comparisons.key").stat().st_mode & 0o777 == 0o600


def test_a_vote_sent_again_is_answered_as_before_and_another_is_a_conflict(service: Service) -> None:
    shown = service.compare()["id"]
    first = service.vote(key="k", comparison_id=shown, choice="first")
    assert service.vote(key="k", comparison_id=shown, choice="first").json() == first.json()
    assert service.vote(comparison_id=shown, choice="first").json() == first.json()
    assert sentence(service.vote(key="k", comparison_id=shown, choice="tie"))[0] == 409
    assert sentence(service.vote(comparison_id=shown, choice="tie"))[0] == 409
    assert sentence(service.vote(key="k" * 257, comparison_id=shown, choice="first"))[0] == 400


def test_a_record_gets_the_tokens_of_the_policy_and_the_age_of_what_is_live(
    service: Service, buffer: PreferenceBuffer, storage: Storage, tiny_model: Path
) -> None:
    record = {"prompt": "the film", "chosen": " is superb .", "rejected": " is dull ."}
    assert service.vote(**record).json()["versions"] == {}
    assert buffer.release(0, VotesConfig(min_wait_s=0)).released == 1
    (pair,) = read_snapshot(storage, buffer.declare_snapshot(ROUND_0, live_version=4))
    assert (pair.author, pair.source, pair.policy_version) == ("ann", "human", 4)
    tokenizer = load_tokenizer(tiny_model)
    assert pair.chosen_ids[-1] == tokenizer.eos_token_id
    assert str(tokenizer.decode([*pair.chosen_ids[:-1]])).split() == ["is", "superb", "."]
    turns = {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
        for name, text in record.items()
    }
    status, why = sentence(service.vote(who="bob", **turns))
    assert (status, "chat template leaves out what the assistant says" in why) == (422, True)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"comparison_id": "cmp-1"}, 400),
        ({"comparison_id": "cmp-1", "choice": "left"}, 400),
        ({"comparison_id": "cmp-1", "choice": "first", "label": True}, 400),
        ({"comparison_id": "cmp-1", "choice": "first", "index": 0}, 400),
        ({"completion_id": "chatcmpl-1"}, 400),
        ({"completion_id": "chatcmpl-1", "label": "yes"}, 400),
        ({"prompt": "a", "chosen": "b"}, 400),
        ({"prompt": "a", "chosen": "b" * 5000, "rejected": "c"}, 400),
        ({"prompt": "", "chosen": " is bad", "rejected": " is dull"}, 422),
        ({"prompt": "the film", "chosen": " is bad", "rejected": " is bad"}, 422),
        ({"prompt": "the film", "chosen": " ", "rejected": " is bad"}, 422),
        ({"prompt": "the film", "chosen": "the " * 80, "rejected": " is bad"}, 422),
        ({"comparison_id": "cmp-1", "choice": "first", "reason": "x" * 1001}, 400),
        ({"comparison_id": "cmp-1", "choice": "first", "trust": 1}, 400),
    ],
)
def test_a_body_that_says_no_vote_is_refused(service: Service, body: dict[str, Any], status: int) -> None:
    answer = service.vote(**body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_a_thumb_waits_for_a_completion_that_is_not_kept_yet(
    service: Service, buffer: PreferenceBuffer
) -> None:
    completion = ServedCompletion("cmpl-1", 0, "ann", "the film", (1,), "is bad", (2, 3), None, 4)
    asks: list[str] = []
    ask = service.box.ask

    async def kept_in_between(method: str, *args: Any, **options: Any) -> Any:
        asks.append(method)
        if len(asks) == 2:
            buffer.keep_served([completion], most=9)
        return await ask(method, *args, **options)

    service.box.ask = kept_in_between  # type: ignore[method-assign]
    voted = service.vote(completion_id="cmpl-1", label=False)
    assert (voted.status_code, voted.json()["versions"]) == (201, {"completion": 4})
    assert service.vote(who="bob", completion_id="cmpl-1", label=True).status_code == 403


def test_the_document_describes_bodies_and_answers(service: Service) -> None:
    text = service.ask("GET", "/openapi.json").text
    assert "#/$defs" not in text
    paths = json.loads(text)["paths"]
    body = paths["/v1/preferences"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"comparison_id", "completion_id", "chosen"} <= body["properties"].keys()
    assert "201" in paths["/v1/preferences"]["post"]["responses"]


def test_a_vote_is_undone_by_who_gave_it(service: Service) -> None:
    vote = service.vote(comparison_id=service.compare()["id"], choice="first").json()["id"]
    assert service.ask("POST", "/v1/preferences/undo", who="bob", id=vote).status_code == 403
    assert service.ask("POST", "/v1/preferences/undo", id=vote).json()["state"] == "withdrawn"
    assert service.ask("POST", "/v1/preferences/undo", id="vote-1").status_code == 404


def test_people_see_which_versions_were_trained_on_their_votes(
    service: Service, buffer: PreferenceBuffer, storage: Storage, tmp_path: Path
) -> None:
    service.policies.words = lambda asked: str(asked["seed"])
    service.vote(comparison_id=service.compare()["id"], choice="first")
    registry = PolicyRegistry(storage)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for round_ in range(2):
        buffer.release(round_, VotesConfig(min_wait_s=0))
        query = ROUND_0.model_copy(update={"max_round": round_})
        buffer.declare_snapshot(query, live_version=4)
    registry.publish(tmp_path / "model", PolicyManifest(version=1))
    service.vote(comparison_id=service.compare()["id"], choice="both_bad")
    mine = service.ask("GET", "/v1/preferences/mine").json()
    assert mine == {
        "votes": 2,
        "waiting": 1,
        "released": 1,
        "refused": 0,
        "rounds": [{"round": 0, "pairs": 1}],
        "versions": [1],
    }
    registry.publish(tmp_path / "model", PolicyManifest(version=2))
    assert service.ask("GET", "/v1/preferences/mine").json()["versions"] == [1, 2]
    assert service.ask("GET", "/v1/preferences/mine", who="bob").json()["versions"] == []


def test_a_prompt_comes_from_the_buffer_or_there_is_none(service: Service, buffer: PreferenceBuffer) -> None:
    assert sentence(service.ask("GET", "/v1/comparisons/prompt"))[0] == 404
    service.policies.words = lambda asked: str(asked["seed"])
    messages = [{"role": "user", "content": "the film"}]
    shown = service.ask("POST", "/v1/comparisons", messages=messages).json()
    service.vote(comparison_id=shown["id"], choice="first")
    buffer.release(0, VotesConfig(min_wait_s=0))
    assert service.ask("GET", "/v1/comparisons/prompt").json() == {"messages": messages}
