"""Only what a judge told apart becomes a pair."""

import math

import pytest

from dpo_ray.config import PairingConfig
from dpo_ray.pairing import make_pairs
from dpo_ray.types import Completion, Judgement, Message, Pair, Prompt, ScoredCompletion, Text

BEST_VS_WORST = PairingConfig(rule="best_vs_worst")
ALL_PAIRS = PairingConfig(rule="all_pairs")


def scored(
    text: str,
    reward: float | None,
    *,
    prompt: Text = "Q",
    token_ids: tuple[int, ...] | None = None,
    version: int = 3,
    judge: str = "taste",
) -> ScoredCompletion:
    ids = tuple(map(ord, text)) if token_ids is None else token_ids
    asked = Prompt(prompt, tuple(map(ord, str(prompt))))
    completion = Completion(asked, text, ids, logp=-len(text), policy_version=version, finish_reason="stop")
    return ScoredCompletion(completion, Judgement(reward), judge)


def texts(pairs: list[Pair]) -> list[tuple[Text, Text]]:
    return [(pair.chosen, pair.rejected) for pair in pairs]


def test_best_vs_worst_pairs_the_extremes_with_all_that_is_known_of_them() -> None:
    candidates = [scored("mid", 0.5), scored("good", 0.9, version=4), scored("poor!", 0.1, version=2)]
    assert make_pairs(candidates, BEST_VS_WORST, round_=7) == [
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
        )
    ]


def test_the_first_counts_among_equal_rewards() -> None:
    candidates = [scored("a", 1), scored("b", 0), scored("c", 1), scored("d", 0)]
    assert texts(make_pairs(candidates, BEST_VS_WORST, round_=0)) == [("a", "b")]


def test_all_pairs_pairs_each_two_that_are_no_tie() -> None:
    candidates = [scored("a", 1), scored("b", 2), scored("c", 1), scored("d", 0)]
    assert texts(make_pairs(candidates, ALL_PAIRS, round_=0)) == [
        *(("b", "a"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d"))
    ]


@pytest.mark.parametrize("config", [BEST_VS_WORST, ALL_PAIRS])
def test_each_prompt_is_paired_by_itself_in_order(config: PairingConfig) -> None:
    candidates = [
        *(scored("a", 1, prompt="Q"), scored("b", 0, prompt="Q")),
        *(scored("c", 0, prompt="P"), scored("d", 1, prompt="P")),
    ]
    pairs = make_pairs(candidates, config, round_=0)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [("Q", "a", "b"), ("P", "d", "c")]


@pytest.mark.parametrize("config", [BEST_VS_WORST, ALL_PAIRS])
def test_a_prompt_drawn_twice_is_one_prompt(config: PairingConfig) -> None:
    candidates = [scored("a", 1), scored("x", 0, prompt="P"), scored("b", 0), scored("a", 1)]
    assert texts(make_pairs(candidates, config, round_=0)) == [("a", "b")]


@pytest.mark.parametrize("config", [BEST_VS_WORST, ALL_PAIRS])
def test_pairs_have_distinct_ids(config: PairingConfig) -> None:
    candidates = [scored(text, reward) for text, reward in [("a", 1), ("a", 1), ("b", 0), ("b", 0), ("c", 2)]]
    pairs = make_pairs(candidates, config, round_=0)
    assert len({pair.pair_id for pair in pairs}) == len(pairs) > 0


@pytest.mark.parametrize("config", [BEST_VS_WORST, ALL_PAIRS])
def test_what_the_judge_could_not_say_is_no_low_score(config: PairingConfig) -> None:
    candidates = [scored("a", 1), scored("b", None), scored("c", 0.5)]
    assert texts(make_pairs(candidates, config, round_=0)) == [("a", "c")]


@pytest.mark.parametrize("config", [BEST_VS_WORST, ALL_PAIRS])
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
def test_nothing_to_compare_makes_no_pair(candidates: list[ScoredCompletion], config: PairingConfig) -> None:
    assert make_pairs(candidates, config, round_=0) == []


@pytest.mark.parametrize("rule", ["best_vs_worst", "all_pairs"])
@pytest.mark.parametrize(("margin", "num_pairs"), [(0.5, 0), (0.49, 1)])
def test_a_difference_of_exactly_the_margin_is_a_tie(rule: str, margin: float, num_pairs: int) -> None:
    config = PairingConfig.model_validate({"rule": rule, "min_margin": margin})
    assert len(make_pairs([scored("a", 0.5), scored("b", 1.0)], config, round_=0)) == num_pairs


@pytest.mark.parametrize("config", [BEST_VS_WORST, ALL_PAIRS])
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_names_judge_and_prompt(config: PairingConfig, reward: float) -> None:
    candidates = [scored("a", reward, prompt="Why so?", judge="moody")]
    with pytest.raises(ValueError, match=rf"judge moody gave the reward {reward} .*'Why so\?': return None"):
        make_pairs(candidates, config, round_=0)


def test_answers_to_messages_are_messages() -> None:
    prompt: list[Message] = [{"role": "user", "content": "Q"}]
    candidates = [scored("a", 1, prompt=prompt), scored("b", 0, prompt=prompt)]
    (pair,) = make_pairs(candidates, BEST_VS_WORST, round_=0)
    assert pair.prompt == prompt
    assert pair.chosen == [{"role": "assistant", "content": "a"}]
    assert pair.rejected == [{"role": "assistant", "content": "b"}]
