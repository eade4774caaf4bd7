"""Two replicas under load: every push is proven on both, and no client notices more than a pause."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil

from tests.integration.conftest import wait_for
from tests.integration.live.conftest import VERSIONS, Service

BODY = {"model": "policy", "prompt": "the film", "max_tokens": 60, "ignore_eos": True}


def held(service: Service) -> list[int]:
    return sorted(state["version"] for state in service.policy()["replicas"])


def promote(service: Service, version: int) -> httpx.Response:
    with service.client(admin=True) as client:
        return client.post("/v1/policy/promote", json={"version": version, "reason": "a test"})


def test_requests_of_all_clients_survive_pushes(live: Service) -> None:
    stop, failures, answers = threading.Event(), [], [[] for _ in range(8)]

    def whole(seen: list[int]) -> None:
        with live.client() as client:
            while not stop.is_set():
                answer = client.post("/v1/completions", json=BODY)
                answer.raise_for_status()
                assert answer.json()["usage"]["completion_tokens"] == 60
                seen.append(int(answer.headers["x-policy-version"]))

    def streaming(seen: list[int]) -> None:
        body = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
        with live.client() as client:
            while not stop.is_set():
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    answer.raise_for_status()
                    events = list(parsed(answer))
                assert events[-1]["usage"]["completion_tokens"] == 60
                (spans,) = [event["policy_version_spans"] for event in events if finished(event)]
                assert spans[0]["start"] == 0
                assert spans[-1]["end"] == 60
                seen += [span["version"] for span in spans]

    def client(number: int) -> None:
        try:
            (streaming if number % 2 else whole)(answers[number])
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=client, args=[number]) for number in range(len(answers))]
    for thread in threads:
        thread.start()
    for version in (1, 2, 1, 2):
        time.sleep(2)
        pushed = promote(live, version)
        assert pushed.status_code == 200, pushed.text
        assert held(live) == [version, version]
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {version for seen in answers for version in seen} == {0, 1, 2}


def test_both_replicas_listen_on_the_port_of_their_own(live: Service) -> None:
    there = [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == live.replica_port]
    owners = {c.pid for c in there if c.status == psutil.CONN_LISTEN}
    assert len(owners) == 2
    for _ in range(10):  # A connection each: the kernel gives it to either.
        with live.client() as client:
            answer = client.post(f"http://127.0.0.1:{live.replica_port}/v1/completions", json=BODY)
        assert (answer.status_code, answer.headers["x-policy-version"]) == (200, "0"), answer.text


def parsed(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def finished(event: dict[str, Any]) -> bool:
    return any(choice["finish_reason"] for choice in event["choices"])


def test_a_version_that_cannot_be_proven_is_not_served_and_a_rollback_mends_it(live: Service) -> None:
    refused = promote(live, VERSIONS - 1)
    assert refused.status_code == 409, refused.text
    assert "nats from the learner's" in refused.json()["error"]["message"]
    assert "version 0 is live again" in refused.json()["error"]["message"]
    assert held(live) == [0, 0]
    with live.client() as client:
        assert client.post("/v1/completions", json=BODY).headers["x-policy-version"] == "0"
    event = live.policy()["events"][-1]
    assert (event["kind"], event["version"], event["previous"]) == ("rollback", 0, VERSIONS - 1)


def test_a_candidate_is_served_by_one_replica_and_asked_for_by_its_version(live: Service) -> None:
    live.registry.offer(1, share=0.0)
    try:
        wait_for(lambda: held(live) == [0, 1], timeout_s=60, what="a replica that holds the candidate")
        with live.client() as client:
            for _ in range(8):  # Whichever replica is asked.
                answer = client.post("/v1/completions", json={**BODY, "model": "policy@v1"})
                assert (answer.status_code, answer.headers["x-policy-version"]) == (200, "1"), answer.text
                answer = client.post("/v1/completions", json=BODY)
                assert (answer.status_code, answer.headers["x-policy-version"]) == (200, "0"), answer.text
            missing = client.post("/v1/completions", json={**BODY, "model": "policy@v2"})
            assert missing.status_code == 404
            assert "v0" in missing.json()["error"]["message"]
    finally:
        live.registry.withdraw()
    wait_for(lambda: held(live) == [0, 0], timeout_s=60, what="both replicas at the live version")


def test_a_killed_replica_comes_back_with_what_is_live(live: Service) -> None:
    assert promote(live, 1).status_code == 200
    processes = psutil.Process(live.pid).children(recursive=True)
    next(p for p in processes if "ServeReplica:" in " ".join(_command(p))).kill()
    wait_for(lambda: len(held(live)) < 2, timeout_s=60, what="the death of a replica")
    seen: set[str] = set()

    def whole_again() -> bool:
        with live.client() as client:
            answer = client.post("/v1/completions", json=BODY)
        seen.add(answer.headers.get("x-policy-version", "1"))
        return held(live) == [1, 1]

    wait_for(whole_again, what="two replicas again")
    assert seen == {"1"}


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
