"""Log-probs of completions find their way to the pair and side that they belong to."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpo_ray.lm_head import CompletionSums
from dpo_ray.pair_batch import PairBatch
from dpo_ray.types import Pair


def pair(num_chosen: int, num_rejected: int, **fields: float) -> Pair:
    ids = tuple(range(3, 3 + max(num_chosen, num_rejected)))
    whole = Pair(
        "p", "a", "b", prompt_ids=(1, 2), chosen_ids=ids[:num_chosen], rejected_ids=ids[:num_rejected]
    )
    return replace(whole, **fields)


PAIRS = [
    pair(3, 2, weight=2.0, chosen_logp=-1.5, rejected_logp=-2.5),
    pair(4, 0),
    pair(0, 5, weight=0.5, rejected_logp=-4.0),
    pair(1, 1),
]
"""Completions 0 and 1, 2, 3, and 4 and 5."""
REFERENCES = [(-1.0, -2.0), (-3.0, 0.0), (0.0, -4.0), (-5.0, -6.0)]


@pytest.fixture
def batch() -> PairBatch:
    return PairBatch(PAIRS, REFERENCES, torch.device("cpu"))


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_completions_are_numbered_pair_by_pair(batch: PairBatch) -> None:
    assert batch.completions([0, 1, 2, 3]) == [0, 1, 2, 3, 4, 5]
    assert batch.completions([3, 0]) == [4, 5, 0, 1]
    assert [len(group.completions) for group in batch.groups] == [2, 1, 1, 2]


def test_a_side_that_a_pair_lacks_has_log_prob_and_length_0(batch: PairBatch) -> None:
    logps = batch.logps(range(4), CompletionSums(values(10, 11, 12, 13, 14, 15)))
    assert logps.chosen.tolist() == [10, 12, 0, 14]
    assert logps.rejected.tolist() == [11, 0, 13, 15]
    assert logps.chosen_length.tolist() == [3, 4, 0, 1]
    assert logps.rejected_length.tolist() == [2, 0, 5, 1]


def test_some_pairs_in_another_order_keep_their_own(batch: PairBatch) -> None:
    sums = CompletionSums(values(14, 15, 13, 10, 11), square=values(4, 5, 3, 0, 1), kl=values(7, 8, 6, 1, 2))
    logps = batch.logps([3, 2, 0], sums)
    assert logps.chosen.tolist() == [14, 0, 10]
    assert logps.rejected.tolist() == [15, 13, 11]
    assert logps.ref_chosen.tolist() == [-5, 0, -1]
    assert logps.ref_rejected.tolist() == [-6, -4, -2]
    assert logps.weight.tolist() == [1, 0.5, 2]
    assert logps.chosen_square is not None and logps.rejected_square is not None
    assert (logps.chosen_square.tolist(), logps.rejected_square.tolist()) == ([4, 0, 0], [5, 3, 1])
    assert logps.chosen_kl is not None and logps.rejected_kl is not None
    assert (logps.chosen_kl.tolist(), logps.rejected_kl.tolist()) == ([7, 0, 1], [8, 6, 2])


def test_the_mean_chosen_length_is_the_whole_batchs(batch: PairBatch) -> None:
    assert batch.logps([0], CompletionSums(values(1, 2))).mean_chosen_length == (3 + 4 + 0 + 1) / 4


def test_what_the_sampler_did_not_record_is_nan(batch: PairBatch) -> None:
    logps = batch.logps([2, 0], CompletionSums(values(1, 2, 3)))
    assert logps.chosen_sampled is not None and logps.rejected_sampled is not None
    assert logps.chosen_sampled.nan_to_num(99).tolist() == [99, -1.5]
    assert logps.rejected_sampled.tolist() == [-4, -2.5]


def test_gradients_go_back_to_the_completions_that_they_came_from(batch: PairBatch) -> None:
    sums = values(14, 15, 13, 10, 11).requires_grad_()
    logps = batch.logps([3, 2, 0], CompletionSums(sums))
    (logps.chosen * values(1, 2, 3) + logps.rejected * values(4, 5, 6)).sum().backward()
    assert sums.grad is not None
    assert sums.grad.tolist() == [1, 4, 5, 3, 6]


def test_what_concerns_the_whole_batch_is_handed_on(batch: PairBatch) -> None:
    extras = {"mismatched_ratio": values(1, 2, 3, 4), "running_reward": values(5)}
    logps = batch.logps(range(4), CompletionSums(values(1, 2, 3, 4, 5, 6)), **extras)
    assert logps.mismatched_ratio is extras["mismatched_ratio"]
    assert logps.running_reward is extras["running_reward"]
