"""Rows hold each sequence once, on the left, and say what is prompt, completion and padding."""

import torch

from dpo_ray.batching import pad_rows, pair_sequences
from dpo_ray.types import Pair, TokenSequence


def test_rows_by_hand() -> None:
    rows = pad_rows([TokenSequence([5, 6], [7]), TokenSequence((8,), (9, 10, 11))])
    assert rows.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert rows.completion_mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert rows.completion_mask.dtype == torch.bool


def test_a_token_with_the_padding_id_is_still_a_token() -> None:
    rows = pad_rows([TokenSequence([0], [0]), TokenSequence([1], [2, 3])])
    assert rows.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert rows.completion_mask.tolist() == [[False, True, False], [False, True, True]]


def test_moving_rows_keeps_each_field_in_its_place() -> None:
    rows = pad_rows([TokenSequence([5, 6], [7, 8]), TokenSequence([9], [10])])
    moved = rows.to(torch.device("cpu"))
    assert torch.equal(moved.input_ids, rows.input_ids)
    assert torch.equal(moved.attention_mask, rows.attention_mask)
    assert torch.equal(moved.completion_mask, rows.completion_mask)


def test_all_chosen_come_before_all_rejected() -> None:
    pairs = [
        Pair("p", "a", "b", prompt_ids=(1,), chosen_ids=(2,), rejected_ids=(3, 4)),
        Pair("q", "c", "d", prompt_ids=(5, 6), chosen_ids=(7,), rejected_ids=(8,)),
    ]
    assert pair_sequences(pairs) == [((1,), (2,)), ((5, 6), (7,)), ((1,), (3, 4)), ((5, 6), (8,))]
