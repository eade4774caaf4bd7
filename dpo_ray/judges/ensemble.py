"""Several judges as one, with how far they disagree."""

import statistics
from collections.abc import Sequence
from typing import Literal, assert_never

from dpo_ray.evaluation import mean
from dpo_ray.judges.function import JudgeFunction, judge_completions
from dpo_ray.judges.pairwise import by_prompt, win_shares
from dpo_ray.types import Completion, Judgement

Combine = Literal["mean", "minimum", "majority"]
Named = tuple[str, JudgeFunction]
Rewards = Sequence[float | None]


def ensemble_judge(judges: Sequence[Named], combine: Combine) -> JudgeFunction:
    """All judges' rewards in one; each judge's own metrics come with its number, the first is 0.

    A completion has a mean or minimum where every judge could say. `disagreement` is the standard deviation
    of their rewards; of a majority, of the win shares that each judge would give alone.
    """

    def judge(completions: Sequence[Completion]) -> list[Judgement]:
        opinions = [
            [each.judgement for each in judge_completions(own, name, completions)] for name, own in judges
        ]
        rewards = [[opinion.reward for opinion in of_judge] for of_judge in opinions]
        if combine == "majority":
            combined, rewards = majority(completions, rewards)
        else:
            combined = [combined_reward(of_one, combine) for of_one in zip(*rewards, strict=True)]
        return [
            _merged(reward, of_one, given)
            for reward, of_one, given in zip(
                combined, zip(*opinions, strict=True), zip(*rewards, strict=True), strict=True
            )
        ]

    return judge


def combined_reward(rewards: Rewards, combine: Literal["mean", "minimum"]) -> float | None:
    """None where a judge could not say: the others' mean would be another scale."""
    given = [reward for reward in rewards if reward is not None]
    if len(given) < len(rewards):
        return None
    match combine:
        case "mean":
            return mean(given)
        case "minimum":
            return min(given)
        case _:
            assert_never(combine)


def majority(
    completions: Sequence[Completion], rewards: Sequence[Rewards]
) -> tuple[list[float | None], list[list[float | None]]]:
    """Win shares where every two completions of a prompt are put to the vote, and those of each judge alone.

    A judge that could not say of one of them does not vote; as many votes for each is a tie.
    """
    voted: list[float | None] = [None] * len(completions)
    alone: list[list[float | None]] = [[None] * len(completions) for _ in rewards]
    for places in by_prompt(completions):
        of_judges = [[of_judge[place] for place in places] for of_judge in rewards]
        for judge, own in zip(alone, of_judges, strict=True):
            for place, share in zip(places, win_shares(own), strict=True):
                judge[place] = share
        for at, place in enumerate(places):
            won = [_vote(of_judges, at, other) for other in range(len(places)) if other != at]
            decided = [share for share in won if share is not None]
            voted[place] = mean(decided) if decided else None
    return voted, alone


def _vote(of_judges: Sequence[Rewards], one: int, other: int) -> float | None:
    """1 where more judges reward `one` more, 0 where fewer do, a half for a tie; None where none can say."""
    pairs = [(rewards[one], rewards[other]) for rewards in of_judges]
    votes = [
        (ours > theirs) - (ours < theirs) for ours, theirs in pairs if ours is not None and theirs is not None
    ]
    balance = sum(votes)
    return ((balance > 0) - (balance < 0) + 1) / 2 if votes else None


def _merged(reward: float | None, opinions: Sequence[Judgement], rewards: Rewards) -> Judgement:
    given = [each for each in rewards if each is not None]
    own = {
        f"{number}/{name}": value
        for number, each in enumerate(opinions)
        for name, value in each.metrics.items()
    }
    disagreement = {"disagreement": statistics.pstdev(given)} if len(given) > 1 else {}
    reasons = [each.reason for each in opinions if each.reason]
    return Judgement(
        reward,
        {**own, **disagreement},
        cost=sum(each.cost for each in opinions),
        reason=reasons[0] if reward is None and reasons else "",
    )
