"""Film reviews judged with certainty, and by a judge that errs as Bradley and Terry say."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

from dpo_ray.film_reviews import judge_reviews
from dpo_ray.types import Completion, Judgement

SCALE = 4.0
"""Nats of true reward between blame alone and praise alone: of two reviews that differ by a quarter of their
opinions, the better one is preferred with probability 0.73."""


def certain(completions: Sequence[Completion]) -> list[Judgement]:
    """The true reward: `SCALE` times the share of praise."""
    return [
        replace(judgement, reward=SCALE * (judgement.reward or 0.0))
        for judgement in judge_reviews(completions)
    ]


def bradley_terry(completions: Sequence[Completion]) -> list[Judgement]:
    """The true reward, kept as the metric `true`, and noise for which a better review may lose.

    Rewards with standard Gumbel noise of their own compare by the Bradley-Terry probabilities. The noise of a
    completion is the same whenever it is judged.
    """
    return [
        replace(
            judgement,
            reward=(judgement.reward or 0.0) + _gumbel(completion),
            metrics={**judgement.metrics, "true": judgement.reward or 0.0},
        )
        for completion, judgement in zip(completions, certain(completions), strict=True)
    ]


def _gumbel(completion: Completion) -> float:
    """Noise that the tokens decide."""
    digest = hashlib.sha256(f"{completion.prompt.token_ids} {completion.token_ids}".encode()).digest()
    uniform = ((int.from_bytes(digest[:8]) >> 12) + 0.5) / 2**52
    return -math.log(-math.log(uniform))
