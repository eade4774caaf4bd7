"""A round takes its pairs in an order of its own, is evaluated as it should be, and stops where it should."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learners import make_learner
from textbook import make_pairs
from torch import Tensor

from dpo_ray.config import TrainingConfig
from dpo_ray.learner import TrainingError
from dpo_ray.metrics import StepMetrics
from dpo_ray.rounds import RoundPlan, RoundResult, train_round
from dpo_ray.types import Pair

PAIRS, HELD_OUT = make_pairs(10), make_pairs(2, seed=1)


class FakeLearner:
    """Counts steps as its one weight, and measures what it is told to."""

    def __init__(self, measured: Sequence[StepMetrics] = (), **settings: Any) -> None:
        self.config = TrainingConfig.model_validate({"batch_size": 4, **settings})
        self.reference = SimpleNamespace(begin_round=self.begin_round)
        self.weight = 0
        self.batches: list[list[str]] = []
        self.progress: list[float] = []
        self.prepared: list[list[str]] = []
        self._measured = iter(measured)

    def begin_round(self, batches: Sequence[Sequence[Pair]]) -> None:
        self.prepared = ids(batches)

    def train_step(self, batch: Sequence[Pair], *, progress: float) -> StepMetrics:
        self.weight += 1
        self.batches += ids([batch])
        self.progress.append(progress)
        return {"step": self.weight}

    def evaluate(self, pairs: Sequence[Pair]) -> StepMetrics:
        assert pairs == HELD_OUT
        return next(self._measured)

    def weights(self) -> list[Tensor]:
        return [torch.tensor(self.weight)]

    def load_weights(self, weights: list[Tensor]) -> None:
        (weight,) = weights
        self.weight = int(weight)


def ids(batches: Sequence[Sequence[Pair]]) -> list[list[str]]:
    return [[pair.pair_id for pair in batch] for batch in batches]


def run(learner: Any, **plan: Any) -> RoundResult:
    whole = RoundPlan(**{"pairs": PAIRS, "seed": 0, "held_out": HELD_OUT, **plan})
    return train_round(learner, whole, on_step=lambda metrics, num_steps: None)


def accuracies(*values: float) -> list[StepMetrics]:
    return [{"rewards/accuracies": value} for value in values]


def test_each_epoch_has_every_pair_once_in_an_order_of_its_own() -> None:
    learner = FakeLearner(epochs=2)
    seen: list[tuple[float, int]] = []
    plan = RoundPlan(PAIRS, seed=0)
    train_round(learner, plan, on_step=lambda metrics, total: seen.append((metrics["step"], total)))  # type: ignore[arg-type]
    assert [len(batch) for batch in learner.batches] == [4, 4, 2, 4, 4, 2]
    epochs = [list(chain(*learner.batches[:3])), list(chain(*learner.batches[3:]))]
    assert [sorted(epoch) for epoch in epochs] == [sorted(pair.pair_id for pair in PAIRS)] * 2
    assert epochs[0] != epochs[1]
    assert seen == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]


def test_seed_and_round_decide_the_order() -> None:
    def order(**plan: int) -> list[list[str]]:
        learner = FakeLearner()
        run(learner, rounds=3, **plan)
        return learner.batches

    assert order(seed=0, round=1) == order(seed=0, round=1)
    assert len({str(order(seed=seed, round=number)) for seed in (0, 1) for number in (0, 1)}) == 4


def test_the_reference_prepares_the_batches_of_an_epoch_and_the_held_out_pairs() -> None:
    learner = FakeLearner(epochs=2)
    run(learner)
    assert learner.prepared == [*learner.batches[:3], *ids([HELD_OUT])]
    run(learner, held_out=())
    assert learner.prepared == learner.batches[:3]


def test_progress_goes_from_0_to_1_over_all_rounds() -> None:
    learner = FakeLearner()
    for number in range(2):
        run(learner, round=number, rounds=2)
    assert learner.progress == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])


def test_held_out_pairs_are_looked_at_every_few_steps() -> None:
    stopping = {"eval_every_steps": 2}
    measured = [{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}]
    history = run(FakeLearner(measured, early_stopping=stopping, epochs=2)).history
    assert [metrics.get("eval/loss") for metrics in history] == [None, 1, None, 2, None, 3]
    assert [metrics.get("eval/loss") for metrics in run(FakeLearner(measured)).history] == [None] * 3


def stopping(**bounds: float) -> dict[str, Any]:
    return {"early_stopping": {"eval_every_steps": 1, **bounds}, "epochs": 2}


def test_patience_ends_training_and_brings_the_best_weights_back() -> None:
    learner = FakeLearner(accuracies(0.5, 0.7, 0.7, 0.6), **stopping(patience=2))
    result = run(learner)
    assert len(result.history) == 4
    assert learner.weight == 2
    assert result.stopped == "rewards/accuracies did not rise above 0.700 in 2 evaluations"


def test_patience_starts_again_after_each_better_evaluation() -> None:
    learner = FakeLearner(accuracies(0.5, 0.4, 0.6, 0.5, 0.7, 0.6), **stopping(patience=2))
    result = run(learner)
    assert (len(result.history), learner.weight, result.stopped) == (6, 5, "")


def test_an_accuracy_of_0_is_better_than_none_at_all() -> None:
    learner = FakeLearner(accuracies(0.0, 0.0), **stopping(patience=1))
    assert len(run(learner).history) == 2
    assert learner.weight == 1


def test_every_round_has_patience_anew() -> None:
    learner = FakeLearner(accuracies(0.9, 0.5, 0.6, 0.5), **stopping(patience=1))
    assert [len(run(learner).history) for _ in range(2)] == [2, 2]
    assert learner.weight == 2  # One step of the first round, and one of the second.


def test_training_ends_where_the_kl_is_above_its_bound() -> None:
    learner = FakeLearner([{"kl/reference": kl} for kl in (0.2, 0.5, 0.51)], **stopping(max_kl=0.5))
    result = run(learner)
    assert (len(result.history), learner.weight) == (3, 3)
    assert result.stopped == "KL to the reference 0.51 nats"


def test_training_ends_where_the_chosen_log_prob_falls_too_far() -> None:
    measured = [{"chosen_log_ratio": ratio} for ratio in (3.0, -2.0, -2.5)]
    learner = FakeLearner(measured, **stopping(max_chosen_drop=2.0))
    result = run(learner)
    assert (len(result.history), learner.weight) == (3, 3)
    assert result.stopped == "chosen log-prob 2.50 nats below the reference's"


def test_patience_without_a_held_out_pair_that_has_both_sides_is_refused() -> None:
    down = [replace(pair, chosen_ids=()) for pair in HELD_OUT]
    with pytest.raises(TrainingError, match=r"patience=2 looks at rewards/accuracies.*set max_kl"):
        run(FakeLearner(**stopping(patience=2)), held_out=down)
    run(FakeLearner([{}] * 6, **stopping(max_kl=1.0)), held_out=HELD_OUT)


def test_a_real_learner_stops_at_a_bound_and_keeps_its_best_weights(tiny_model: Path) -> None:
    settings = {"learning_rate": 1e-2, "batch_size": 4}
    learner = make_learner(tiny_model, **settings, **stopping(max_kl=0.01))
    result = run(learner)
    assert result.stopped.startswith("KL to the reference")
    assert len(result.history) < 6
    assert learner.evaluate(HELD_OUT)["kl/reference"] == result.history[-1]["eval/kl/reference"] > 0.01

    learner = make_learner(tiny_model, **settings, **stopping(patience=1))
    measured = [metrics["eval/rewards/accuracies"] for metrics in run(learner).history]
    assert learner.evaluate(HELD_OUT)["rewards/accuracies"] == max(measured)
