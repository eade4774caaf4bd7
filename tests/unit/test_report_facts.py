"""What the report computes: win rates and their doubt, errors, and which examples it shows."""

import math
from dataclasses import replace

import pytest

from dpo_ray.report_facts import (
    Example,
    Point,
    Row,
    RunRecord,
    examples,
    held_out_reward,
    series,
    thinned,
    wilson,
    wins_by_prompt,
)


def answers(version: int, rewards: dict[int, list[float | None]]) -> list[Row]:
    return [
        {
            "prompt": f"prompt {index}",
            "text": f"answer {place} of v{version} to {index}",
            "reward": reward,
            "index": index,
        }
        for index, group in rewards.items()
        for place, reward in enumerate(group)
    ]


def record_of(changes: list[float]) -> RunRecord:
    before = answers(0, {index: [0.0] for index in range(len(changes))})
    after = answers(1, {index: [change, 99.0] for index, change in enumerate(changes)})
    return RunRecord(
        config_text="",
        config={},
        start={},
        rounds=({"kind": "round", "round": 0, "policy_version": 1},),
        steps=(),
        evaluations={0: before, 1: after},
        policies={},
        snapshots={},
        live=1,
    )


def labelled(chosen: list[Example], why: str) -> list[int]:
    return [example.index for example in chosen if example.why == why]


def test_win_rate_counts_every_comparison_of_a_prompt_and_half_of_each_tie() -> None:
    before = answers(0, {0: [0.0, 1.0], 1: [0.5], 2: [None], 3: [0.0]})
    after = answers(1, {0: [0.5, 1.0], 1: [0.5], 2: [1.0]})
    assert wins_by_prompt(after, before) == [(1 + 0 + 1 + 0.5) / 4, 0.5]


def test_wilson_interval_is_that_of_the_textbook() -> None:
    # 8 of 10: (0.8 + 0.192 ± 1.96 sqrt(0.016 + 0.0096)) / 1.384, worked by hand.
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)


def test_winning_every_time_leaves_doubt() -> None:
    assert wilson(1.0, 20).low < 0.9


def test_examples_are_the_best_the_worst_and_some_at_random() -> None:
    chosen = examples(record_of([index - 10.0 for index in range(30)]))
    assert labelled(chosen, "Biggest improvement") == [29, 28, 27, 26]
    assert labelled(chosen, "Worst change") == [0, 1, 2]
    assert len(labelled(chosen, "Drawn at random")) == 5
    assert len({example.index for example in chosen}) == 12
    assert chosen == examples(record_of([index - 10.0 for index in range(30)]))


def test_example_shows_the_first_completion_and_not_the_best() -> None:
    assert examples(record_of([1.0]))[0].after_reward == 1.0


def test_no_improvement_is_no_example_of_one() -> None:
    assert labelled(examples(record_of([-1.0, 0.0])), "Biggest improvement") == []


def test_numbers_that_are_not_finite_are_not_drawn() -> None:
    rows = [
        {"round": 0, "loss": math.nan},
        {"round": 1, "loss": 0.5},
        {"round": 2},
        {"round": 3, "loss": None},
    ]
    assert series(rows, "loss") == [Point(1.0, 0.5, 0.5, 0.5)]


def test_thinning_keeps_the_mean() -> None:
    points = [Point(x, x, x, x) for x in range(1000)]
    few = thinned(points, most=100)
    assert len(few) == 100
    assert sum(point.y for point in few) / 100 == pytest.approx(499.5)


def test_standard_error_counts_prompts_and_not_completions() -> None:
    kept = [answers(0, {0: [0.1] * times, 1: [0.5] * times}) for times in (1, 3)]
    start = {"kind": "start", "round": -1, "policy_version": 0}
    once, thrice = (
        held_out_reward(replace(record_of([]), start=start, rounds=(), evaluations={0: rows}))[0]
        for rows in kept
    )
    assert once == pytest.approx(thrice)
    assert once.high - once.y == pytest.approx(0.2)  # stdev(0.1, 0.5) / sqrt(2)
