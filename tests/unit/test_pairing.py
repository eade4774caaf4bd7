"""Only what a judge told apart becomes a pair."""

import math

import pytest
from scored import config, pairs_of, scored, texts

from dpo_ray.config import PairingConfig
from dpo_ray.types import Message, Pair, ScoredCompletion

BEST_VS_WORST, ALL_PAIRS = config("best_vs_worst"), config("all_pairs")
RULES = ("best_vs_worst", "all_pairs", "best_vs_random", "random_pair", "best_vs_two_sigma")
by_each_rule = pytest.mark.parametrize("pairing", list(map(config, RULES)), ids=RULES)


def test_best_vs_worst_pairs_the_extremes_with_all_that_is_known_of_them() -> None:
    candidates = [
        scored("mid", 0.5),
        scored("good", 0.9, version=4, cost=2),
        scored("poor!", 0.1, version=2, cost=1),
    ]
    assert pairs_of(candidates, BEST_VS_WORST, round_=7) == [
        Pair(
            prompt="Q",
            chosen="good",
            rejected="poor!",
            prompt_ids=(81,),
            chosen_ids=tuple(map(ord, "good")),
            rejected_ids=tuple(map(ord, "poor!")),
            chosen_reward=0.9,
            rejected_reward=0.1,
            chosen_logp=-4,
            rejected_logp=-5,
            policy_version=2,
            round=7,
            source="judge",
            judge="taste",
            cost=3.0,
        )
    ]


def test_the_first_counts_among_equal_rewards() -> None:
    candidates = [scored("a", 1), scored("b", 0), scored("c", 1), scored("d", 0)]
    assert texts(pairs_of(candidates, BEST_VS_WORST)) == [("a", "b")]


def test_all_pairs_pairs_each_two_that_are_no_tie() -> None:
    candidates = [scored("a", 1), scored("b", 2), scored("c", 1), scored("d", 0)]
    assert texts(pairs_of(candidates, ALL_PAIRS)) == [
        *(("b", "a"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d"))
    ]


@by_each_rule
def test_each_prompt_is_paired_by_itself_in_order(pairing: PairingConfig) -> None:
    candidates = [
        *(scored("a", 1, prompt="Q"), scored("b", 0, prompt="Q")),
        *(scored("c", 0, prompt="P"), scored("d", 1, prompt="P")),
    ]
    pairs = pairs_of(candidates, pairing)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [("Q", "a", "b"), ("P", "d", "c")]


@by_each_rule
def test_a_prompt_drawn_twice_is_one_prompt(pairing: PairingConfig) -> None:
    candidates = [scored("a", 1), scored("x", 0, prompt="P"), scored("b", 0), scored("a", 1)]
    assert texts(pairs_of(candidates, pairing)) == [("a", "b")]


@by_each_rule
def test_pairs_have_distinct_ids(pairing: PairingConfig) -> None:
    candidates = [scored(text, reward) for text, reward in [("a", 1), ("a", 1), ("b", 0), ("b", 0), ("c", 2)]]
    pairs = pairs_of(candidates, pairing)
    assert len({pair.pair_id for pair in pairs}) == len(pairs) > 0


@by_each_rule
def test_what_the_judge_could_not_say_is_no_low_score(pairing: PairingConfig) -> None:
    candidates = [scored("a", 1), scored("b", None), scored("c", 0.5)]
    assert texts(pairs_of(candidates, pairing)) == [("a", "c")]


@by_each_rule
@pytest.mark.parametrize(
    "candidates",
    [
        [],
        [scored("a", 1)],
        [scored("a", None), scored("b", None)],
        [scored("a", 1), scored("b", 1)],
        [scored("a", 1), scored("a", 0)],
        [scored("a", 1), scored("", 0)],
        [scored("a", 1), scored("b", 0, judge="another")],
    ],
    ids=["none", "one", "unjudged", "tie", "same text", "no tokens", "two judges"],
)
def test_nothing_to_compare_makes_no_pair(candidates: list[ScoredCompletion], pairing: PairingConfig) -> None:
    assert pairs_of(candidates, pairing) == []


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("margin", "num_pairs"), [(0.5, 0), (0.49, 1)])
def test_a_difference_of_exactly_the_margin_is_a_tie(rule: str, margin: float, num_pairs: int) -> None:
    pairing = config(rule, min_margin=margin)
    assert len(pairs_of([scored("a", 0.5), scored("b", 1.0)], pairing)) == num_pairs


@by_each_rule
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_names_judge_and_prompt(pairing: PairingConfig, reward: float) -> None:
    candidates = [scored("a", reward, prompt="Why so?", judge="moody")]
    with pytest.raises(ValueError, match=rf"judge moody gave the reward {reward} .*'Why so\?': return None"):
        pairs_of(candidates, pairing)


def test_answers_to_messages_are_messages() -> None:
    prompt: list[Message] = [{"role": "user", "content": "Q"}]
    candidates = [scored("a", 1, prompt=prompt), scored("b", 0, prompt=prompt)]
    (pair,) = pairs_of(candidates, BEST_VS_WORST)
    assert pair.prompt == prompt
    assert pair.chosen == [{"role": "assistant", "content": "a"}]
    assert pair.rejected == [{"role": "assistant", "content": "b"}]
