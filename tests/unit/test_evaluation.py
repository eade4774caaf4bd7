"""Win rate, reward and KL are what a reader computes by hand."""

import math
import statistics

import pytest

from dpo_ray.evaluation import (
    EvaluatedCompletion,
    evaluated,
    mean_metrics,
    read_evaluation,
    summary,
    win_rate,
    write_evaluation,
)
from dpo_ray.storage import Storage
from dpo_ray.types import Completion, Judgement, Prompt, ScoredCompletion


def answer(
    index: int, reward: float | None, *, text: str = "good", logp: float = -2.0
) -> EvaluatedCompletion:
    return EvaluatedCompletion(
        index=index,
        prompt="the film",
        text=text,
        reward=reward,
        policy_version=1,
        length=len(text),
        logp=logp,
        start_logp=-3.5,
        metrics={"fluent": 1.0} if reward is not None else {},
    )


def test_a_win_counts_one_and_a_tie_half() -> None:
    ours = [answer(0, 1.0), answer(1, 0.5), answer(2, 0.0), answer(3, 2.0)]
    theirs = [answer(0, 0.0), answer(1, 0.5), answer(2, 1.0), answer(3, 0.0)]
    assert win_rate(ours, theirs) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert win_rate(theirs, ours) == pytest.approx(1 - win_rate(ours, theirs))


def test_a_version_against_itself_wins_half() -> None:
    same = [answer(0, 0.1), answer(0, 0.7), answer(1, 0.3), answer(1, None)]
    assert win_rate(same, same) == pytest.approx(0.5)


def test_each_answer_meets_each_other_answer_to_its_prompt_only() -> None:
    ours = [answer(0, 1.0), answer(0, 3.0), answer(1, 5.0)]
    theirs = [answer(0, 2.0), answer(0, 3.0), answer(1, 9.0)]
    # Prompt 0: 1<2, 1<3, 3>2, 3=3; prompt 1: 5<9.
    assert win_rate(ours, theirs) == pytest.approx((0 + 0 + 1 + 0.5 + 0) / 5)


def test_what_was_not_judged_is_neither_won_nor_lost() -> None:
    ours = [answer(0, None), answer(1, 1.0), answer(2, 1.0)]
    theirs = [answer(0, 0.0), answer(1, None), answer(2, 0.0)]
    assert win_rate(ours, theirs) == 1.0
    assert math.isnan(win_rate(ours[:2], theirs[:2]))


def test_summary_by_hand() -> None:
    rows = [answer(0, 1.0, logp=-2.0), answer(0, 3.0, logp=-3.0, text="longer"), answer(1, None, logp=-1.0)]
    values = summary(rows)
    assert values["kl/start"] == pytest.approx((1.5 + 0.5 + 2.5) / 3)
    assert values["eval/reward_mean"] == pytest.approx(2.0)
    assert values["eval/reward_std"] == pytest.approx(1.0)
    assert values["eval/length_mean"] == pytest.approx(14 / 3)
    assert values["eval/fluent"] == 1.0


def test_the_start_is_at_no_distance_from_itself() -> None:
    rows = [answer(index, 1.0, logp=-3.5) for index in range(3)]
    assert summary(rows)["kl/start"] == 0.0


def test_nothing_judged_is_not_a_number() -> None:
    values = summary([answer(0, None)])
    assert math.isnan(values["eval/reward_mean"])
    assert math.isnan(values["eval/reward_std"])


def test_a_metric_is_the_mean_over_those_who_have_it() -> None:
    assert mean_metrics([{"a": 1.0}, {"a": 2.0, "b": 5.0}, {}]) == {"a": 1.5, "b": 5.0}
    assert mean_metrics([]) == {}


def test_completions_of_one_prompt_share_its_index() -> None:
    prompt = Prompt("the film", (1, 2))
    scored = [
        ScoredCompletion(
            Completion(prompt, f"text {place}", (3,) * (place + 1), -1.0 * place, 4, "stop"),
            Judgement(float(place), {"fluent": 0.5}),
            "taste",
        )
        for place in range(6)
    ]
    rows = evaluated(scored, [-10.0 - place for place in range(6)], per_prompt=2)
    assert [row.index for row in rows] == [0, 0, 1, 1, 2, 2]
    assert rows[5] == EvaluatedCompletion(2, "the film", "text 5", 5.0, 4, 6, -5.0, -15.0, {"fluent": 0.5})
    assert statistics.fmean(row.logp for row in rows) == -2.5


def test_an_evaluation_comes_back_whatever_its_texts_hold(storage: Storage) -> None:
    texts = ["plain", "two\nlines", "Zwölf €", "line\u2028separator", "next\x85line", "form\x0cfeed", ""]
    rows = [answer(index, None if index % 3 else 0.1, text=text) for index, text in enumerate(texts)]
    write_evaluation(storage, 2, rows)
    assert read_evaluation(storage, 2) == rows
    assert read_evaluation(storage, 1) is None
