"""Which completions of one prompt are paired with each other."""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from random import Random
from statistics import fmean, pstdev
from typing import assert_never, cast

from dpo_ray.config.pairing import MatchingRule
from dpo_ray.import_path import load_function
from dpo_ray.types import ScoredCompletion

Contenders = Sequence[ScoredCompletion]
"""Completions of one prompt that can be paired: each has a reward, and no two have the same text."""
Match = tuple[ScoredCompletion, ScoredCompletion]
"""Two completions in any order: the one with the higher reward becomes the chosen side."""
PairRule = Callable[[Contenders, Random], Iterable[Match]]
"""Two contenders or more in, matches out; random choices come from the given source, which is the same
whenever a round is done again."""


class PairingError(ValueError):
    """A user's rule failed, or gave what is no match."""


def load_rule(path: str) -> PairRule:
    """The rule that `pairing.rule` names; ValueError where it is not to be found."""
    if ":" in path:
        return cast(PairRule, load_function(path, setting="pairing.rule"))
    rule = cast(MatchingRule, path)  # The settings know no other name.
    match rule:
        case "best_vs_worst":
            return best_vs_worst
        case "all_pairs":
            return all_pairs
        case "best_vs_random":
            return best_vs_random
        case "random_pair":
            return random_pair
        case "best_vs_two_sigma":
            return best_vs_two_sigma
        case _:
            assert_never(rule)


def apply_rule(path: str, contenders: Contenders, random: Random) -> list[Match]:
    """The distinct matches of a rule; PairingError where it breaks its contract."""
    if len(contenders) < 2:
        return []
    rule = load_rule(path)
    prompt = str(contenders[0].completion.prompt.text)[:60]
    try:
        matches = [(one, other) for one, other in rule(contenders, random)]
    except Exception as error:
        raise PairingError(
            f"pairing.rule {path} failed on {len(contenders)} completions of {prompt!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    known = {id(contender) for contender in contenders}
    if any(id(side) not in known for sides in matches for side in sides):
        raise PairingError(
            f"pairing.rule {path} paired what is no completion of {prompt!r}: "
            "pair those that it is called with"
        )
    return list({frozenset(map(id, sides)): sides for sides in matches}.values())


def best_vs_worst(contenders: Contenders, random: Random) -> list[Match]:
    return [(max(contenders, key=reward_of), min(contenders, key=reward_of))]


def all_pairs(contenders: Contenders, random: Random) -> Iterable[Match]:
    return combinations(contenders, 2)


def best_vs_random(contenders: Contenders, random: Random) -> list[Match]:
    """The best against one of those below it."""
    best = max(contenders, key=reward_of)
    below = [contender for contender in contenders if reward_of(contender) < reward_of(best)]
    return [(best, random.choice(below or contenders))]  # Where none is below, they tie.


def random_pair(contenders: Contenders, random: Random) -> list[Match]:
    """Two with different rewards."""
    matches = list(combinations(contenders, 2))
    apart = [(one, other) for one, other in matches if reward_of(one) != reward_of(other)]
    return [random.choice(apart or matches)]  # Where all are equal, they tie.


def best_vs_two_sigma(contenders: Contenders, random: Random) -> list[Match]:
    """The best against the one nearest to mean - 2 sigma of all rewards (arXiv:2502.16825).

    Sigma is the population's standard deviation. Of two equally near, the lower reward counts.
    """
    rewards = [reward_of(contender) for contender in contenders]
    target = fmean(rewards) - 2 * pstdev(rewards)

    def distance(contender: ScoredCompletion) -> tuple[float, float]:
        return abs(reward_of(contender) - target), reward_of(contender)

    return [(max(contenders, key=reward_of), min(contenders, key=distance))]


def reward_of(scored: ScoredCompletion) -> float:
    """Of a contender, which has one."""
    assert scored.judgement.reward is not None
    return scored.judgement.reward
