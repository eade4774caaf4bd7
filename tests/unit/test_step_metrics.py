"""Metrics by hand: means over pairs, and of a side over the pairs that have it."""

import pytest
import torch

from dpo_ray.config import TrainingConfig
from dpo_ray.losses import PairLogps
from dpo_ray.step_metrics import batch_metrics, mean_reward


def logps(
    rows: list[tuple[float, float, float, float]], lengths: list[tuple[int, int]] | None = None
) -> PairLogps:
    """Rows of chosen, rejected, and both of the reference."""
    values = torch.tensor(rows, dtype=torch.float64).unbind(1)
    lengths = lengths or [(2, 4)] * len(rows)
    num_chosen, num_rejected = torch.tensor(lengths).unbind(1)
    return PairLogps(values[0], values[1], values[2], values[3], num_chosen, num_rejected)


def config(**settings: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"loss": {"beta": 0.5}, **settings})


def test_metrics_by_hand() -> None:
    rows = logps([(-4, -8, -6, -7), (-3, -5, -2, -9)])  # Rewards 1 and -0.5, and -0.5 and 2.
    assert batch_metrics(torch.tensor([0.25, 0.75]), rows, config()) == {
        "loss": 0.5,
        "rewards/chosen": 0.25,
        "rewards/rejected": 0.75,
        "rewards/accuracies": 0.5,
        "rewards/margins": -0.5,
        "logps/chosen": -3.5,
        "logps/rejected": -6.5,
        "chosen_log_ratio": 0.5,
    }


def test_equal_rewards_count_as_wrong() -> None:
    rows = logps([(-4, -8, -4, -8)] * 3)
    assert batch_metrics(torch.zeros(3), rows, config())["rewards/accuracies"] == 0.0


def test_pairs_that_lack_a_side_count_for_the_other_one() -> None:
    rows = logps([(-4, 0, -6, 0), (0, -5, 0, -9), (-1, -1, -2, -1)], [(2, 0), (0, 3), (1, 1)])
    assert batch_metrics(torch.zeros(3), rows, config(loss={"type": "kto", "beta": 0.5})) == {
        "loss": 0.0,
        "rewards/chosen": (1 + 0.5) / 2,
        "rewards/rejected": (2 + 0) / 2,
        "rewards/accuracies": 1.0,
        "rewards/margins": 0.5,
        "logps/chosen": -2.5,
        "logps/rejected": -3.0,
        "chosen_log_ratio": 1.5,
    }


def test_what_no_pair_has_is_left_out() -> None:
    rows = logps([(-4, 0, -6, 0)], [(2, 0)])
    metrics = batch_metrics(torch.zeros(1), rows, config(loss={"type": "bco"}))
    assert set(metrics) == {"loss", "rewards/chosen", "logps/chosen", "chosen_log_ratio"}


def test_a_loss_without_reference_has_rewards_of_its_own_and_no_log_ratio() -> None:
    rows = logps([(-4, -8, 0, 0)])
    metrics = batch_metrics(torch.zeros(1), rows, config(loss={"type": "simpo", "beta": 0.5}))
    assert metrics["rewards/chosen"] == 0.5 * -4 / 2
    assert metrics["rewards/rejected"] == 0.5 * -8 / 4
    assert "chosen_log_ratio" not in metrics
    bounded = config(loss={"type": "simpo"}, early_stopping={"eval_every_steps": 1, "max_chosen_drop": 1.0})
    assert batch_metrics(torch.zeros(1), rows, bounded)["chosen_log_ratio"] == -4.0


def test_the_mean_reward_is_over_the_completions_that_are_there() -> None:
    rows = logps([(-4, 0, -6, 0), (0, -5, 0, -9), (-1, -1, -2, -1)], [(2, 0), (0, 3), (1, 1)])
    count, mean = mean_reward(rows, config(loss={"type": "bco", "beta": 0.5}).loss)
    assert count == 4
    assert mean == pytest.approx((1 + 2 + 0.5 + 0) / 4)
