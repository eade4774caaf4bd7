"""Answers come back in order and once, whichever replica dies; a refusal is told apart from a death."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_cluster import FakeBroadcast, FakeResponse, StaleWeightsError
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle

from dpo_ray.sampler import Answer, RefusedError, Sampler, SamplerError
from dpo_ray.types import Prompt

PROMPTS = [Prompt(f"prompt {number}", (number,)) for number in range(7)]
PARAMS = {"n": 2}


class EngineDeadError(RuntimeError):
    """As vLLM's is called."""


def answers(prompts: list[list[int]], seeds: list[int], params: dict[str, Any]) -> list[list[Answer]]:
    """What an answer says tells what it was asked."""
    return [
        [Answer(f"{ids} {seed} {place}", (place,), -1.0, 3, "stop") for place in range(params["n"])]
        for ids, seed in zip(prompts, seeds, strict=True)
    ]


class Replicas:
    """Two replicas; each call first meets the next of the troubles, while there are any."""

    def __init__(self, *troubles: Exception | list[Any]) -> None:
        self.troubles = list(troubles)
        self.held = [3, 4]
        self.calls = 0
        self.generate = SimpleNamespace(remote=self._generate)

    def broadcast(self, method: str, *args: Any) -> FakeBroadcast:
        return FakeBroadcast(lambda: self._answer(getattr(self, method), *args))

    def converge(self) -> list[Any]:
        return [SimpleNamespace(version=version) for version in self.held]

    def sample_as(self, version: int, *args: Any) -> list[Any]:
        return [answers(*args) if held == version else None for held in self.held]

    def _generate(self, *args: Any) -> FakeResponse:
        return FakeResponse(lambda: self._answer(answers, *args))

    def _answer(self, call: Callable[..., Any], *args: Any) -> Any:
        self.calls += 1
        trouble = self.troubles.pop(0) if self.troubles else None
        if isinstance(trouble, Exception):
            raise trouble
        return call(*args) if trouble is None else trouble


def failed(cause: Exception) -> RayTaskError:
    return RayTaskError("call", "", cause)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_ray.sampler._RETRY_S", 0.0)


def sampler(replicas: Replicas) -> Sampler:
    return Sampler(cast(DeploymentHandle, replicas), replicas=2)


def sample_as(
    replicas: Replicas, version: int, *, is_on_offer: Callable[[], bool] = lambda: True
) -> list[str]:
    completions = sampler(replicas).sample_as(version, PROMPTS, PARAMS, seed="s", is_on_offer=is_on_offer)
    return [completion.text for completion in completions]


def sample(replicas: Replicas) -> list[str]:
    return [completion.text for completion in sampler(replicas).sample(PROMPTS, PARAMS, seed="s")]


def test_completions_are_in_order_of_their_prompts() -> None:
    completions = sampler(Replicas()).sample(PROMPTS, PARAMS, seed="s")
    assert [completion.prompt for completion in completions] == [p for p in PROMPTS for _ in range(2)]
    assert [completion.text.split()[0] for completion in completions] == [
        f"[{number}]" for number in range(7) for _ in range(2)
    ]
    assert len({completion.text.split()[1] for completion in completions}) == 7


def test_what_a_dead_replica_lost_is_asked_for_again() -> None:
    lost = [RayActorError(), failed(EngineDeadError("gone")), RayActorError()]
    assert sample(Replicas(*lost)) == sample(Replicas())


def test_a_call_that_kills_replica_after_replica_is_given_up() -> None:
    replicas = Replicas(*[RayActorError() for _ in range(9)])
    with pytest.raises(SamplerError, match=r"the sampler failed \(5 replicas died\)"):
        sample(replicas)
    assert replicas.calls == 5


def test_a_mistake_in_a_replica_is_not_repeated() -> None:
    replicas = Replicas(failed(KeyError("n")))
    with pytest.raises(SamplerError, match="'n'"):
        sample(replicas)
    assert replicas.calls == 1


@pytest.mark.parametrize("call", [lambda s: s.converge(), lambda s: s.push(3)])
def test_a_refusal_is_no_death(call: Callable[[Sampler], Any]) -> None:
    replicas = Replicas(failed(StaleWeightsError("version 3 is not proven")))
    with pytest.raises(RefusedError, match=r"^version 3 is not proven$"):
        call(sampler(replicas))
    assert replicas.calls == 1


def test_a_push_waits_for_a_replica_to_come_back() -> None:
    replicas = Replicas([], RayActorError(), [])
    assert sampler(replicas).converge() == {3, 4}
    assert replicas.calls == 4


def test_a_push_is_done_when_all_replicas_hold_the_version() -> None:
    replicas = Replicas()
    with pytest.raises(RefusedError, match=r"replicas hold \[3, 4\] after a push of 4: LIVE has moved again"):
        sampler(replicas).push(4)
    replicas.held = [4, 4]
    sampler(replicas).push(4)


def test_a_candidate_answers_as_it_would_if_it_were_live() -> None:
    assert sample_as(Replicas(), 4) == sample(Replicas())


def test_a_candidate_that_no_replica_holds_yet_is_waited_for() -> None:
    nobody = [None, None]
    replicas = Replicas(nobody, [], nobody)
    assert len(sample_as(replicas, 4)) == 14
    assert replicas.calls == 4


def test_a_candidate_that_was_withdrawn_is_not_waited_for() -> None:
    replicas = Replicas()
    with pytest.raises(RefusedError, match="version 9 was withdrawn before it was evaluated"):
        sample_as(replicas, 9, is_on_offer=lambda: replicas.calls < 3)
    assert replicas.calls == 3
