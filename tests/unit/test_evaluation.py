"""Win rate, reward and KL are what a reader computes by hand."""

import math
import random
import statistics

import pytest

from dpo_ray.evaluation import (
    EvaluatedCompletion,
    degenerate,
    evaluated,
    flaw,
    loops,
    mean_interval,
    mean_metrics,
    num_compared,
    read_evaluation,
    reward_gains,
    summary,
    wilson,
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


def test_reward_gains_are_by_prompt() -> None:
    ours = [answer(0, 1.0), answer(0, 2.0), answer(1, 5.0), answer(2, None), answer(3, 1.0)]
    theirs = [answer(0, 0.5), answer(1, 4.0), answer(1, 8.0), answer(1, None), answer(2, 1.0)]
    assert reward_gains(ours, theirs) == [1.0, -1.0]
    assert num_compared(ours, theirs) == 2


def test_the_interval_of_a_mean_by_hand() -> None:
    # Deviation sqrt((9 + 1 + 1 + 9) / 3) = 2.582, standard error 1.291, times 1.96: 2.530.
    assert mean_interval([1.0, 3.0, 5.0, 7.0]) == pytest.approx((4 - 2.530, 4 + 2.530), abs=1e-3)
    assert mean_interval([2.0]) == (-math.inf, math.inf)


def test_the_interval_of_a_mean_covers_it_nearly_always() -> None:
    draws = random.Random(0)
    samples = [[draws.gauss(1.0, 2.0) for _ in range(50)] for _ in range(1000)]
    intervals = [mean_interval(sample) for sample in samples]
    assert 0.93 < statistics.fmean(low <= 1.0 <= high for low, high in intervals) < 0.97


def test_the_interval_of_a_rate_solves_its_equation() -> None:
    """A bound is a rate from which the seen one is 1.96 of that rate's own standard errors away."""
    for bound in wilson(0.75, 40):
        assert abs(0.75 - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / 40))
    assert wilson(0.0, 10).low == pytest.approx(0.0)
    assert wilson(1.0, 10).high == pytest.approx(1.0)


WORDS = tuple(range(100, 140))


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ((), False),
        (WORDS, False),
        ((7,) * 15, False),
        ((7,) * 16, True),
        ((1, 2) * 7, False),
        ((1, 2) * 8, True),
        ((*WORDS, *(1, 2, 3, 4, 5) * 4, *WORDS), True),
        ((*WORDS, *(1, 2, 3, 4, 5) * 3, 1, 2, 3, 4, *WORDS), False),
        (WORDS * 3, False),
        (WORDS * 4, True),
        (tuple(range(65)) * 5, False),
        ((1, 1, 2) * 3 + (1, 2, 1) * 3, False),
    ],
)
def test_a_loop_is_the_same_tokens_four_times_in_a_row(token_ids: tuple[int, ...], expected: bool) -> None:
    assert loops(token_ids) is expected


def test_loops_are_those_that_a_search_by_hand_finds() -> None:
    """A stretch is a loop where it equals its own first tokens, written again and again."""
    draws = random.Random(0)
    for _ in range(300):
        text = draws.choices((1, 2), (9, 1), k=40)
        by_hand = any(
            text[start : start + size] == (text[start : start + period] * size)[:size]
            for period in range(1, 11)
            for size in [max(4 * period, 16)]
            for start in range(len(text) - size + 1)
        )
        assert loops(text) is by_hand


@pytest.mark.parametrize(
    ("text", "token_ids", "finish_reason", "expected"),
    [
        ("fine", (1, 2, 3), "stop", ""),
        (" \n", (1, 3), "stop", "empty"),
        ("and then", (1, 2), "length", "cut off"),
        ("no no", (1,) * 20, "length", "loop"),
        ("no no", (1,) * 20, "stop", "loop"),
    ],
)
def test_what_makes_a_completion_degenerate(
    text: str, token_ids: tuple[int, ...], finish_reason: str, expected: str
) -> None:
    completion = Completion(Prompt("Q", (1,)), text, token_ids, -1.0, 0, finish_reason)
    assert flaw(completion) == expected
    (row,) = evaluated([ScoredCompletion(completion, Judgement(1.0), "taste")], [-1.0], per_prompt=1)
    assert degenerate([row, row]) == ({expected: 2} if expected else {})


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
