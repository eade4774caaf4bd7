"""What the report computes: win rates, means and their doubt, and which examples it shows."""

import math
from dataclasses import replace

import pytest

from dpo_ray.evaluation import wilson
from dpo_ray.report.examples import Example, chosen, ends, sorted_by_change
from dpo_ray.report.facts import Point, held_out, series, thinned, win_rate_vs_previous, wins_by_prompt
from dpo_ray.report.record import Row, RunRecord


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


def examples(record: RunRecord) -> list[Example]:
    return chosen(sorted_by_change(record, 0, 1))


def labelled(shown: list[Example], why: str) -> list[int]:
    return [example.index for example in shown if example.why == why]


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
    shown = examples(record_of([index - 10.0 for index in range(30)]))
    assert labelled(shown, "Biggest improvement") == [29, 28, 27, 26]
    assert labelled(shown, "Worst change") == [0, 1, 2]
    assert len(labelled(shown, "Drawn at random")) == 5
    assert len({example.index for example in shown}) == 12
    assert shown == examples(record_of([index - 10.0 for index in range(30)]))


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


def evaluated(rows: list[Row], **measured: float) -> RunRecord:
    start = {"kind": "start", "round": -1, "policy_version": 0, **measured}
    return replace(record_of([]), start=start, rounds=(), evaluations={0: rows})


def test_an_interval_counts_prompts_and_not_completions() -> None:
    once, thrice = (
        held_out(evaluated(answers(0, {0: [0.1] * times, 1: [0.5] * times})), "eval/reward_mean")[0]
        for times in (1, 3)
    )
    assert once == pytest.approx(thrice)
    assert once.high - once.y == pytest.approx(1.96 * 0.2)  # stdev(0.1, 0.5) / sqrt(2)


def test_a_band_lies_around_the_recorded_mean_of_what_it_names() -> None:
    rows: list[Row] = [
        {"index": 0, "length": 10, "logp": -1.0, "start_logp": -2.0, "metrics": {"fluent": 1.0}},
        {"index": 1, "length": 14, "logp": -1.0, "start_logp": -4.0, "metrics": {"fluent": 0.0}},
    ]
    measured = {"eval/length_mean": 12.0, "kl/start": 2.0, "eval/fluent": 0.5}
    record = evaluated(rows, **measured)
    # Of two values, the standard error is half of what lies between them.
    for name, half in {"eval/length_mean": 2.0, "kl/start": 1.0, "eval/fluent": 0.5}.items():
        (point,) = held_out(record, name)
        assert (point.y, point.high - point.y) == pytest.approx((measured[name], 1.96 * half))


def test_a_win_rate_against_the_version_before_has_the_interval_of_their_prompts() -> None:
    row = {"kind": "round", "round": 1, "policy_version": 2, "win_rate/vs_previous": 0.8}
    tens = [answers(version, {index: [1.0] for index in range(10)}) for version in (1, 2)]
    record = replace(
        record_of([]),
        rounds=(row,),
        evaluations=dict(enumerate([[], *tens])),
        policies={2: {"parent": 1}},
    )
    assert win_rate_vs_previous(record) == [Point(2, 0.8, *wilson(0.8, 10))]
    assert win_rate_vs_previous(replace(record, policies={2: {"parent": 0}})) == [Point(2, 0.8, 0.8, 0.8)]


def test_prompts_are_sorted_by_change_with_the_unrated_last() -> None:
    record = record_of([0.5, -1.0, 2.0])
    record.evaluations[1][0]["reward"] = None
    shown = sorted_by_change(record, 0, 1)
    assert [(example.index, example.change) for example in shown] == [(2, 2.0), (1, -1.0), (0, None)]


def test_a_long_list_keeps_both_of_its_ends() -> None:
    shown = sorted_by_change(record_of([float(change) for change in range(9)]), 0, 1)
    assert [example.change for example in ends(shown, 5)] == [8.0, 7.0, 6.0, 1.0, 0.0]
    assert ends(shown, 9) == shown
