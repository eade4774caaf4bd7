"""The best trade of reward for KL that a policy's samples show: its distribution, tilted towards reward."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """What a policy costs and what it earns."""

    kl: float
    """To the policy that was sampled, in nats."""
    reward: float


def tilted(rewards: Sequence[float], beta: float) -> Point:
    """Where the policy with the greatest reward - beta KL stands. Eq. 4 of arXiv:2305.18290.

    Only rewards matter: within one reward, the optimum keeps the reference's proportions.
    """
    values = np.asarray(rewards, dtype=float)
    weights = np.exp((values - values.max()) / beta)
    weights /= weights.sum()
    present = weights[weights > 0]
    return Point(float((present * np.log(present * len(values))).sum()), float(weights @ values))


def most_reward(rewards: Sequence[float], kl: float) -> float:
    """The greatest mean reward that any policy can have at this KL."""
    low, high = -6.0, 6.0  # Of log beta: of all optima, the one with this KL is found by halving.
    for _ in range(60):
        middle = (low + high) / 2
        if tilted(rewards, 10**middle).kl > kl:
            low = middle
        else:
            high = middle
    return tilted(rewards, 10**high).reward
