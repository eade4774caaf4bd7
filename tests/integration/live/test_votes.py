"""People compare and vote on two replicas that share a buffer, which is killed in between."""

import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from dpo_ray.storage import Storage
from serve.comparison_ids import ComparisonIds, run_secret
from tests.integration.conftest import processes_below, wait_for
from tests.integration.live.conftest import Service
from tests.integration.live.test_replicas import held

PROMPT = "the film was"


@dataclass(frozen=True)
class Person:
    """A labeler; each request is a connection of its own, which the proxy gives to either replica."""

    url: str
    token: str

    def ask(self, method: str, path: str, *, key: str = "", **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.token}"} | ({"idempotency-key": key} if key else {})
        content = None if method == "GET" else body
        return httpx.request(method, self.url + path, json=content, headers=headers, timeout=60)

    def compare(self, **body: Any) -> dict[str, Any]:
        answer = self.ask("POST", "/v1/comparisons", **{"prompt": PROMPT, "max_tokens": 12, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def vote(self, *, key: str = "", **body: Any) -> httpx.Response:
        return self.ask("POST", "/v1/preferences", key=key, **body)

    def mine(self) -> dict[str, Any]:
        return self.ask("GET", "/v1/preferences/mine").raise_for_status().json()


@pytest.fixture
def people(live: Service) -> tuple[Person, Person]:
    lea, lou = (Person(live.base_url, token) for token in live.labelers)
    return lea, lou


def test_a_comparison_is_voted_on_and_undone_wherever_the_requests_arrive(
    live: Service, people: tuple[Person, Person]
) -> None:
    lea, lou = people
    before = lea.mine()["waiting"]
    shown = lea.compare(messages=[{"role": "user", "content": PROMPT}], prompt=None)
    assert shown["first"]["text"] and shown["first"]["text"] != shown["second"]["text"]
    votes = [lea.vote(key="k", comparison_id=shown["id"], choice="first") for _ in range(4)]
    assert {vote.status_code for vote in votes} == {201}
    assert [vote.json() for vote in votes] == [votes[0].json()] * 4
    assert votes[0].json()["versions"] == {"first": 0, "second": 0}
    assert lea.vote(comparison_id=shown["id"], choice="second").status_code == 409
    assert lou.vote(comparison_id=shown["id"], choice="first").status_code == 403
    old = ComparisonIds(run_secret(Storage(str(live.run_dir)))).new("lea", expires_at=int(time.time()) - 1)
    assert lea.vote(comparison_id=old, choice="first").status_code == 410
    assert lea.mine()["waiting"] == before + 1
    assert lea.ask("POST", "/v1/preferences/undo", id=votes[0].json()["id"]).json()["state"] == "withdrawn"
    assert lea.mine()["waiting"] == before
    with live.client() as user:
        assert user.post("/v1/comparisons", json={"prompt": PROMPT}).status_code == 403


def test_a_stream_shows_both_answers_as_they_grow(live: Service, people: tuple[Person, Person]) -> None:
    text = people[0].ask("POST", "/v1/comparisons", prompt=PROMPT, max_tokens=12, stream=True).text
    assert text.count('"side":"first"') > 2 < text.count('"side":"second"')
    assert '"object":"comparison"' in text
    assert text.endswith("data: [DONE]\n\n")


def test_thumbs_mean_what_was_served_to_this_person(live: Service, people: tuple[Person, Person]) -> None:
    lea, lou = people
    chat = lea.ask(
        "POST", "/v1/chat/completions", messages=[{"role": "user", "content": PROMPT}], n=2, max_tokens=6
    ).json()
    text = lea.ask("POST", "/v1/completions", prompt=[PROMPT, "the songs"], max_tokens=6, stream=True).text
    stream_id = text.partition('"id":"')[2].partition('"')[0]
    for completion_id, index, label in ((chat["id"], 1, True), (stream_id, 1, False)):
        voted = lea.vote(completion_id=completion_id, index=index, label=label)
        assert voted.status_code == 201, voted.text
        assert voted.json()["versions"] == {"completion": 0}
        assert lou.vote(completion_id=completion_id, index=index, label=label).status_code == 403
    assert lea.vote(completion_id=chat["id"], index=2, label=True).status_code == 404


def test_against_a_candidate_both_versions_write(live: Service, people: tuple[Person, Person]) -> None:
    lea, _ = people
    assert lea.ask("POST", "/v1/comparisons", prompt=PROMPT, against="candidate").status_code == 409
    live.registry.offer(1, share=0.0)
    try:
        wait_for(lambda: held(live) == [0, 1], timeout_s=60, what="a replica that holds the candidate")
        for _ in range(4):  # Whichever replica is asked.
            shown = lea.compare(against="candidate")
            versions = lea.vote(comparison_id=shown["id"], choice="tie").json()["versions"]
            assert sorted(versions.values()) == [0, 1]
    finally:
        live.registry.withdraw()
    wait_for(lambda: held(live) == [0, 0], timeout_s=60, what="both replicas at the live version")


def test_no_vote_is_lost_or_doubled_while_the_buffer_is_killed(
    live: Service, people: tuple[Person, Person]
) -> None:
    _, lou = people
    before = lou.mine()["waiting"]
    answers: list[int] = []

    def vote(worker: int) -> None:
        for number in range(8):
            record = {"chosen": f"{'so ' * number}superb", "rejected": "dull " * (worker + 1)}
            answers.append(lou.vote(prompt=PROMPT, **record).status_code)

    workers = [threading.Thread(target=vote, args=[worker]) for worker in range(4)]
    for worker in workers:
        worker.start()
    for _ in range(2):
        alive = len(answers)
        wait_for(lambda: buffers(live), what="the buffer's process")
        buffers(live)[-1].kill()
        wait_for(lambda alive=alive: len(answers) > min(alive + 4, 31), timeout_s=60, what="votes again")
    for worker in workers:
        worker.join()
    assert answers == [201] * 32
    assert lou.mine()["waiting"] == before + 32
    with live.client() as user:
        assert 'dpo_ray_votes_total{choice="chosen",kind="record"' in user.get("/metrics").text


def buffers(service: Service) -> list[psutil.Process]:
    """Its process; none for the moment in which it starts again."""
    return processes_below(service.pid, "ray::PreferenceBuffer")
