"""Contests and what is found of them, by hand."""

import math
from collections.abc import Sequence

import pytest
from judged import answers

from dpo_ray.config import EvaluateConfig, JudgeConfig
from dpo_ray.evaluating.duels import Judged, duels, judge_alone, judge_together, meet
from dpo_ray.evaluating.findings import bill, compare, measure
from dpo_ray.evaluating.samples import Sample
from dpo_ray.evaluating.sentences import verdict
from dpo_ray.judges import JudgeError, judge_completions, make_judge
from dpo_ray.judges.budget import Spending
from dpo_ray.types import Completion, Judgement, ScoredCompletion

CONFIG = EvaluateConfig(policies=("a", "b"), resamples=400)


def samples(*texts: Sequence[str | None]) -> list[Sample]:
    """Those of each prompt; None is an error."""
    return [
        Sample(prompt, number, None, error="late")
        if text is None
        else Sample(prompt, number, answers(text, prompt=f"Prompt {prompt}")[0], num_tokens=len(text))
        for prompt, of_prompt in enumerate(texts)
        for number, text in enumerate(of_prompt)
    ]


def length_judge(completions: Sequence[Completion]) -> list[ScoredCompletion]:
    """Rewards length; of an empty text it cannot say anything."""
    return [ScoredCompletion(c, Judgement(float(len(c.text)) or None), "length") for c in completions]


def judged(*texts: Sequence[str | None]) -> list[Judged]:
    return judge_alone(length_judge, samples(*texts))


def test_all_completions_of_a_prompt_meet_and_no_others() -> None:
    contests = meet(judged(["aa", "aaaa"], ["a"]), judged(["bbb", "bb"], ["b"]))
    scores = [(duel.prompt, duel.score, duel.extra_length) for duel in duels(contests, tie_margin=0.0)]
    assert scores == [(0, 0.0, -1), (0, 0.5, 0), (0, 1.0, 1), (0, 1.0, 2), (1, 0.5, 0)]


def test_a_difference_of_exactly_the_margin_is_a_tie() -> None:
    contests = meet(judged(["aaa"], ["aaaa"]), judged(["b"], ["b"]))
    assert [duel.score for duel in duels(contests, tie_margin=2.0)] == [0.5, 1.0]


def test_what_is_missing_or_not_judged_is_no_loss() -> None:
    contests = meet(judged([None, ""], ["aa"]), judged(["bbb", "b"], ["b", None]))
    comparison = compare("a", contests, CONFIG, baseline="b", is_relative=False)
    assert (comparison.prompts, comparison.win_rate.value, comparison.losses) == (1, 1.0, 0.0)
    assert comparison.undecided == 2
    with pytest.raises(JudgeError, match="the judge decided none of 1 contests of a and b"):
        compare("a", meet(judged([""]), judged(["b"])), CONFIG, baseline="b", is_relative=False)


def test_each_prompt_counts_once() -> None:
    contests = meet(judged(["aaa", "aaa"], ["a"]), judged(["b", "b"], ["bb"]))
    comparison = compare("a", contests, CONFIG, baseline="b", is_relative=False)
    assert (comparison.win_rate.value, comparison.wins, comparison.losses) == (0.5, 0.5, 0.5)
    assert comparison.reward_gain is not None
    assert comparison.reward_gain.value == (2.0 - 1.0) / 2


def tenths(*outcomes: int) -> list[list[str]]:
    return [["x" * (2 + outcome)] for outcome in outcomes]


def test_a_clear_difference_is_settled_and_a_small_one_says_what_it_takes() -> None:
    baseline = judged(*tenths(*[0] * 40))
    clear = compare(
        "a", meet(judged(*tenths(*[1] * 32, *[-1] * 8)), baseline), CONFIG, baseline="b", is_relative=False
    )
    assert (clear.win_rate.value, clear.is_settled, clear.more_prompts) == (0.8, True, None)
    assert verdict(clear).startswith("a against b: better, wins 80.0 % (")
    small = compare(
        "a", meet(judged(*tenths(*[1] * 22, *[-1] * 18)), baseline), CONFIG, baseline="b", is_relative=False
    )
    # d = 0.05, s^2 = (0.25 - 0.0025) * 40 / 39: n = 1.96^2 * 0.253846 / 0.0025 = 390.1.
    assert (small.is_settled, small.more_prompts) == (False, 391 - 40)
    assert "within noise" in verdict(small)
    assert verdict(small).endswith("; about 351 more would settle it, were the rate to stay")


def test_policies_that_tie_everywhere_need_no_number_of_prompts() -> None:
    same = judged(["aa"], ["aaa"])
    comparison = compare("a", meet(same, same), CONFIG, baseline="b", is_relative=False)
    assert (comparison.win_rate, comparison.ties) == ((0.5, 0.5, 0.5), 1.0)
    assert (comparison.is_settled, comparison.more_prompts) == (False, None)
    assert "at this rate no number of prompts would settle it" in verdict(comparison)


def ask_pairwise(completions: Sequence[Completion]) -> list[ScoredCompletion]:
    """Prefers what comes first, unless one side is louder."""
    config = JudgeConfig(kind="pairwise", function=f"{__name__}:louder")
    return judge_completions(make_judge(config, Spending(config.budget)), "louder", completions)


def louder(questions: Sequence[tuple[Completion, Completion]]) -> list[float]:
    balances = [first.text.count("!") - second.text.count("!") for first, second in questions]
    return [1.0 if balance >= 0 else 0.0 for balance in balances]


def test_a_judge_that_compares_sees_both_orders_and_only_the_two() -> None:
    ours, theirs = samples(["so!", "so"], ["no!!", None]), samples(["so", "no"], ["no", "no"])
    contests = judge_together(ask_pairwise, ours, theirs)
    found = compare("a", contests, CONFIG, baseline="b", is_relative=True)
    assert [duel.score for duel in duels(contests, tie_margin=0.0)] == [1.0, 1.0, 0.5]
    assert found.win_rate.value == (0.75 + 1.0) / 2
    assert found.flips == pytest.approx(1 / 3)  # Of two equally loud ones, the first place decides.
    assert found.reward_gain is None


def test_measures_worked_out_by_hand() -> None:
    own = samples(["go on and on", "go on and on"], [None, "no"])
    measures = measure("a", own, judge_alone(length_judge, own), CONFIG)
    assert (measures.completions, measures.errors) == (3, {"late": 1})
    assert measures.reward is not None and measures.tokens is not None
    assert (measures.reward.value, measures.tokens.value) == ((12 + 2) / 2, 7.0)
    assert measures.reward_quantiles is not None
    assert [measures.reward_quantiles[place] for place in (0, 10, 20)] == [2.0, 12.0, 12.0]
    assert (measures.kl, measures.kl_sampled, measures.versions) == (None, None, [4])
    assert measures.distinct_1 == 4 / 9
    assert measures.self_bleu == 1.0
    assert measures.degenerate_share == 0.0


def test_of_a_judge_that_only_compares_there_is_no_reward() -> None:
    measures = measure("a", samples(["one"]), None, CONFIG)
    assert (measures.reward, measures.reward_quantiles, measures.metrics) == (None, None, {})
    assert math.isnan(measures.self_bleu)


def test_the_bill_counts_answers_that_were_kept() -> None:
    said = [
        Judgement(1.0, {"cached": 1.0}),
        Judgement(None, {"cached": 0.0}, cost=0.25),
        Judgement(0.0, cost=0.5),
    ]
    counted = bill(said)
    assert (counted.judgements, counted.unjudged, counted.cached, counted.cost) == (3, 1, 1, 0.75)
