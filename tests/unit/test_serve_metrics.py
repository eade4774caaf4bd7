"""What a scrape says after requests, pushes and moves that are known."""

import asyncio
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Receive, Scope, Send

from dpo_ray.buffer import Tally
from dpo_ray.registry import Candidate
from serve.metrics import AllMetrics, CountedRequests, OwnMetrics, count_push
from serve.placement import Policy
from serve.replica import ReplicaState
from tests.unit.fake_serving import FakeReplicas, LocalBox, replica

BOX: Any = SimpleNamespace(ask=lambda method: asyncio.sleep(0, Tally(3, 2, 1, {0: 2})))


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def get(app: ASGIApp, path: str) -> httpx.Response:
    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport) as client:
            return await client.get(f"http://policy{path}")

    return asyncio.run(request())


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    assert sample("dpo_ray_requests_in_flight") == 1
    if scope["path"] == "/v1/completions":
        headers = [(b"x-policy-version", b"12")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
    elif scope["path"] == "/v1/models":
        raise RuntimeError("broken")
    else:
        await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("path", "labels"),
    [
        ("/v1/completions", {"route": "/v1/completions", "code": "200", "version": "12"}),
        ("/v1/models", {"route": "/v1/models", "code": "500", "version": ""}),
        ("/wp-admin", {"route": "other", "code": "404", "version": ""}),
    ],
)
def test_each_request_counts_once_under_its_route_status_and_version(
    path: str, labels: dict[str, str]
) -> None:
    before = sample("dpo_ray_requests_total", **labels) or 0
    get(CountedRequests(answers), path)
    assert sample("dpo_ray_requests_total", **labels) == before + 1
    assert sample("dpo_ray_requests_in_flight") == 0


def test_a_push_counts_with_the_seconds_of_its_phases() -> None:
    before = [sample("dpo_ray_push_total", outcome="proven") or 0, phase_seconds("load")]
    count_push({"load": 250.0, "prove": 50.0}, "proven")
    after = [sample("dpo_ray_push_total", outcome="proven"), phase_seconds("load")]
    assert after == [before[0] + 1, pytest.approx(before[1] + 0.25)]


def phase_seconds(phase: str) -> float:
    return sample("dpo_ray_push_seconds_sum", phase=phase) or 0.0


def scrape(app: ASGIApp) -> dict[str, dict[str, float]]:
    """Values of one scrape, by metric and replica."""
    families = text_string_to_metric_families(get(app, "/metrics").text)
    return {
        family.name: {sample.labels.get("replica", ""): sample.value for sample in family.samples}
        for family in families
    }


def view_of(live: int, candidate: Candidate | None = None) -> Any:
    async def policy(*, fresh: bool = False) -> Policy:
        return Policy(live, candidate)

    return SimpleNamespace(get=policy)


def test_a_replica_tells_what_is_live_and_what_it_holds() -> None:
    state = replace(replica("a", 11, refuses="stale"), canary_error=0.5)
    seen = scrape(OwnMetrics(answers, lambda: state, view_of(12, Candidate(version=13, share=0.1)), BOX))
    assert seen["dpo_ray_live_version"] == {"": 12}
    assert seen["dpo_ray_candidate_version"] == {"": 13}
    assert seen["dpo_ray_replica_version"] == {"": 11}
    assert seen["dpo_ray_replica_serving"] == {"": 0}
    assert seen["dpo_ray_canary_error_nats"] == {"": 0.5}
    assert seen["dpo_ray_votes_waiting"] == {"": 3}
    assert seen["dpo_ray_votes_released"] == {"": 2}


def test_a_scrape_does_without_the_votes_where_the_buffer_is_away() -> None:
    seen = scrape(OwnMetrics(answers, lambda: replica("a", 12), view_of(12), LocalBox(None)))
    assert seen["dpo_ray_replica_version"] == {"": 12}


def test_without_a_candidate_its_version_is_no_number() -> None:
    seen = scrape(OwnMetrics(answers, lambda: replica("a", 12), view_of(12), BOX))
    assert math.isnan(seen["dpo_ray_candidate_version"][""])


PEER = """# HELP dpo_ray_replica_version The version that a replica holds.
# TYPE dpo_ray_replica_version gauge
dpo_ray_replica_version 11.0
# HELP vllm:queue_total Requests that wait.
# TYPE vllm:queue_total counter
vllm:queue_total{engine="0"} 4.0
"""


def test_one_scrape_has_the_metrics_of_all_replicas_that_can_be_reached() -> None:
    asked: list[tuple[str, list[str]]] = []

    async def get_all(path: str, peers: list[ReplicaState]) -> dict[str, str]:
        asked.append((path, [peer.replica for peer in peers]))
        return {"b": PEER}

    own = replica("a", 12)
    replicas: Any = FakeReplicas([own, replica("b", 11), replica("c", 11)])
    peers: Any = SimpleNamespace(get_all=get_all)
    app = AllMetrics(answers, lambda: own, view_of(12), BOX, replicas, peers)
    seen = scrape(app)
    assert asked == [("/metrics", ["b", "c"])]
    assert seen["dpo_ray_replica_version"] == {"a": 12, "b": 11}
    assert seen["vllm:queue"] == {"b": 4}
    assert 'vllm:queue_total{engine="0",replica="b"} 4.0' in get(app, "/metrics").text
    assert get(app, "/metrics").text.count("# TYPE dpo_ray_replica_version gauge") == 1


def test_only_a_scrape_asks_the_replicas() -> None:
    replicas: Any = FakeReplicas([])
    nothing: Any = SimpleNamespace()
    get(AllMetrics(answers_nothing, lambda: replica("a", 1), nothing, nothing, replicas, nothing), "/health")
    assert replicas.num_asked == 0


async def answers_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})
