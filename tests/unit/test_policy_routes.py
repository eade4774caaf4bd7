"""Promotions, rollbacks and names over HTTP, on a real registry with replicas that do as they are told."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage
from serve.policy_routes import PolicyRoutes
from serve.replica import ReplicaState
from tests.unit.fake_serving import FakeReplicas, replica


@pytest.fixture
def registry(storage: Storage, tmp_path: Path) -> PolicyRegistry:
    """Versions 0 to 2; 1 is live, and 0 was before."""
    registry = PolicyRegistry(storage)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for version in range(3):
        manifest = PolicyManifest(version=version, metrics={"loss": float("nan")})
        registry.publish(tmp_path / "model", manifest)
    registry.promote(0)
    registry.promote(1)
    return registry


def serving(*versions: int) -> list[ReplicaState]:
    return [replica(f"r{i}", version, address="http://10.0.0.1:4000") for i, version in enumerate(versions)]


def send(
    registry: PolicyRegistry, replicas: FakeReplicas, method: str, path: str, **options: Any
) -> httpx.Response:
    app = FastAPI()

    @app.get("/v1/models")
    async def _vllms_own() -> str:
        return "vLLM's"

    async def shown() -> SimpleNamespace:
        card = {"id": "policy", "root": "/home/alice/run", "max_model_len": 48}
        return SimpleNamespace(model_dump=lambda: {"data": [card]})

    app.state.openai_serving_models = SimpleNamespace(show_available_models=shown)
    engine = SimpleNamespace(manifest=registry.manifest(1))
    PolicyRoutes(engine, registry, replicas).mount(app)  # type: ignore[arg-type]

    async def as_alice(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {"caller": SimpleNamespace(name="alice")}}, receive, send)

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(as_alice)) as client:
            return await client.request(method, f"http://policy{path}", **options)

    return asyncio.run(request())


def promote(registry: PolicyRegistry, after: Sequence[Sequence[ReplicaState]], **body: Any) -> httpx.Response:
    replicas = FakeReplicas(serving(1, 1), after=after)
    return send(registry, replicas, "POST", "/v1/policy/promote", json=body)


def test_the_status_is_the_registry_s_and_every_replica_s(registry: PolicyRegistry) -> None:
    registry.offer(2, share=0.1)
    status = send(registry, FakeReplicas(serving(1, 2)), "GET", "/v1/policy").json()
    assert status["version"] == 1
    assert status["manifest"]["version"] == 1
    assert [(state["replica"], state["version"]) for state in status["replicas"]] == [("r0", 1), ("r1", 2)]
    assert status["candidate"] == {"version": 2, "share": 0.1}
    assert [event["version"] for event in status["events"]] == [0, 1]
    assert status["versions"] == [0, 1, 2]
    assert "10.0.0.1" not in str(status)


def test_the_names_are_those_of_the_loaded_versions(registry: PolicyRegistry) -> None:
    states = [*serving(1, 2), replica("r2", 0, refuses="stale")]
    models = send(registry, FakeReplicas(states), "GET", "/v1/models").json()
    assert models["object"] == "list"
    assert [card["id"] for card in models["data"]] == ["policy", "policy@live", "policy@v1", "policy@v2"]
    assert {card["max_model_len"] for card in models["data"]} == {48}
    assert "alice" not in str(models)


def test_a_promotion_is_answered_when_all_have_proven_it_and_names_who_asked(
    registry: PolicyRegistry,
) -> None:
    answer = promote(registry, [serving(2, 2)], version=2, reason="better")
    assert answer.status_code == 200
    assert answer.json()["version"] == 2
    assert registry.live() == 2
    event = registry.events()[-1]
    assert (event.kind, event.by, event.reason) == ("promote", "alice", "better")


def test_where_one_replica_refuses_the_version_before_is_live_again(registry: PolicyRegistry) -> None:
    refused = [replica("r0", 2), replica("r1", 1, refuses="0.5 nats from the learner's")]
    answer = promote(registry, [refused, serving(1, 1)], version=2)
    assert answer.status_code == 409
    message = answer.json()["error"]["message"]
    assert "0.5 nats" in message and "version 1 is live again" in message
    assert registry.live() == 1
    assert [(event.kind, event.version) for event in registry.events()[-2:]] == [
        ("promote", 2),
        ("rollback", 1),
    ]


def test_a_replica_that_still_holds_another_version_is_no_proof(registry: PolicyRegistry) -> None:
    answer = promote(registry, [serving(2, 1), serving(1, 1)], version=2)
    assert answer.status_code == 409
    assert "r1 still holds version 1" in answer.text


def test_no_replica_is_no_proof(registry: PolicyRegistry) -> None:
    answer = promote(registry, [[], []], version=2)
    assert answer.status_code == 409
    assert registry.live() == 1


def test_what_is_live_and_refused_is_not_rolled_back_by_asking_for_it_again(registry: PolicyRegistry) -> None:
    refused = [replica("r0", 0, refuses="stale")]
    answer = promote(registry, [refused], version=1)
    assert answer.status_code == 409
    assert "is live again" not in answer.text
    assert registry.live() == 1
    assert len(registry.events()) == 2


def test_an_unknown_version_is_not_found_and_nothing_moves(registry: PolicyRegistry) -> None:
    answer = promote(registry, [], version=9)
    assert answer.status_code == 404
    assert "there are [0, 1, 2]" in answer.json()["error"]["message"]
    assert registry.live() == 1


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"version": "2"},
        {"version": -1},
        {"version": 2.5},
        {"version": True},
        {"version": None},
        {"version": 2, "force": 1},
        {"version": 2, "reason": 3},
        {"version": 2, "reason": "x" * 1001},
    ],
)
def test_a_body_that_is_not_what_it_should_be_is_refused(registry: PolicyRegistry, body: object) -> None:
    answer = send(registry, FakeReplicas(serving(1)), "POST", "/v1/policy/promote", json=body)
    assert answer.status_code == 422
    assert set(answer.json()["error"]) == {"message", "type", "code", "param"}
    assert registry.live() == 1


@pytest.mark.parametrize("body", [{}, {"version": 0}])
def test_a_rollback_goes_to_the_version_before(registry: PolicyRegistry, body: dict[str, int]) -> None:
    replicas = FakeReplicas(serving(1), after=[serving(0)])
    answer = send(registry, replicas, "POST", "/v1/policy/rollback", json=body)
    assert answer.json()["version"] == 0
    assert registry.events()[-1].kind == "rollback"


def test_a_rollback_with_nothing_before_says_what_to_do(registry: PolicyRegistry) -> None:
    registry.rollback(by="test", reason="")
    answer = send(registry, FakeReplicas(serving(0)), "POST", "/v1/policy/rollback", content=b"")
    assert answer.status_code == 409
    assert "promote the version that you want" in answer.json()["error"]["message"]
