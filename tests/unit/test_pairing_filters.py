"""What is too alike, too unlike in length, or degenerate makes no pair."""

from random import Random

import pytest
from scored import config, pairs_of, scored, texts

from dpo_ray.pairing import make_pairs
from dpo_ray.pairing.filters import common_tokens, length_ratio, similarity
from dpo_ray.types import ScoredCompletion


def longest_common_subsequence(one: list[int], other: list[int]) -> int:
    """By the textbook's table."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_common_tokens_are_those_of_the_textbooks_table() -> None:
    random = Random(0)
    for _ in range(500):
        kinds = random.randint(1, 6)
        one, other = ([random.randrange(kinds) for _ in range(random.randint(1, 40))] for _ in range(2))
        assert (
            common_tokens(one, other) == common_tokens(other, one) == longest_common_subsequence(one, other)
        )


def test_similarity_by_hand() -> None:
    assert similarity([1, 2, 3], [1, 2, 3]) == 1
    assert similarity([1, 2, 3], [4, 5]) == 0
    assert similarity([1, 2, 3, 4], [2, 4]) == pytest.approx(2 * 2 / 6)
    assert similarity([1, 2], [2, 1]) == 0.5  # The order counts.


@pytest.mark.parametrize(("bound", "num_pairs"), [(None, 1), (0.75, 1), (0.74, 0)])
def test_sides_that_share_more_than_the_bound_are_no_pair(bound: float | None, num_pairs: int) -> None:
    candidates = [scored("abcx", 1), scored("abcd", 0)]  # 3 of 4 characters are tokens of both.
    made = make_pairs(candidates, config(max_similarity=bound), round_=0, seed=0)
    assert (len(made.pairs), made.counts.near_identical) == (num_pairs, 1 - num_pairs)


@pytest.mark.parametrize(("bound", "num_pairs"), [(None, 1), (2.5, 1), (2.4, 0)])
@pytest.mark.parametrize("rewards", [(1, 0), (0, 1)])
def test_sides_of_too_different_lengths_are_no_pair(
    bound: float | None, num_pairs: int, rewards: tuple[int, int]
) -> None:
    candidates = [scored("ab", rewards[0]), scored("cdefg", rewards[1])]
    made = make_pairs(candidates, config(max_length_ratio=bound), round_=0, seed=0)
    assert (len(made.pairs), made.counts.length) == (num_pairs, 1 - num_pairs)
    assert length_ratio("ab", "cdefg") == 2.5  # type: ignore[arg-type]


CUT_OFF_IS_BEST = [scored("cut", 3, end="length"), scored("good", 2), scored("poor", 1)]
CUT_OFF_IS_WORST = [scored("good", 2), scored("fair", 1), scored("cut", 0, end="length")]


@pytest.mark.parametrize(
    ("degenerate", "best", "worst"),
    [
        ("keep", [("cut", "poor")], [("good", "cut")]),
        ("reject_only", [("good", "poor")], [("good", "cut")]),
        ("drop", [("good", "poor")], [("good", "fair")]),
    ],
)
def test_a_degenerate_completion_is_kept_rejected_or_dropped(
    degenerate: str, best: list[tuple[str, str]], worst: list[tuple[str, str]]
) -> None:
    assert texts(pairs_of(CUT_OFF_IS_BEST, config(degenerate=degenerate))) == best
    assert texts(pairs_of(CUT_OFF_IS_WORST, config(degenerate=degenerate))) == worst


@pytest.mark.parametrize("flawed", [scored("   ", 3), scored("a" * 20, 3), scored("and", 3, end="length")])
def test_empty_looping_and_cut_off_completions_are_degenerate(flawed: ScoredCompletion) -> None:
    made = make_pairs([flawed, scored("b", 1), scored("c", 0)], config(degenerate="drop"), round_=0, seed=0)
    assert texts(made.pairs) == [("b", "c")]
    assert made.counts.degenerate == 1


def test_degenerate_completions_are_never_chosen_where_they_may_only_be_rejected() -> None:
    """Of all pairs: not the one in which a cut-off completion beats a worse one."""
    candidates = [scored("good", 3), scored("cut", 2, end="length"), scored("poor", 1)]
    made = make_pairs(candidates, config("all_pairs", degenerate="reject_only"), round_=0, seed=0)
    assert texts(made.pairs) == [("good", "cut"), ("good", "poor")]
    assert made.counts.degenerate_chosen == 1


def test_where_all_are_degenerate_there_is_nothing_to_choose() -> None:
    candidates = [scored("one", 1, end="length"), scored("other", 0, end="length")]
    made = make_pairs(candidates, config(degenerate="reject_only"), round_=0, seed=0)
    assert made.pairs == []
    assert made.counts.degenerate == 2


def test_a_degenerate_completion_that_is_as_good_as_the_best_is_not_in_its_way() -> None:
    candidates = [scored("cut", 2, end="length"), scored("good", 2), scored("poor", 1)]
    assert texts(pairs_of(candidates, config(degenerate="reject_only"))) == [("good", "poor")]


def test_a_text_that_was_cut_off_once_and_ended_once_is_the_one_that_ended() -> None:
    candidates = [scored("a", 1, end="length"), scored("a", 1), scored("b", 0)]
    (pair,) = pairs_of(candidates, config(degenerate="drop"))
    assert (pair.chosen, pair.rejected) == ("a", "b")
