"""A judge behind HTTP gets completions in batches and answers with rewards."""

from collections.abc import Iterator
from typing import Any

import pytest
from judge_server import Body, JudgeServer, serving
from judged import answers, judgements, rewards

from dpo_ray.config import JudgeConfig
from dpo_ray.judges import make_judge
from dpo_ray.judges.budget import Spending
from dpo_ray.types import Judgement


def lengths(body: Body) -> Body:
    texts = [each["completion"] for each in body["completions"]]
    return {"rewards": [len(text) if text else None for text in texts]}


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with serving(JudgeServer(lengths)) as running:
        yield running


def ask(server: JudgeServer, *texts: str, **settings: Any) -> list[Judgement]:
    given = {"kind": "http", "url": server.url, "backoff_s": 0.0, **settings}
    config = JudgeConfig.model_validate(given)
    return judgements(make_judge(config, Spending(config.budget))(answers(*texts, key=7)))


def test_each_completion_gets_its_reward_or_silence(server: JudgeServer) -> None:
    assert rewards(ask(server, "one", "", "three", batch_size=2)) == [3.0, None, 5.0]
    assert sorted(len(body["completions"]) for body in server.requests) == [1, 2]
    first = {"prompt": "Why so?", "fields": {"key": 7}, "completion": "one", "policy_version": 4}
    assert first in [each for body in server.requests for each in body["completions"]]


@pytest.mark.parametrize(
    "fault", ["", "[]", '{"rewards": [1]}', '{"rewards": [1, NaN]}', '{"rewards": [1, "2"]}', 500, "slow"]
)
def test_a_batch_that_fails_is_asked_again(server: JudgeServer, fault: int | str) -> None:
    server.faults = [fault]
    said = ask(server, "one", "four", timeout_s=1.0)
    assert rewards(said) == [3.0, 4.0]
    assert said[0].metrics["retries"] == 1.0


def test_a_batch_that_fails_for_good_is_unjudged_and_the_others_are_not(server: JudgeServer) -> None:
    server.faults = ["[]"]
    said = ask(server, "one", "four", "three", batch_size=2, retries=0, concurrency=1)
    assert rewards(said) == [None, None, 5.0]
    assert said[0].reason.startswith("nonsense")


def test_what_was_answered_is_not_asked_again(server: JudgeServer) -> None:
    ask(server, "one", "")
    assert rewards(ask(server, "one", "", "seven77")) == [3.0, None, 7.0]
    assert [each["completion"] for each in server.requests[1]["completions"]] == ["seven77"]
