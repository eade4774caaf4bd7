"""A language model judges over HTTP: asked once, again where that helps, and never beyond its budget."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import Body, JudgeServer, chat, serving
from judged import answers, judgements, rewards

from dpo_ray.config import BudgetConfig, JudgeConfig
from dpo_ray.judges import JudgeError, check_judges, judge_completions, make_judge, require_judged
from dpo_ray.judges.actor import JudgeActor
from dpo_ray.judges.budget import Spending
from dpo_ray.storage import Storage

LONG, SHORT = "because of the very long winter", "no idea"


def sides(body: Body) -> list[str]:
    """The answers that a question shows, in its order."""
    [message] = body["messages"]
    parts = message["content"].split("\n")
    starts = [number + 1 for number, line in enumerate(parts) if line.startswith("<answer")]
    return [parts[start] for start in starts]


def longer(body: Body) -> Body:
    first, second = map(len, sides(body))
    better = "tie" if first == second else "A" if first > second else "B"
    return chat(json.dumps({"reason": "It says more.", "better": better}))


def length_score(body: Body) -> Body:
    [text] = sides(body)
    return chat(json.dumps({"reason": "Counted.", "score": min(10, len(text))}))


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with serving(JudgeServer(longer)) as running:
        yield running


def config(server: JudgeServer, **settings: Any) -> JudgeConfig:
    given = {"kind": "llm", "model": "fake", "url": server.url, "backoff_s": 0.0, **settings}
    return JudgeConfig.model_validate(given)


def ask(server: JudgeServer, *texts: str, **settings: Any) -> list[Any]:
    judge = make_judge(config(server, **settings), Spending(BudgetConfig()))
    return judgements(judge(answers(*(texts or (LONG, SHORT)))))


def test_the_better_of_two_wins_in_both_orders(server: JudgeServer) -> None:
    said = ask(server)
    assert rewards(said) == [1.0, 0.0]
    assert sorted(sides(body) for body in server.requests) == sorted([[LONG, SHORT], [SHORT, LONG]])
    assert said[0].metrics["flips"] == 0.0
    assert said[0].metrics["first_wins"] == 0.5


def test_a_judge_that_always_prefers_the_first_place_says_nothing(server: JudgeServer) -> None:
    server.respond = lambda body: chat('{"reason": "", "better": "A"}')
    said = ask(server)
    assert rewards(said) == [0.5, 0.5]
    assert (said[0].metrics["first_wins"], said[0].metrics["flips"]) == (1.0, 1.0)


def test_scores_are_rewards(server: JudgeServer) -> None:
    server.respond = length_score
    assert rewards(ask(server, "one", "seven77", mode="pointwise")) == [3.0, 7.0]


def test_the_form_of_an_answer_is_a_json_schema_where_the_endpoint_knows_it(server: JudgeServer) -> None:
    server.respond = length_score
    ask(server, "one", mode="pointwise", scale=5, keep_answers=False)
    schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["score"] == {"enum": [1, 2, 3, 4, 5]}
    assert (schema["required"], schema["additionalProperties"]) == (["reason", "score"], False)
    ask(server, "one", mode="pointwise", scale=5, output="text")
    assert "response_format" not in server.requests[1]


@pytest.mark.parametrize(
    "text",
    [
        "A",
        '{"better": "C"}',
        '{"better": "A"} or not',
        '{"better": true}',
        '{"better": ["A"]}',
        '{"better": "A", "sure": 1}',
        "[1]",
        "{]}",
        "",
    ],
)
def test_nonsense_is_asked_again_and_then_left_unjudged(server: JudgeServer, text: str) -> None:
    server.respond = lambda body: chat(text)
    said = ask(server, retries=2, output="text")
    assert rewards(said) == [None, None]
    assert len(server.requests) == 2 * 3
    assert said[0].reason.startswith("nonsense")
    assert (said[0].metrics["unjudged"], said[0].metrics["retries"]) == (1.0, 2.0)


def test_a_reason_may_hold_braces(server: JudgeServer) -> None:
    server.respond = lambda body: chat('{"reason": "A sets {x} and {y}.", "better": "tie"}')
    assert rewards(ask(server)) == [0.5, 0.5]


def test_reasoning_may_come_before_the_answer(server: JudgeServer) -> None:
    server.respond = lambda body: chat('<think>A {is} long.</think>\n{"reason": "x", "better": "tie"}\n')
    assert rewards(ask(server, output="text")) == [0.5, 0.5]


@pytest.mark.parametrize("fault", [500, 503, 429, "<html>busy</html>", '{"choices": []}', "{}"])
def test_a_call_that_fails_is_repeated(server: JudgeServer, fault: int | str) -> None:
    server.faults = [fault, fault]
    said = ask(server, concurrency=1)
    assert rewards(said) == [1.0, 0.0]
    assert len(server.requests) == 4
    assert said[0].metrics["retries"] == 1.0  # Two of one call and none of the other.


def test_a_call_that_would_fail_again_is_not_repeated(server: JudgeServer) -> None:
    server.faults = [401, 401]
    said = ask(server)
    assert len(server.requests) == 2
    assert said[0].reason.startswith("HTTP 401")


def test_a_slow_call_is_given_up_and_repeated(server: JudgeServer) -> None:
    server.faults = ["slow"]
    assert rewards(ask(server, timeout_s=1.0, concurrency=1)) == [1.0, 0.0]
    assert len(server.requests) == 3


def test_a_service_that_is_not_there_leaves_all_unjudged_and_ends_the_job(server: JudgeServer) -> None:
    settings = config(server, url="http://127.0.0.1:9/v1", retries=0)
    judge = make_judge(settings, Spending(settings.budget))
    scored = judge_completions(judge, "llm fake", answers(LONG, SHORT))
    with pytest.raises(JudgeError, match=r"judged none of 2 completions: APIConnectionError.*\(2 times\)"):
        require_judged(scored, settings)


def test_one_failure_does_not_end_the_job(server: JudgeServer) -> None:
    server.faults = [500, 500]
    server.respond = length_score
    settings = config(server, mode="pointwise", retries=1, concurrency=1)
    scored = judge_completions(make_judge(settings, Spending(settings.budget)), "llm", answers("one", "four"))
    require_judged(scored, settings)
    assert [item.judgement.reward for item in scored] == [None, 4.0]


def test_calls_run_at_the_same_time_and_not_more(server: JudgeServer) -> None:
    server.respond, server.delay_s = length_score, 0.05
    ask(server, *(f"answer {number}" for number in range(12)), mode="pointwise", concurrency=3)
    assert server.most_at_once == 3


def test_a_question_is_asked_once(server: JudgeServer) -> None:
    first, again = ask(server), ask(server)
    assert rewards(first) == rewards(again)
    assert len(server.requests) == 2
    assert (first[0].metrics["cached"], again[0].metrics["cached"], again[0].cost) == (0.0, 1.0, 0.0)
    ask(server, rubric="Prefer brevity.")
    assert len(server.requests) == 4, "another rubric is another judge"


def test_the_same_text_twice_is_one_contestant(server: JudgeServer) -> None:
    assert rewards(ask(server, LONG, SHORT, LONG)) == [1.0, 0.0, 1.0]
    assert len(server.requests) == 2


def test_what_a_judgement_costs_is_what_its_calls_cost(server: JudgeServer) -> None:
    said = ask(server, input_price=2.0, output_price=10.0)
    per_call = (100 * 2.0 + 10 * 10.0) / 1e6
    assert sum(each.cost for each in said) == pytest.approx(2 * per_call)


@pytest.mark.parametrize("actors", [1, 2])
def test_a_budget_of_calls_holds_over_actors_and_restarts(
    server: JudgeServer, tmp_path: Path, actors: int
) -> None:
    server.respond = length_score
    settings = config(server, mode="pointwise", budget={"calls": 7}, actors=actors, keep_answers=False)
    for life in range(3):
        for place in range(actors):
            actor = JudgeActor(settings, str(tmp_path), place)
            actor.judge(answers(*(f"{life} {place} {number}" for number in range(3))))
    assert len(server.requests) == 7


def test_beyond_the_budget_completions_are_unjudged_and_no_low_score(
    server: JudgeServer, tmp_path: Path
) -> None:
    server.respond = length_score
    settings = config(server, mode="pointwise", budget={"calls": 2}, concurrency=1)
    scored = JudgeActor(settings, str(tmp_path)).judge(answers("a", "bb", "ccc"))
    assert [item.judgement.reward for item in scored] == [1.0, 2.0, None]
    assert scored[2].judgement.reason == "budget"
    assert scored[2].judgement.metrics["unjudged_budget"] == 1.0
    require_judged(scored, settings)
    stopping = config(server, mode="pointwise", budget={"calls": 2, "on_exhausted": "stop"})
    with pytest.raises(JudgeError, match="the budget is spent, 1 of 3 completions are not judged: raise"):
        require_judged(scored, stopping)


def test_a_budget_of_money_is_never_passed(server: JudgeServer) -> None:
    server.respond, server.delay_s = length_score, 0.01
    budget = BudgetConfig(money=0.02)
    settings = config(
        server,
        mode="pointwise",
        budget=budget.model_dump(),
        input_price=1.0,
        output_price=10.0,
        concurrency=4,
    )
    spending = Spending(budget)
    said = judgements(make_judge(settings, spending)(answers(*(f"answer {n}" for n in range(200)))))
    per_call = (100 * 1.0 + 10 * 10.0) / 1e6
    # The last calls do not fit for what they could cost: 512 tokens of answer, a token for each byte asked.
    assert 0.6 * 0.02 < spending.used.money <= 0.02
    assert len(server.requests) == pytest.approx(spending.used.money / per_call)
    assert {each.reason for each in said} == {"", "budget"}


def test_a_call_that_was_refused_uses_no_tokens(server: JudgeServer) -> None:
    server.faults = [500]
    settings = config(server, concurrency=1)
    spending = Spending(settings.budget)
    make_judge(settings, spending)(answers(LONG, SHORT))
    assert (spending.used.calls, spending.used.tokens) == (3, 2 * 110)


def test_a_call_that_was_not_finished_is_counted_in_full(server: JudgeServer, tmp_path: Path) -> None:
    budget = BudgetConfig(tokens=5000)
    settings = config(server, budget=budget.model_dump(), retries=0, timeout_s=0.2, concurrency=1)
    server.faults = ["slow", "slow"]
    JudgeActor(settings, str(tmp_path)).judge(answers(LONG, SHORT))
    late = Spending(budget, Storage(str(tmp_path))).used
    assert late.calls == 2
    assert late.tokens > 2 * settings.max_new_tokens


def test_the_key_goes_to_the_endpoint_and_nowhere_else(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(server, api_key_variable="MY_JUDGE_KEY", budget={"calls": 9})
    with pytest.raises(ValueError, match=r"\$MY_JUDGE_KEY is not set"):
        check_judges(settings)
    monkeypatch.setenv("MY_JUDGE_KEY", "sk-very-secret")
    server.faults = [400, 401]  # The server's message repeats all headers.
    scored = JudgeActor(settings, str(tmp_path)).judge(answers(LONG, SHORT))
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-very-secret"}
    assert "HTTP 40" in str(scored)
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert "sk-very-secret" not in f"{scored} {settings} {kept}"


def test_a_template_of_ones_own_is_filled(server: JudgeServer, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ fields.topic }}: {{ prompt }}\n<answer>\n{{ first }}\n<answer>\n{{ second }}")
    judge = make_judge(config(server, template=str(template)), Spending(BudgetConfig()))
    judge(answers(LONG, SHORT, topic="weather"))
    assert server.requests[0]["messages"][0]["content"].startswith("weather: Why so?")
    template.write_text("{{ promt }}")
    with pytest.raises(ValueError, match="uses promt: there are prompt, fields"):
        check_judges(config(server, template=str(template)))


def test_an_answer_is_material_and_no_template(server: JudgeServer) -> None:
    ask(server, "{{ 6 * 7 }}", SHORT)
    assert "{{ 6 * 7 }}" in sides(server.requests[0])


def test_the_live_policy_judges_where_it_lives_and_its_answers_are_not_kept(server: JudgeServer) -> None:
    settings = config(server, url="live", model="policy")
    for _ in range(2):
        make_judge(settings, Spending(BudgetConfig()), live_url=server.url)(answers(LONG, SHORT))
    assert len(server.requests) == 4
