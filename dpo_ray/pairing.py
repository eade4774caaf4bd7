"""Scored completions to pairs."""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import assert_never

from dpo_ray.config import PairingConfig
from dpo_ray.types import Completion, Pair, ScoredCompletion, Text


def make_pairs(scored: Sequence[ScoredCompletion], config: PairingConfig, *, round_: int) -> list[Pair]:
    """Pairs of completions of one prompt that one judge told apart, prompts in order of appearance.

    Completions without a reward or without tokens are left out. Of those with the same text the first
    counts. Rewards that differ by `config.min_margin` or less are a tie and make no pair.
    """
    pairs: list[Pair] = []
    for contenders in _group(scored):
        for one, other in _match(contenders, config):
            chosen, rejected = (one, other) if _reward(one) > _reward(other) else (other, one)
            if _reward(chosen) - _reward(rejected) > config.min_margin:
                pairs.append(_pair(chosen, rejected, round_))
    return pairs


def _group(scored: Iterable[ScoredCompletion]) -> list[list[ScoredCompletion]]:
    """What can be paired: per prompt and judge, usable completions with distinct texts."""
    groups: dict[tuple[tuple[int, ...], str], dict[str, ScoredCompletion]] = {}
    for candidate in scored:
        completion, reward = candidate.completion, candidate.judgement.reward
        if reward is not None and completion.token_ids:
            _require_finite(reward, candidate)
            group = groups.setdefault((completion.prompt.token_ids, candidate.judge), {})
            group.setdefault(completion.text, candidate)
    return [list(group.values()) for group in groups.values()]


def _match(
    contenders: list[ScoredCompletion], config: PairingConfig
) -> Iterable[tuple[ScoredCompletion, ScoredCompletion]]:
    match config.rule:
        case "best_vs_worst":
            return [(max(contenders, key=_reward), min(contenders, key=_reward))]
        case "all_pairs":
            return combinations(contenders, 2)
        case _:
            assert_never(config.rule)


def _reward(scored: ScoredCompletion) -> float:
    assert scored.judgement.reward is not None
    return scored.judgement.reward


def _require_finite(reward: float, scored: ScoredCompletion) -> None:
    if not math.isfinite(reward):
        raise ValueError(
            f"judge {scored.judge} gave the reward {reward} to a completion of "
            f"{str(scored.completion.prompt.text)[:60]!r}: return None where the judge cannot say"
        )


def _pair(chosen: ScoredCompletion, rejected: ScoredCompletion, round_: int) -> Pair:
    winner, loser = chosen.completion, rejected.completion
    return Pair(
        prompt=winner.prompt.text,
        chosen=_answer(winner),
        rejected=_answer(loser),
        prompt_ids=winner.prompt.token_ids,
        chosen_ids=winner.token_ids,
        rejected_ids=loser.token_ids,
        chosen_reward=chosen.judgement.reward,
        rejected_reward=rejected.judgement.reward,
        chosen_logp=winner.logp,
        rejected_logp=loser.logp,
        policy_version=min(winner.policy_version, loser.policy_version),
        round=round_,
        judge=chosen.judge,
    )


def _answer(completion: Completion) -> Text:
    """The completion in the form of its prompt: text after text, a message after messages."""
    if isinstance(completion.prompt.text, str):
        return completion.text
    return [{"role": "assistant", "content": completion.text}]
