"""What no pair is made of: completions that cannot be compared, and sides that teach nothing."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import assert_never

from dpo_ray.config import PairingConfig
from dpo_ray.evaluation import flaw
from dpo_ray.pairing.yields import CompletionLoss, MatchLoss
from dpo_ray.types import Completion, Pair, ScoredCompletion

Measure = Callable[[Sequence[int], Sequence[int]], float]


def contenders_of(
    scored: Sequence[ScoredCompletion], config: PairingConfig
) -> tuple[list[ScoredCompletion], Counter[CompletionLoss]]:
    """Of one prompt's completions those that can be paired, and why the others cannot.

    Each is counted once, for the first reason in the order of `CompletionLoss`; of those with the same
    text the first can be paired.
    """
    bound = _degenerate_bound(scored, config)
    kept: dict[str, ScoredCompletion] = {}
    losses: Counter[CompletionLoss] = Counter()
    for candidate in scored:
        loss = _loss(candidate, bound)
        if loss is None and candidate.completion.text in kept:
            loss = "identical"
        if loss is None:
            kept[candidate.completion.text] = candidate
        else:
            losses[loss] += 1
    return list(kept.values()), losses


def pair_loss(pair: Pair, config: PairingConfig) -> MatchLoss | None:
    """Why two sides are no pair; None where they are one."""
    if _is_tie(pair, config.min_margin):
        return "tie"
    sides = (pair.chosen_ids, pair.rejected_ids)
    is_same = pair.chosen == pair.rejected or pair.chosen_ids == pair.rejected_ids
    if is_same or _is_above(config.max_similarity, similarity, sides):
        return "near_identical"
    return "length" if _is_above(config.max_length_ratio, length_ratio, sides) else None


def can_be_chosen(completion: Completion, config: PairingConfig) -> bool:
    return config.degenerate == "keep" or not flaw(completion)


def similarity(one: Sequence[int], other: Sequence[int]) -> float:
    """2 L / (tokens of both), where L is the length of the longest common subsequence; 1: the same tokens."""
    return 2 * common_tokens(one, other) / (len(one) + len(other))


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common subsequence, a row of the table at a time (Hyyrö, AWOCA 2004)."""
    places: dict[int, int] = {}  # Of each token in `one`, as bits.
    for place, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << place
    all_bits = row = (1 << len(one)) - 1
    for token in other:
        matching = row & places.get(token, 0)
        row = (row + matching | row - matching) & all_bits
    return len(one) - row.bit_count()


def length_ratio(one: Sequence[int], other: Sequence[int]) -> float:
    """Tokens of the longer one, as a multiple of the shorter one's."""
    return max(len(one), len(other)) / min(len(one), len(other))


def _is_tie(pair: Pair, min_margin: float) -> bool:
    if pair.chosen_reward is None or pair.rejected_reward is None:
        return False  # An answer has no reward, and is chosen without one.
    return pair.chosen_reward - pair.rejected_reward <= min_margin


def _is_above(bound: float | None, measure: Measure, sides: tuple[Sequence[int], Sequence[int]]) -> bool:
    return bound is not None and measure(*sides) > bound


def _loss(candidate: ScoredCompletion, degenerate_bound: float) -> CompletionLoss | None:
    reward = candidate.judgement.reward
    if reward is None:
        return "unjudged"
    _require_finite(reward, candidate)
    if not candidate.completion.token_ids:
        return "empty"
    return "degenerate" if reward >= degenerate_bound and flaw(candidate.completion) else None


def _degenerate_bound(scored: Sequence[ScoredCompletion], config: PairingConfig) -> float:
    """The reward from which on a degenerate completion is lost."""
    match config.degenerate:
        case "keep":
            return math.inf
        case "drop":
            return -math.inf
        case "reject_only" if config.rule in ("unpaired", "answer_vs_worst"):
            return math.inf  # No other completion need be better for it to be rejected.
        case "reject_only":
            # Without those that beat every sound one, the best of a prompt is one that can be chosen.
            sound = [item.judgement.reward for item in scored if not flaw(item.completion)]
            return max((reward for reward in sound if reward is not None), default=-math.inf)
        case _:
            assert_never(config.degenerate)


def _require_finite(reward: float, scored: ScoredCompletion) -> None:
    if not math.isfinite(reward):
        raise ValueError(
            f"judge {scored.judge} gave the reward {reward} to a completion of "
            f"{str(scored.completion.prompt.text)[:60]!r}: return None where the judge cannot say"
        )
