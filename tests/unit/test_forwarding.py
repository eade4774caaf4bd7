"""A request is answered by a replica that holds the version it asks for, near or far, or by none."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from dpo_ray.registry import Candidate
from serve.forwarding import Forwarding, PeerDoor
from serve.peers import Peers
from serve.placement import Policy
from serve.replica import ReplicaState
from serve.versions import VersionedAnswers
from tests.unit.fake_serving import (
    FakeLLM,
    FakeReplicas,
    completions_app,
    end,
    replica,
    stream_chunks,
    tokens,
)

SECRET = "replicas only"
PATH = "/v1/completions"


async def anything(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("whatever")(scope, receive, send)


class FakeView:
    def __init__(self, live: int, candidate: Candidate | None = None) -> None:
        self.policy = Policy(live, candidate)
        self.fresh = self.policy

    async def get(self, *, fresh: bool = False) -> Policy:
        self.policy = self.fresh if fresh else self.policy
        return self.policy


class Replica:
    """One that can be asked in public, and by its peers on a port of its own."""

    def __init__(self, name: str, version: int, llm: FakeLLM) -> None:
        self.llm = llm
        self.state = replica(name, version)
        self.answers = VersionedAnswers(completions_app(llm), held=lambda: self.state.version)
        self.app: ASGIApp = self.answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)

    def own(self) -> ReplicaState:
        return self.state

    def join(self, replicas: FakeReplicas, view: FakeView) -> None:
        peers: Any = (view, replicas, Peers(SECRET))
        self.app = PeerDoor(Forwarding(self.answers, self.own, *peers), self.answers, self.own, SECRET)


@contextlib.asynccontextmanager
async def listening(app: Callable[..., Any]) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        await task


@contextlib.asynccontextmanager
async def cluster(*members: Replica, view: FakeView) -> AsyncIterator[FakeReplicas]:
    """The members, each with a port of its own."""
    replicas = FakeReplicas([])
    async with contextlib.AsyncExitStack() as stack:
        for member in members:
            member.join(replicas, view)
            address = await stack.enter_async_context(listening(member))
            member.state = replace(member.state, address=address)
            replicas.now.append(member.state)
        yield replicas


async def post(member: Replica, **fields: Any) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.post(member.state.address + PATH, json=fields)


def writes(version: int, text: str = "a") -> FakeLLM:
    return FakeLLM([[tokens(0, text), end(0, "!", (version, 0, 2))]], starts=[(str(version), 0)])


def two() -> tuple[Replica, Replica]:
    return Replica("near", 14, writes(14)), Replica("far", 15, writes(15))


def test_a_pinned_request_reaches_the_replica_that_holds_the_version() -> None:
    async def scenario() -> None:
        near, far = two()
        async with cluster(near, far, view=FakeView(14, Candidate(version=15, share=0.0))):
            answer = await post(near, model="policy@v15", n=1)
            assert answer.headers["x-policy-version"] == "15"
            assert answer.json()["policy_version"] == 15
            assert answer.json()["asked"] == {"model": "policy", "n": 1}
            assert (await post(near, model="policy@v14")).json()["policy_version"] == 14
            assert (await post(far, model="policy")).json()["policy_version"] == 14

    asyncio.run(scenario())


def test_a_version_that_is_nowhere_is_not_found_and_those_that_are_there_are_named() -> None:
    async def scenario() -> None:
        near, far = two()
        async with cluster(near, far, view=FakeView(14, Candidate(version=15, share=0.0))):
            answer = await post(near, model="policy@v12")
            assert answer.status_code == 404
            error = answer.json()["error"]
            assert error["message"] == "policy@v12 is not loaded: loaded are v14 (live), v15 (candidate)"
            assert error["param"] == "model"

    asyncio.run(scenario())


@pytest.mark.parametrize(("share", "version"), [(0.0, 14), (1.0, 15)])
def test_live_traffic_is_answered_by_the_candidate_in_its_share_wherever_it_comes_in(
    share: float, version: int
) -> None:
    async def scenario() -> None:
        near, far = two()
        async with cluster(near, far, view=FakeView(14, Candidate(version=15, share=share))):
            for member in (near, far):
                assert (await post(member)).json()["policy_version"] == version

    asyncio.run(scenario())


def test_what_asks_again_with_the_same_id_is_answered_by_the_same_version() -> None:
    async def scenario() -> None:
        near, far = two()
        async with (
            cluster(near, far, view=FakeView(14, Candidate(version=15, share=0.5))),
            httpx.AsyncClient() as client,
        ):

            async def version(request_id: str) -> str:
                headers = {"x-request-id": request_id}
                answer = await client.post(near.state.address + PATH, json={}, headers=headers)
                return answer.headers["x-policy-version"]

            first = [await version(str(number)) for number in range(16)]
            assert set(first) == {"14", "15"}
            assert [await version(str(number)) for number in range(16)] == first

    asyncio.run(scenario())


def test_a_stream_comes_piece_by_piece_from_the_peer() -> None:
    async def scenario() -> None:
        near, far = two()
        gate = asyncio.Event()
        slow = completions_app(far.llm)

        async def held_back(scope: Any, receive: Any, send: Any) -> None:
            async def send_slowly(message: Any) -> None:
                await send(message)
                if b'"a"' in message.get("body", b""):
                    await gate.wait()

            await slow(scope, receive, send_slowly)

        far.answers = VersionedAnswers(held_back, held=lambda: 15)
        async with cluster(near, far, view=FakeView(14)), httpx.AsyncClient() as client:
            asked = {"model": "policy@v15", "stream": True}
            async with client.stream("POST", near.state.address + PATH, json=asked) as answer:
                assert answer.headers["x-policy-version"] == "15"
                pieces = answer.aiter_text()
                text = await asyncio.wait_for(anext(pieces), timeout=5)
                assert '"a"' in text and "DONE" not in text
                gate.set()
                text += "".join([piece async for piece in pieces])
            assert stream_chunks(text)[-1]["policy_version"] == 15

    asyncio.run(scenario())


def test_a_client_that_hangs_up_ends_the_request_at_the_peer() -> None:
    async def scenario() -> None:
        near, far = two()
        far.llm.scripts = [[tokens(0, "x")] * 1_000_000]
        async with cluster(near, far, view=FakeView(14)), httpx.AsyncClient() as client:
            asked = {"model": "policy@v15", "stream": True}
            async with client.stream("POST", near.state.address + PATH, json=asked) as answer:
                await anext(answer.aiter_raw())
                assert far.llm.closed == 0
            async with asyncio.timeout(5):
                while not far.llm.closed:
                    await asyncio.sleep(0.01)

    asyncio.run(scenario())


@pytest.mark.parametrize("model", ["policy@v14", "policy@v15"])
def test_a_pinned_request_is_refused_where_another_version_comes_in_between(model: str) -> None:
    async def scenario() -> None:
        near, far = Replica("near", 14, writes(16)), Replica("far", 15, writes(16))
        async with cluster(near, far, view=FakeView(14)):
            assert (await post(near, model=model)).status_code == 409
            assert (await post(near)).status_code == 200

    asyncio.run(scenario())


def test_only_who_knows_the_secret_is_answered_as_a_replica_and_only_with_what_is_here() -> None:
    async def scenario() -> None:
        near, far = two()
        async with cluster(near, far, view=FakeView(14)), httpx.AsyncClient() as client:

            async def knock(secret: str, version: str, path: str = PATH) -> int:
                headers = {"x-dpo-ray-peer": secret, "x-dpo-ray-version": version}
                return (await client.post(far.state.address + path, json={}, headers=headers)).status_code

            assert await knock(SECRET, "15") == 200
            assert await knock("guessed", "15") == 403
            assert await knock("", "15") == 403
            assert await knock(SECRET, "14") == 421
            far.answers = anything  # type: ignore[assignment]
            far.join(FakeReplicas([]), FakeView(14))
            assert await knock(SECRET, "15", "/v1/policy/promote") == 404

    asyncio.run(scenario())


def test_replicas_ask_each_other_for_metrics_and_leave_out_who_is_silent() -> None:
    async def scenario() -> None:
        near, far = two()
        far.answers = anything  # type: ignore[assignment]
        async with cluster(near, far, view=FakeView(14)):
            dead = replica("dead", 15, address="http://127.0.0.1:9")
            texts = await Peers(SECRET).get_all("/metrics", [far.state, dead])
            assert texts == {"far": "whatever"}
            assert await Peers("guessed").get_all("/metrics", [far.state]) == {}

    asyncio.run(scenario())


def test_a_peer_that_has_moved_on_sends_the_request_back_and_never_further() -> None:
    async def scenario() -> None:
        near, far = two()
        async with cluster(near, far, view=FakeView(14)) as replicas:
            far.state = replace(far.state, version=16)  # The others still believe that it holds 15.
            answer = await post(near, model="policy@v15")
            assert answer.status_code == 404
            assert near.llm.closed == far.llm.closed == 0
            replicas.now = [near.state, far.state]
            assert "loaded are v14 (live), v16" in (await post(near, model="policy@v15")).text

    asyncio.run(scenario())


def test_right_after_a_promotion_what_was_known_a_moment_ago_fails_nobody() -> None:
    async def scenario() -> None:
        near, far = two()
        view = FakeView(14, Candidate(version=15, share=0.0))
        async with cluster(near, far, view=view):
            view.fresh = Policy(15, None)
            near.state, far.state = replace(near.state, version=15), replace(far.state, version=15)
            answer = await post(near)  # It looks for 14 at the peer first, which holds 15 by now.
            assert answer.status_code == 200

    asyncio.run(scenario())


def test_a_peer_that_is_gone_is_not_found_but_live_requests_are_answered_here() -> None:
    async def scenario() -> None:
        near, far = two()
        async with cluster(near, far, view=FakeView(14, Candidate(version=15, share=1.0))) as replicas:
            replicas.now = [near.state, replace(far.state, address="http://127.0.0.1:9")]
            assert (await post(near, model="policy@v15")).status_code == 404
            assert (await post(near)).json()["policy_version"] == 14

    asyncio.run(scenario())


def test_a_replica_alone_asks_nobody() -> None:
    async def scenario() -> None:
        near, _ = two()
        async with cluster(near, view=FakeView(14)) as replicas:
            assert (await post(near)).json()["policy_version"] == 14
            assert (await post(near, model="policy@v14")).json()["policy_version"] == 14
            assert replicas.num_asked == 0

    asyncio.run(scenario())


def test_a_replica_that_refuses_has_its_requests_answered_by_a_peer_or_says_why() -> None:
    async def scenario() -> None:
        near, far = two()
        async with cluster(near, far, view=FakeView(15)) as replicas:
            near.state = replace(near.state, state="refused", reason="stale weights")
            assert (await post(near)).json()["policy_version"] == 15
            far.state = replace(far.state, state="refused", reason="stale too")
            replicas.now = [near.state, far.state]
            answer = await post(near)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert "stale weights" in answer.text

    asyncio.run(scenario())
