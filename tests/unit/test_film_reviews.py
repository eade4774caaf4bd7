"""The reviews that the grammar writes, and what the judge says of them."""

import random

import pytest

from dpo_ray.film_reviews import (
    MAX_CLAUSES,
    VOCABULARY,
    generate_pairs,
    generate_prompts,
    generate_review,
    generate_reviews,
    is_grammatical,
    judge_reviews,
    sentiment,
)
from dpo_ray.types import Completion, Judgement, Prompt, Text

REVIEW = "the film was dull but the acting felt truly superb and these jokes are weak ."


def judge(prompt: Text, text: str, *, finish_reason: str = "stop") -> Judgement:
    completion = Completion(
        prompt=Prompt(text=prompt, token_ids=()),
        text=text,
        token_ids=(),
        logp=0.0,
        policy_version=0,
        finish_reason=finish_reason,
    )
    return judge_reviews([completion])[0]


def test_every_generated_review_is_grammatical() -> None:
    assert all(is_grammatical(review) for review in generate_reviews(2000, seed=0))


def test_generated_reviews_use_the_whole_vocabulary_and_no_other_word() -> None:
    words = {word for review in generate_reviews(2000, seed=0) for word in review.split()}
    assert words == set(VOCABULARY)


def test_a_hand_made_review_is_grammatical() -> None:
    assert is_grammatical(REVIEW)


@pytest.mark.parametrize(
    "text",
    [
        "",
        REVIEW.removesuffix(" ."),
        f"{REVIEW} and",
        f"but {REVIEW}",
        f" {REVIEW}",
        f"{REVIEW}\n",
        REVIEW.replace("these jokes are", "these jokes is"),
        REVIEW.replace("these jokes", "this jokes"),
        REVIEW.replace("the film was", "film the was"),
        REVIEW.replace("truly superb", "superb truly"),
        REVIEW.replace(" but", ""),
        REVIEW.replace("dull", "splendid"),
        "the film was dull .",
        " and ".join(["the film was dull"] * (MAX_CLAUSES + 1)) + " .",
    ],
)
def test_a_broken_review_is_not_grammatical(text: str) -> None:
    assert not is_grammatical(text)


def test_a_review_that_lost_any_word_but_opener_or_adverb_is_not_grammatical() -> None:
    words = REVIEW.split()
    for index in range(len(words)):
        without = " ".join(words[:index] + words[index + 1 :])
        assert is_grammatical(without) == (words[index] == "truly")


def test_sentiment_is_the_share_of_positive_opinions() -> None:
    assert sentiment(REVIEW) == pytest.approx(1 / 3)
    assert sentiment("the film was") is None


def test_reviews_are_neutral_on_average() -> None:
    sentiments = [sentiment(review) or 0.0 for review in generate_reviews(5000, seed=1)]
    assert sum(sentiments) / len(sentiments) == pytest.approx(0.5, abs=0.02)


def test_a_seed_decides_the_reviews_and_the_prompts() -> None:
    assert generate_reviews(20, seed=3) == generate_reviews(20, seed=3)
    assert generate_prompts(20, seed=3) == generate_prompts(20, seed=3)
    assert generate_prompts(20, seed=3) != generate_prompts(20, seed=4)


def test_a_prompt_opens_a_review_and_gives_no_opinion() -> None:
    for prompt in generate_prompts(500, seed=0):
        assert len(prompt.split()) >= 2
        assert sentiment(prompt) is None


def test_prompts_are_diverse() -> None:
    assert len(set(generate_prompts(1000, seed=0))) > 500


def test_reviews_continue_a_shared_generator() -> None:
    rng = random.Random(3)
    assert [generate_review(rng), generate_review(rng)] == generate_reviews(2, seed=3)


def test_the_judge_rewards_what_the_policy_wrote_and_not_the_prompt() -> None:
    written = "but the acting felt truly superb and these jokes are weak ."
    assert judge("the film was dull", written) == Judgement(reward=0.5, metrics={"grammatical": 1.0})


def test_a_completion_may_start_with_a_space() -> None:
    judgement = judge("the film", REVIEW.removeprefix("the film"))
    assert judgement.metrics == {"grammatical": 1.0}


def test_a_completion_that_was_cut_off_is_not_grammatical() -> None:
    judgement = judge("the film", REVIEW.removeprefix("the film"), finish_reason="length")
    assert judgement.metrics == {"grammatical": 0.0}


def test_a_completion_without_opinion_earns_nothing() -> None:
    assert judge("the film", "was .") == Judgement(reward=0.0, metrics={"grammatical": 0.0})


def test_a_conversation_is_judged_by_its_last_message() -> None:
    conversation: Text = [
        {"role": "system", "content": "You review films."},
        {"role": "user", "content": "the film was"},
    ]
    judgement = judge(conversation, REVIEW.removeprefix("the film was "))
    assert judgement == Judgement(reward=1 / 3, metrics={"grammatical": 1.0})


def test_both_completions_of_a_generated_pair_finish_a_review() -> None:
    for pair in generate_pairs(500, seed=0):
        assert is_grammatical(pair.prompt + pair.chosen)
        assert is_grammatical(pair.prompt + pair.rejected)
        assert len(pair.prompt.split()) >= 2
        assert sentiment(pair.prompt) is None


def test_the_judge_gives_a_generated_pair_its_rewards_and_prefers_the_chosen() -> None:
    for pair in generate_pairs(500, seed=0):
        assert judge(pair.prompt, pair.chosen).reward == pair.chosen_reward == 1.0
        assert judge(pair.prompt, pair.rejected).reward == pair.rejected_reward < 1.0


def test_generated_pairs_are_diverse_in_both_sides_and_rewards() -> None:
    pairs = generate_pairs(500, seed=0)
    assert len({pair.chosen for pair in pairs}) == len({pair.rejected for pair in pairs}) == 500
    assert {round(12 * pair.rejected_reward) for pair in pairs} == {0, 3, 4, 6, 8, 9}  # k/3 and k/4.
    assert pairs == generate_pairs(500, seed=0) != generate_pairs(500, seed=1)
