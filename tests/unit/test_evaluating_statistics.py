"""Intervals cover what they say, a difference is called settled only where it is, and length is taken out."""

import math

import numpy as np
import pytest
import torch

from dpo_ray.evaluating.length_control import Duel, controlled_win_rate, fit_logistic
from dpo_ray.evaluating.statistics import (
    Estimate,
    bootstrap_mean,
    is_settled,
    prompt_means,
    prompts_needed,
)


def test_intervals_of_a_known_mean_cover_it_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    draws = rng.exponential(2.0, size=(400, 60))
    intervals = [bootstrap_mean(list(draw), resamples=400, seed=1) for draw in draws]
    covered = np.mean([low <= 2.0 <= high for _, low, high in intervals])
    assert 0.91 <= covered <= 0.97


def test_an_interval_is_as_wide_as_theory_has_it() -> None:
    values = [0.0, 1.0] * 200
    value, low, high = bootstrap_mean(values, resamples=4000, seed=0)
    assert value == 0.5
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(400), rel=0.06)


def test_the_same_seed_draws_the_same_prompts_for_both_policies() -> None:
    first = [0.1, 0.4, 0.9, 0.3]
    ours, theirs = (bootstrap_mean(v, resamples=200, seed=3) for v in (first, [2 * v for v in first]))
    assert theirs == pytest.approx([2 * bound for bound in ours])


def test_nothing_has_no_mean() -> None:
    assert all(map(math.isnan, bootstrap_mean([], resamples=100, seed=0)))


def test_a_prompt_counts_once_however_many_values_it_has() -> None:
    assert prompt_means([(7, 1.0), (2, 0.0), (7, 0.5), (2, None), (4, None)]) == [0.0, 0.75]


def test_five_prompts_that_differ_settle_nothing_and_six_do() -> None:
    certain = Estimate(0.5, 0.5, 0.5)
    assert not is_settled([0.5] * 5 + [0.0] * 100, certain)
    assert is_settled([0.5] * 6 + [0.0] * 100, certain)


def test_an_interval_with_no_difference_in_it_settles_nothing() -> None:
    differences = [0.5] * 60 + [-0.5] * 40
    assert not is_settled(differences, Estimate(0.1, 0.0, 0.2))
    assert is_settled(differences, Estimate(0.1, 0.01, 0.2))
    assert is_settled(differences, Estimate(-0.1, -0.2, -0.01))


def test_the_prompts_needed_are_those_worked_out_by_hand() -> None:
    # d = 0.1, s^2 = (3 * 0.16 + 2 * 0.36) / 4 = 0.3: n = 1.96^2 * 0.3 / 0.01 = 115.2.
    assert prompts_needed([0.5, 0.5, 0.5, -0.5, -0.5]) == 116
    assert prompts_needed([0.5, -0.5]) is None
    assert prompts_needed([0.5]) is None


def test_with_the_prompts_needed_the_interval_ends_at_no_difference() -> None:
    differences = [0.5] * 11 + [-0.5] * 9
    needed = prompts_needed(differences)
    assert needed is not None
    repeated = differences * round(needed / len(differences))
    _, low, _ = bootstrap_mean(repeated, resamples=4000, seed=0)
    assert low == pytest.approx(0.0, abs=0.006)


def duels(*outcomes: tuple[float, int], times: int = 1) -> list[Duel]:
    """Each on a prompt of its own."""
    return [Duel(place, score, extra) for place, (score, extra) in enumerate(outcomes * times)]


def test_where_length_alone_decides_nothing_is_left() -> None:
    # The longer one wins four times in five, whoever wrote it; the policy is longer three times in four.
    longer, shorter = [(1.0, 40)] * 12 + [(0.0, 40)] * 3, [(1.0, -40)] + [(0.0, -40)] * 4
    outcomes = duels(*longer, *shorter, times=10)
    controlled = controlled_win_rate(outcomes, resamples=200, seed=0)
    assert controlled is not None
    assert controlled.value == pytest.approx(0.5, abs=1e-3)
    assert controlled.low < 0.5 < controlled.high
    assert np.mean([duel.score for duel in outcomes]) == 0.65


def test_where_length_decides_nothing_the_win_rate_stays() -> None:
    wins = [(1.0, 30), (1.0, -30)] * 3 + [(0.0, 30), (0.0, -30)]
    controlled = controlled_win_rate(duels(*wins, times=10), resamples=200, seed=0)
    assert controlled is not None
    assert controlled.value == pytest.approx(0.75, abs=1e-3)


def test_lengths_that_are_all_equal_leave_the_win_rate() -> None:
    controlled = controlled_win_rate(duels((1.0, 0), (0.5, 0), times=20), resamples=200, seed=0)
    assert controlled is not None
    assert controlled.value == pytest.approx(0.75, abs=1e-3)


def test_of_a_policy_that_is_always_longer_nothing_is_said() -> None:
    assert controlled_win_rate(duels((1.0, 5), (0.0, 9)), resamples=100, seed=0) is None
    assert controlled_win_rate([], resamples=100, seed=0) is None


def test_the_fit_is_the_minimum_that_another_optimizer_finds() -> None:
    rng = np.random.default_rng(0)
    features = np.column_stack([np.ones(80), rng.normal(size=80)])
    scores, weights = rng.choice([0.0, 0.5, 1.0], size=80), rng.integers(0, 4, size=80).astype(float)

    x, y, w = map(torch.as_tensor, (features, scores, weights))
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    other = torch.optim.LBFGS(
        [coefficients], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def penalized() -> torch.Tensor:
        other.zero_grad()
        logits = x @ coefficients
        loss = w @ (torch.nn.functional.softplus(logits) - y * logits)
        loss = loss + w.sum() * 1e-4 / 2 * coefficients @ coefficients
        loss.backward()
        return loss

    other.step(penalized)  # pyright: ignore[reportArgumentType]
    assert fit_logistic(features, scores, weights) == pytest.approx(coefficients.tolist(), abs=1e-5)


def test_the_fit_ends_where_all_is_won() -> None:
    coefficients = fit_logistic(np.ones((50, 1)), np.ones(50), np.ones(50))
    assert 0.99 < 1 / (1 + math.exp(-coefficients[0])) < 1
