"""A pair rule of your own: a function from one prompt's completions to pairs of them.

Named by `--pairing.rule module:function`, it is called with the completions of a prompt that can be paired,
two or more: each has a reward, and no two have the same text. In each pair that it gives, the completion with
the higher reward becomes the chosen side; what the filters of `--pairing.…` do not allow is dropped and
counted. Random choices come from the source that it is given: a round that is done again after a crash then
makes the same pairs.
"""

from collections.abc import Sequence
from random import Random

from dpo_ray.types import ScoredCompletion


def shortest_best(
    completions: Sequence[ScoredCompletion], random: Random
) -> list[tuple[ScoredCompletion, ScoredCompletion]]:
    """The shortest of the best, against the one of the worst that is nearest to it in length.

    For judges with few values, such as right and wrong: the pair then says little of length.
    """
    highest, lowest = max(map(_reward, completions)), min(map(_reward, completions))
    chosen = min((item for item in completions if _reward(item) == highest), key=_length)
    worst = [item for item in completions if _reward(item) == lowest]
    return [(chosen, min(worst, key=lambda item: abs(_length(item) - _length(chosen))))]


def _reward(item: ScoredCompletion) -> float:
    assert item.judgement.reward is not None
    return item.judgement.reward


def _length(item: ScoredCompletion) -> int:
    """In tokens."""
    return len(item.completion.token_ids)
