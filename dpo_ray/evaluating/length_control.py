"""The win rate that is left when the two completions are of one length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ray.evaluating.statistics import Estimate, Floats, percentile_estimate, resampled_counts

_RIDGE = 1e-4
_LONGEST_STEP = 2.0
_MOST_STEPS = 100
_CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class Duel:
    """Two completions of one prompt."""

    prompt: int
    score: float
    """1 where the policy wins, 0 where the baseline does, a half for a tie."""
    extra_length: int
    """Characters that the policy's completion has more than the baseline's."""


def controlled_win_rate(duels: Sequence[Duel], *, resamples: int, seed: int) -> Estimate | None:
    """sigmoid(a) of the logistic regression P(win) = sigmoid(a + b tanh(extra_length / s)).

    s is the standard deviation of all extra lengths, and a tie half a win, as in AlpacaEval 2
    (arXiv:2404.04475), of which this is the length term. Prompts are resampled with all of their duels.
    None where one side is the longer one in every duel: nothing is known of equal lengths then.
    """
    lengths = np.array([duel.extra_length for duel in duels], dtype=np.float64)
    if not len(duels) or lengths.min() > 0 or lengths.max() < 0:
        return None
    features = np.column_stack([np.ones(len(duels)), np.tanh(lengths / (lengths.std() or 1.0))])
    scores = np.array([duel.score for duel in duels])
    prompts, of_prompt = np.unique([duel.prompt for duel in duels], return_inverse=True)
    whole = fit_logistic(features, scores, np.ones(len(duels)))
    counts = resampled_counts(len(prompts), resamples=resamples, seed=seed)
    slopes = [
        fit_logistic(features, scores, drawn[of_prompt].astype(np.float64), start=whole)[0]
        for drawn in counts
    ]
    return percentile_estimate(_sigmoid(whole[0]), 1 / (1 + np.exp(-np.array(slopes))))


def fit_logistic(features: Floats, scores: Floats, weights: Floats, *, start: Floats | None = None) -> Floats:
    """[F] coefficients that make weighted scores from 0 to 1 likeliest, by Newton's method.

    A ridge of 1e-4 per unit of weight keeps them finite where the features tell wins and losses apart.
    """
    ridge = _RIDGE * weights.sum()
    coefficients = np.zeros(features.shape[1]) if start is None else start
    for _ in range(_MOST_STEPS):
        likely = 1 / (1 + np.exp(-(features @ coefficients)))
        gradient = features.T @ (weights * (likely - scores)) + ridge * coefficients
        curvature = (features.T * (weights * likely * (1 - likely))) @ features
        step = np.linalg.solve(curvature + ridge * np.eye(len(coefficients)), gradient)
        coefficients = coefficients - np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)
        if np.abs(step).max() < _CLOSE:
            break
    return coefficients


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
