"""Comparisons become win shares, and several judges one."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
from judged import answers, judgements, rewards

from dpo_ray.config import JudgeConfig
from dpo_ray.evaluation import EvaluatedCompletion, beside_start
from dpo_ray.judges import JudgeError, Question, make_judge, prompt_shares
from dpo_ray.judges.budget import Spending
from dpo_ray.judges.ensemble import ensemble_judge
from dpo_ray.judges.pairwise import pairwise_judge, win_shares
from dpo_ray.types import Judgement


def longer_wins(questions: Sequence[Question]) -> list[float]:
    scores = [
        (len(one.text) > len(two.text)) + (len(one.text) == len(two.text)) / 2 for one, two in questions
    ]
    return [float(score) for score in scores]


def first_wins(questions: Sequence[Question]) -> list[float]:
    return [1.0] * len(questions)


def rating(*values: Judgement | float | None) -> Any:
    return lambda completions: list(values)


def test_a_reward_is_the_mean_share_of_wins_against_the_others() -> None:
    judge = pairwise_judge(longer_wins, "longer", both_orders=True)
    assert rewards(judge(answers("a", "bbb", "cc", "dd"))) == [0.0, 1.0, 0.5, 0.5]


def test_the_order_of_completions_changes_nothing() -> None:
    judge = pairwise_judge(longer_wins, "longer", both_orders=False)
    for texts in permutations(["a", "bbb", "cc", "dddd"]):
        shares = dict(zip(texts, rewards(judge(answers(*texts))), strict=True))
        assert shares == {"a": 0.0, "cc": pytest.approx(1 / 3), "bbb": pytest.approx(2 / 3), "dddd": 1.0}


def test_only_completions_of_one_prompt_meet() -> None:
    asked: list[Question] = []

    def compare(questions: Sequence[Question]) -> list[float]:
        asked.extend(questions)
        return longer_wins(questions)

    completions = [*answers("a", "bb", prompt="one"), *answers("ccc", "dddd", prompt="two")]
    assert rewards(pairwise_judge(compare, "longer", both_orders=True)(completions)) == [0.0, 1.0, 0.0, 1.0]
    assert {one.prompt.text == two.prompt.text for one, two in asked} == {True}
    assert len(asked) == 4


def test_a_preference_for_a_place_is_a_tie_in_both_orders_and_shared_out_in_one() -> None:
    both = judgements(pairwise_judge(first_wins, "first", both_orders=True)(answers("a", "b", "c")))
    assert rewards(both) == [0.5, 0.5, 0.5]
    assert both[0].metrics == {"first_wins": 1.0, "flips": 1.0}
    one = rewards(pairwise_judge(first_wins, "first", both_orders=False)(answers("a", "b", "c")))
    assert one == [0.5, 0.5, 0.5], "each is first once"


def test_the_same_place_preferred_in_both_orders_is_a_tie_however_strongly() -> None:
    judge = pairwise_judge(lambda questions: [0.9, 0.7], "biased", both_orders=True)
    assert rewards(judge(answers("a", "b"))) == [0.5, 0.5]


def test_weak_preferences_of_both_orders_are_averaged() -> None:
    judge = pairwise_judge(lambda questions: [0.9, 0.3], "weak", both_orders=True)
    assert rewards(judge(answers("a", "b"))) == [pytest.approx(0.8), pytest.approx(0.2)]


def test_a_contest_without_an_answer_counts_for_nobody() -> None:
    def silent_on_a(questions: Sequence[Question]) -> list[float | None]:
        said = longer_wins(questions)
        return [
            None if "a" in (one.text, two.text) else p for p, (one, two) in zip(said, questions, strict=True)
        ]

    judge = pairwise_judge(silent_on_a, "silent", both_orders=True)
    assert rewards(judge(answers("a", "bb", "ccc"))) == [None, 0.0, 1.0]


def test_a_completion_alone_cannot_be_compared_and_equal_ones_are_a_tie() -> None:
    judge = pairwise_judge(longer_wins, "longer", both_orders=True)
    [alone] = judgements(judge(answers("a")))
    assert (alone.reward, alone.reason) == (None, "no other completion of its prompt to compare it with")
    assert rewards(judge(answers("a", "a"))) == [0.5, 0.5]


@pytest.mark.parametrize("preference", [-0.1, 1.5, float("nan"), "A"])
def test_what_is_no_preference_is_refused(preference: Any) -> None:
    judge = pairwise_judge(lambda questions: [preference] * 2, "odd", both_orders=True)
    with pytest.raises(JudgeError, match=r"judge odd gave the (preference|reward)"):
        judge(answers("a", "b"))


def test_a_function_that_compares_is_found_by_its_path() -> None:
    config = JudgeConfig(kind="pairwise", function=f"{__name__}:longer_wins")
    assert rewards(make_judge(config, Spending(config.budget))(answers("a", "bb"))) == [0.0, 1.0]


def test_win_shares_by_hand() -> None:
    assert win_shares([3.0, 1.0, None, 3.0]) == [0.75, 0.0, None, 0.75]
    assert win_shares([3.0, None]) == [None, None]


@pytest.mark.parametrize(("combine", "expected"), [("mean", [2.0, None]), ("minimum", [1.0, None])])
def test_rewards_are_combined_where_every_judge_could_say(combine: Any, expected: list[float | None]) -> None:
    judge = ensemble_judge([("one", rating(1.0, 5.0)), ("two", rating(3.0, None))], combine)
    said = judgements(judge(answers("a", "b")))
    assert rewards(said) == expected
    assert said[0].metrics["disagreement"] == 1.0


def test_a_majority_beats_one_judge_with_large_numbers() -> None:
    judges = [("one", rating(1.0, 0.0)), ("two", rating(0.2, 0.1)), ("loud", rating(-1e6, 1e6))]
    said = judgements(ensemble_judge(judges, "majority")(answers("a", "b")))
    assert rewards(said) == [1.0, 0.0]
    assert said[0].metrics["disagreement"] == pytest.approx((2 / 9) ** 0.5)  # Of 1, 1 and 0.


def test_a_judge_that_cannot_say_does_not_vote() -> None:
    judges = [("one", rating(1.0, 0.0)), ("two", rating(None, 1.0)), ("three", rating(None, None))]
    assert rewards(ensemble_judge(judges, "majority")(answers("a", "b"))) == [1.0, 0.0]


def test_judges_of_several_kinds_are_set_by_a_list() -> None:
    config = JudgeConfig.model_validate(
        {"kind": "regex", "pattern": "a", "plus": [{"kind": "regex", "pattern": "b"}], "combine": "minimum"}
    )
    said = judgements(make_judge(config, Spending(config.budget))(answers("ab", "b")))
    assert rewards(said) == [1.0, 0.0]
    assert config.full_name == "minimum of regex a, regex b"


def test_metrics_and_costs_of_all_judges_are_kept() -> None:
    one = rating(Judgement(1.0, {"fluent": 0.5}, cost=0.25))
    judge = ensemble_judge([("one", one), ("two", rating(Judgement(1.0, {"fluent": 1.0}, cost=0.5)))], "mean")
    [said] = judgements(judge(answers("a")))
    assert said == Judgement(1.0, {"0/fluent": 0.5, "1/fluent": 1.0, "disagreement": 0.0}, cost=0.75)


def test_a_version_is_compared_with_the_answers_of_the_start() -> None:
    start = [
        EvaluatedCompletion(at, "Why?", text, 0.5, 0, 1, -1.0, -1.0) for at, text in enumerate(["bb", "dd"])
    ]
    ours = [*answers("a", "ccc", prompt="one"), *answers("eee", "ffff", prompt="two")]
    together = beside_start(ours, start, per_prompt=2)
    assert [(each.text, each.policy_version) for each in together] == [
        *(("a", 4), ("ccc", 4), ("bb", 0)),
        *(("eee", 4), ("ffff", 4), ("dd", 0)),
    ]
    said = rewards(pairwise_judge(longer_wins, "longer", both_orders=True)(together))
    assert said == [0.0, 1.0, 0.5, 0.5, 1.0, 0.0]


@pytest.mark.parametrize("num", [1, 2, 3, 5, 9])
def test_shares_keep_prompts_whole_and_lose_nothing(num: int) -> None:
    completions = [each for prompt in "abcde" for each in answers("1", "2", "3", prompt=prompt)]
    shares = prompt_shares(completions, num)
    assert [each for share in shares for each in share] == completions
    assert len(shares) <= num
    assert all(len(share) % 3 == 0 for share in shares)
    assert prompt_shares([], num) == []
