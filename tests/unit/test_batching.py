"""Flat rows hold every prompt once and no token that predicts nothing; passes and shares lose no group."""

import random

import pytest
import torch
from textbook import make_groups

from dpo_ray.batching import (
    FlatRow,
    PaddedRows,
    PromptGroup,
    flatten,
    offsets,
    pad,
    pair_groups,
    sequence_groups,
    split_by_tokens,
    split_evenly,
)
from dpo_ray.types import Pair, TokenSequence

CPU = torch.device("cpu")
GROUPS = [
    PromptGroup((5,), ((7,), (8, 9), (10, 11, 12))),
    PromptGroup((1, 2, 3), ((4, 5), (6,))),
]


@pytest.fixture
def row() -> FlatRow:
    return flatten(GROUPS, CPU)


def test_the_tokens_of_a_flat_row_by_hand(row: FlatRow) -> None:
    # 5 | (7) | 8 (9) | 10 11 (12) || 1 2 3 | 4 (5) | (6), where the last of a completion is left out.
    assert row.input_ids.tolist() == [[5, 8, 10, 11, 1, 2, 3, 4]]
    assert row.position_ids.tolist() == [[0, 1, 1, 2, 0, 1, 2, 3]]
    assert row.lengths == ((1, 0, 1, 2), (3, 1, 0))


def test_each_completion_token_is_predicted_by_the_token_before_it(row: FlatRow) -> None:
    assert row.targets.tolist() == [7, 8, 9, 10, 11, 12, 4, 5, 6]
    assert row.sources.tolist() == [0, 0, 1, 0, 2, 3, 6, 7, 6]
    assert row.completion_of_token.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 4]
    assert row.tokens_of_group == (6, 3)
    assert row.completions_of_group == (3, 2)


def test_segments_name_group_and_part_of_each_token(row: FlatRow) -> None:
    groups, parts = row.segments
    assert groups.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert parts.tolist() == [0, 2, 3, 3, 0, 0, 0, 1]


def test_a_group_counts_the_tokens_of_its_flat_row() -> None:
    assert [group.num_tokens for group in GROUPS] == [4, 4]
    for group in make_groups(20):
        assert flatten([group], CPU).input_ids.shape == (1, group.num_tokens)


def test_padded_rows_by_hand() -> None:
    rows = pad([PromptGroup((5, 6), ((7,), (0, 9))), PromptGroup((8,), ((9, 10, 11),))], CPU)
    assert isinstance(rows, PaddedRows)
    assert rows.input_ids.tolist() == [[5, 6, 7, 0], [5, 6, 0, 9], [8, 9, 10, 11]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert rows.completion_mask.int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize("lay_out", [flatten, pad])
def test_a_prompt_without_tokens_predicts_nothing(lay_out: type) -> None:
    with pytest.raises(ValueError, match="BOS"):
        lay_out([*GROUPS, PromptGroup((), ((1, 2),))], CPU)


def test_a_pair_is_a_group_of_the_completions_that_it_has() -> None:
    def pair(chosen: tuple[int, ...], rejected: tuple[int, ...]) -> Pair:
        return Pair("p", "", "", prompt_ids=(1,), chosen_ids=chosen, rejected_ids=rejected)

    groups = pair_groups([pair((2,), (3, 4)), pair((5,), ()), pair((), (6,))])
    assert groups == [((1,), ((2,), (3, 4))), ((1,), ((5,),)), ((1,), ((6,),))]


def test_only_neighbours_share_a_prompt() -> None:
    # The lists and tuples that ids come in do not matter.
    sequences = [((1,), (2,)), ([1], [3]), ((4,), (5,)), ((1,), (6,))]
    groups = sequence_groups([TokenSequence(*sequence) for sequence in sequences])
    assert [[list(ids) for ids in group.completions] for group in groups] == [[[2], [3]], [[5]], [[6]]]
    assert [list(group.prompt_ids) for group in groups] == [[1], [4], [1]]


@pytest.mark.parametrize("limit", [1, 12, 20, 60, 10_000])
def test_passes_are_neighbours_that_fit_and_no_pass_could_be_longer(limit: int) -> None:
    groups = make_groups(40)
    sizes = [group.num_tokens for group in groups]
    passes = split_by_tokens(groups, limit)
    assert [index for part in passes for index in part] == list(range(40))
    for part, following in zip(passes, [*passes[1:], range(0)], strict=True):
        tokens = sum(sizes[index] for index in part)
        assert tokens <= limit or len(part) == 1
        assert not following or tokens + sizes[following[0]] > limit
    assert split_by_tokens([], limit) == []


def test_shares_by_hand() -> None:
    # Dearest first, back and forth: 5 | 4 3 | 2 1.
    assert split_evenly([5, 1, 4, 2, 3], 2) == [[0, 3, 1], [2, 4]]
    assert split_evenly([7], 3) == [[0], [], []]


@pytest.mark.parametrize("num_shares", [1, 2, 3, 8])
def test_shares_hold_each_item_once_and_cost_about_the_same(num_shares: int) -> None:
    rng = random.Random(0)
    for _ in range(50):
        costs = [rng.randint(1, 100) for _ in range(rng.randint(1, 40))]
        shares = split_evenly(costs, num_shares)
        assert sorted(index for share in shares for index in share) == list(range(len(costs)))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        totals = [sum(costs[index] for index in share) for share in shares]
        assert max(totals) - min(totals) <= max(costs)


def test_offsets_are_the_bounds_of_consecutive_pieces() -> None:
    assert offsets([2, 0, 3]) == [0, 2, 2, 5]
