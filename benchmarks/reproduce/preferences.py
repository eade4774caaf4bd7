"""Pairs of sampled completions, labelled with certainty or with Bradley and Terry's errors."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, assert_never

import torch

from dpo_ray.config import PairingConfig
from dpo_ray.pairing import make_pairs
from dpo_ray.types import Pair, ScoredCompletion

Labels = Literal["certain", "bradley_terry"]
ALL_PAIRS = PairingConfig(rule="all_pairs")


def labelled_pairs(
    scored: Sequence[ScoredCompletion],
    labels: Labels,
    *,
    per_prompt: int,
    seed: int,
    pairing: PairingConfig = ALL_PAIRS,
) -> list[Pair]:
    """Pairs among each `per_prompt` completions in a row, ties and equal texts left out."""
    pairs: list[Pair] = []
    for start in range(0, len(scored), per_prompt):
        draw = scored[start : start + per_prompt]
        pairs += make_pairs(draw, pairing, round_=0, seed=seed + start).pairs
    match labels:
        case "certain":
            return pairs
        case "bradley_terry":
            return _sometimes_turned(pairs, seed)
        case _:
            assert_never(labels)


def _sometimes_turned(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The better completion is preferred with probability sigma(difference of rewards)."""
    draws = torch.rand(
        len(pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).tolist()
    return [
        pair if draw < 1 / (1 + math.exp(-reward_margin(pair))) else turned(pair)
        for pair, draw in zip(pairs, draws, strict=True)
    ]


def reward_margin(pair: Pair) -> float:
    """Reward of the chosen less that of the rejected."""
    assert pair.chosen_reward is not None and pair.rejected_reward is not None
    return pair.chosen_reward - pair.rejected_reward


def turned(pair: Pair) -> Pair:
    """The pair with the other side preferred."""
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_ids=pair.rejected_ids,
        rejected_ids=pair.chosen_ids,
        chosen_reward=pair.rejected_reward,
        rejected_reward=pair.chosen_reward,
        chosen_logp=pair.rejected_logp,
        rejected_logp=pair.chosen_logp,
    )
