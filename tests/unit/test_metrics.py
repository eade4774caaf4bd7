"""A round's numbers are what a reader computes by hand."""

import math

import pytest
from test_buffer import all_of_round

from dpo_ray.buffer import SnapshotManifest
from dpo_ray.metrics import pair_metrics, read_steps, sample_metrics, write_steps
from dpo_ray.pairing import PairYield
from dpo_ray.storage import Storage
from dpo_ray.types import Completion, Judgement, Prompt, ScoredCompletion


def scored(reward: float | None, num_tokens: int, version: int = 3, **metrics: float) -> ScoredCompletion:
    completion = Completion(Prompt("Q", (1,)), "text", (7,) * num_tokens, -1.0, version, "stop")
    return ScoredCompletion(completion, Judgement(reward, metrics), "taste")


def test_sample_metrics_by_hand() -> None:
    items = [scored(1.0, 4, fluent=1.0), scored(2.0, 6, 4), scored(None, 2), scored(6.0, 8, fluent=0.0)]
    assert sample_metrics(items) == {
        "sample_version": 3,
        "reward/mean": pytest.approx(3.0),
        "reward/std": pytest.approx(math.sqrt((4 + 1 + 9) / 3)),
        "length/mean": pytest.approx(5.0),
        "samples/unjudged": 1,
        "judge/fluent": pytest.approx(0.5),
    }


def test_a_round_that_no_judge_could_rate_has_no_reward() -> None:
    metrics = sample_metrics([scored(None, 4), scored(None, 6)])
    assert math.isnan(metrics["reward/mean"])
    assert math.isnan(metrics["reward/std"])
    assert metrics["samples/unjudged"] == 2


def test_pairs_made_and_pairs_trained_on_are_two_numbers() -> None:
    snapshot = SnapshotManifest(
        round=2, rows=17, sha256="", age_mean=0.75, query=all_of_round(2), created_at=""
    )
    counts = PairYield(completions=16, matched=6, tie=1, made=5, not_drawn=3, kept=2)
    metrics = pair_metrics(counts, snapshot)
    assert (metrics["pairs/made"], metrics["pairs/kept"], metrics["pairs/age_mean"]) == (5, 17, 0.75)
    assert (metrics["yield/completions"], metrics["yield/tie"], metrics["yield/kept"]) == (16, 1, 2)


def test_steps_come_back_and_are_replaced_as_a_whole(storage: Storage) -> None:
    assert read_steps(storage, 1) == []
    write_steps(storage, 1, [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 0.5}])
    write_steps(storage, 1, [{"step": 1, "loss": 0.1 + 0.2}])
    assert read_steps(storage, 1) == [{"step": 1, "loss": 0.1 + 0.2}]
    assert read_steps(storage, 2) == []
