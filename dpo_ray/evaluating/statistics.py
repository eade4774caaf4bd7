"""How sure a mean over prompts is, and how many more prompts would settle it."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpo_ray.evaluation import mean

_Z95 = 1.96
_FEWEST_DIFFERENCES = 6
"""With five, a fair coin gives five equal sides in 2 / 2^5 = 6 % of all cases: no 95 % finding."""

Floats = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def resampled_counts(num: int, *, resamples: int, seed: int) -> NDArray[np.int64]:
    """[R, num] how often each of `num` prompts is in each bootstrap resample of as many."""
    return np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=resamples)


def bootstrap_mean(values: Sequence[float], *, resamples: int, seed: int) -> Estimate:
    """The mean of one value per prompt, with its percentile interval; NaN of nothing.

    With one seed, the same prompts are drawn for every policy: differences are paired.
    """
    if not values:
        return Estimate(math.nan, math.nan, math.nan)
    known = np.asarray(values, dtype=np.float64)
    counts = resampled_counts(len(known), resamples=resamples, seed=seed)
    return percentile_estimate(float(known.mean()), counts @ known / len(known))


def percentile_estimate(value: float, resampled: Floats) -> Estimate:
    """The middle 95 % of what resamples gave."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def is_settled(differences: Sequence[float], estimate: Estimate) -> bool:
    """Whether the mean of one difference per prompt is beyond noise.

    Its interval is on one side of 0, and six prompts or more differ: a bootstrap of fewer knows too few
    values to doubt them.
    """
    num_different = sum(difference != 0 for difference in differences)
    return not estimate.low <= 0 <= estimate.high and num_different >= _FEWEST_DIFFERENCES


def prompts_needed(differences: Sequence[float]) -> int | None:
    """Prompts in all with which the interval of their mean would end at 0, were the mean to stay.

    n = (1.96 s / d)^2, with the mean d and the standard deviation s of one difference per prompt: the half
    width 1.96 s / sqrt(n) is d then. None where d is 0, or not yet known.
    """
    if len(differences) < 2:
        return None
    average, deviation = mean(differences), float(np.std(differences, ddof=1))
    return None if average == 0 else math.ceil((_Z95 * deviation / average) ** 2)


def prompt_means(numbered: Iterable[tuple[int, float | None]]) -> list[float]:
    """The mean of each prompt's values, prompts in order; None is no value."""
    values: dict[int, list[float]] = {}
    for prompt, value in numbered:
        if value is not None:
            values.setdefault(prompt, []).append(value)
    return [mean(values[prompt]) for prompt in sorted(values)]
