"""Judges that tests give to jobs by import path."""

from collections.abc import Sequence

from dpo_ray.film_reviews import judge_reviews
from dpo_ray.types import Completion


def share_of_vowels(completions: Sequence[Completion]) -> list[float]:
    """A reward that any text has, and that a policy learns fast."""
    return [sum(letter in "aeiou" for letter in c.text) / max(1, len(c.text)) for c in completions]


def whole_reviews(completions: Sequence[Completion]) -> list[float]:
    """1 for a film review that parses and ends."""
    return [judgement.metrics["grammatical"] for judgement in judge_reviews(completions)]


def not_a_number(completions: Sequence[Completion]) -> list[float]:
    return [float("nan")] * len(completions)
