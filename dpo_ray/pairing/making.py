"""Scored completions to pairs."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from random import Random
from statistics import fmean
from typing import NamedTuple

from dpo_ray.config import PairingConfig
from dpo_ray.pairing.answers import Answer
from dpo_ray.pairing.filters import can_be_chosen, contenders_of, pair_loss
from dpo_ray.pairing.rules import Contenders, apply_rule, reward_of
from dpo_ray.pairing.yields import MadePairs, MatchLoss, PairYield
from dpo_ray.types import Completion, Pair, Prompt, ScoredCompletion, Text

AnswerOf = Callable[[Prompt], Answer | None]


def make_pairs(
    scored: Sequence[ScoredCompletion],
    config: PairingConfig,
    *,
    round_: int,
    seed: int,
    answer_of: AnswerOf | None = None,
) -> MadePairs:
    """Pairs of completions of one prompt and one judge, prompts in order of appearance.

    Only what can be compared is matched, and only what the settings allow becomes a pair; the rest is
    counted. The same completions give the same pairs. `answer_of` is what answer_vs_worst asks.
    """
    pairs: list[Pair] = []
    counts: Counter[str] = Counter(completions=len(scored))
    for group in _by_prompt(scored):
        contenders, losses = contenders_of(group, config)
        random = Random(f"{seed} {round_} {group[0].completion.prompt.token_ids}")
        outcomes = _outcomes(contenders, config, random, answer_of) if contenders else []
        pairs += [replace(outcome, round=round_) for outcome in outcomes if isinstance(outcome, Pair)]
        counts.update(losses, matched=len(outcomes))
        counts.update(outcome for outcome in outcomes if not isinstance(outcome, Pair))
    return MadePairs(pairs, PairYield(**counts, made=len(pairs)))


def _by_prompt(scored: Iterable[ScoredCompletion]) -> list[list[ScoredCompletion]]:
    """Completions of the same prompt tokens that one judge rated."""
    groups: dict[tuple[tuple[int, ...], str], list[ScoredCompletion]] = {}
    for candidate in scored:
        groups.setdefault((candidate.completion.prompt.token_ids, candidate.judge), []).append(candidate)
    return list(groups.values())


def _outcomes(
    contenders: Contenders, config: PairingConfig, random: Random, answer_of: AnswerOf | None
) -> list[Pair | MatchLoss]:
    """Of all that the rule matches: the pair, or why it is none."""
    match config.rule:
        case "unpaired":
            threshold = fmean(map(reward_of, contenders)) if config.threshold is None else config.threshold
            return [_praised_or_blamed(contender, threshold, config) for contender in contenders]
        case "answer_vs_worst":
            assert answer_of is not None, "the settings have a column, and the run reads it"
            return [_against_answer(min(contenders, key=reward_of), answer_of, config)]
        case rule:
            return [_compared(*match, config) for match in apply_rule(rule, contenders, random)]


def _compared(one: ScoredCompletion, other: ScoredCompletion, config: PairingConfig) -> Pair | MatchLoss:
    rejected, chosen = sorted((one, other), key=reward_of)
    pair = _pair(_side(chosen), _side(rejected), chosen)
    loss = pair_loss(pair, config)
    if loss is None and not can_be_chosen(chosen.completion, config):
        loss = "degenerate_chosen"
    return loss or pair


def _against_answer(worst: ScoredCompletion, answer_of: AnswerOf, config: PairingConfig) -> Pair | MatchLoss:
    answer = answer_of(worst.completion.prompt)
    if answer is None:
        return "no_answer"
    pair = replace(_pair(_Side(*answer), _side(worst), worst), source="rule")
    return pair_loss(pair, config) or pair


def _praised_or_blamed(scored: ScoredCompletion, threshold: float, config: PairingConfig) -> Pair | MatchLoss:
    gap = reward_of(scored) - threshold
    if abs(gap) <= config.min_margin:
        return "tie"
    if gap < 0:
        return _pair(_NO_SIDE, _side(scored), scored)
    if not can_be_chosen(scored.completion, config):
        return "degenerate_chosen"
    return _pair(_side(scored), _NO_SIDE, scored)


class _Side(NamedTuple):
    """What a pair says of one of its completions."""

    text: Text
    token_ids: tuple[int, ...]
    reward: float | None = None
    logp: float | None = None
    policy_version: int | None = None
    """None where no policy of ours wrote it."""
    cost: float = 0.0


_NO_SIDE = _Side("", ())


def _side(scored: ScoredCompletion) -> _Side:
    completion, judgement = scored.completion, scored.judgement
    return _Side(
        _in_form_of_prompt(completion),
        completion.token_ids,
        judgement.reward,
        completion.logp,
        completion.policy_version,
        judgement.cost,
    )


def _pair(chosen: _Side, rejected: _Side, scored: ScoredCompletion) -> Pair:
    """Of two sides, of which `scored` is one."""
    prompt = scored.completion.prompt
    versions = [side.policy_version for side in (chosen, rejected) if side.policy_version is not None]
    return Pair(
        prompt=prompt.text,
        chosen=chosen.text,
        rejected=rejected.text,
        prompt_ids=prompt.token_ids,
        chosen_ids=chosen.token_ids,
        rejected_ids=rejected.token_ids,
        chosen_reward=chosen.reward,
        rejected_reward=rejected.reward,
        chosen_logp=chosen.logp,
        rejected_logp=rejected.logp,
        policy_version=min(versions),
        judge=scored.judge,
        cost=chosen.cost + rejected.cost,
    )


def _in_form_of_prompt(completion: Completion) -> Text:
    """Text after text, a message after messages."""
    if isinstance(completion.prompt.text, str):
        return completion.text
    return [{"role": "assistant", "content": completion.text}]
