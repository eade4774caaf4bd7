"""Comparisons to rewards: how often a completion wins against the others of its prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from dpo_ray.evaluation import mean, mean_metrics
from dpo_ray.judges.function import CompareFunction, JudgeFunction, ask_to_compare
from dpo_ray.types import Completion, Judgement

_TIE = 0.5
_ALONE = Judgement(None, reason="no other completion of its prompt to compare it with")


@dataclass(frozen=True, slots=True)
class Contest:
    """Two completions of one prompt, by their places in the batch, and what was said of them."""

    one: int
    other: int
    answers: tuple[Judgement, ...]
    """Preferences for the first place, with `one` there, and, of both orders, with `other` there."""

    def share(self, place: int) -> float | None:
        """What a side wins: None where an answer is missing, a tie where the order decides."""
        rewards = [answer.reward for answer in self.answers if answer.reward is not None]
        if len(rewards) < len(self.answers):
            return None
        if self._is_flip(rewards):
            return _TIE
        share = mean([rewards[0], *(1 - reward for reward in rewards[1:])])
        return share if place == self.one else 1 - share

    @property
    def metrics(self) -> dict[str, float]:
        """Those of the answers; of both orders also how often the first place wins, and alone decides."""
        rewards = [answer.reward for answer in self.answers if answer.reward is not None]
        metrics = mean_metrics([answer.metrics for answer in self.answers])
        if len(rewards) < 2:
            return metrics
        return {**metrics, "first_wins": mean(rewards), "flips": float(self._is_flip(rewards))}

    def _is_flip(self, rewards: Sequence[float]) -> bool:
        """Whether both orders prefer the same place."""
        return len(rewards) == 2 and (rewards[0] - _TIE) * (rewards[1] - _TIE) > 0


def pairwise_judge(compare: CompareFunction, name: str, *, both_orders: bool) -> JudgeFunction:
    """A judge by a function that compares: the reward is the mean win share, from 0 to 1.

    Completions of one prompt with the same text are one in all contests.
    """

    def judge(completions: Sequence[Completion]) -> list[Judgement]:
        groups = _distinct(completions)
        places = list(_meetings(groups, both_orders=both_orders))
        orders = [order for one, other in places for order in ((one, other), (other, one))[: 1 + both_orders]]
        questions = [(completions[first], completions[second]) for first, second in orders]
        answers = iter(ask_to_compare(compare, name, questions))
        contests = [Contest(*sides, tuple(next(answers) for _ in range(1 + both_orders))) for sides in places]
        return _judgements(groups, contests, len(completions))

    return judge


def win_shares(rewards: Sequence[float | None]) -> list[float | None]:
    """Of each reward among the others: wins count 1, ties a half; None where there is nothing to compare."""
    shares: list[float | None] = []
    for place, own in enumerate(rewards):
        others = [other for at, other in enumerate(rewards) if at != place and other is not None]
        scores = [] if own is None else [(own > other) + (own == other) / 2 for other in others]
        shares.append(mean(scores) if scores else None)
    return shares


def by_prompt(completions: Sequence[Completion]) -> list[list[int]]:
    """Places of the completions of each prompt."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, completion in enumerate(completions):
        groups.setdefault(completion.prompt.token_ids, []).append(place)
    return list(groups.values())


def _distinct(completions: Sequence[Completion]) -> list[list[list[int]]]:
    """Of each prompt, of each text, the places."""
    groups: list[list[list[int]]] = []
    for places in by_prompt(completions):
        texts: dict[str, list[int]] = {}
        for place in places:
            texts.setdefault(completions[place].text, []).append(place)
        groups.append(list(texts.values()))
    return groups


def _meetings(groups: Sequence[list[list[int]]], *, both_orders: bool) -> Iterator[tuple[int, int]]:
    """The first of each text against each other; in one order only, the first place goes to both in turn."""
    meetings = (sides for texts in groups for sides in combinations([same[0] for same in texts], 2))
    for number, (one, other) in enumerate(meetings):
        yield (one, other) if both_orders or number % 2 == 0 else (other, one)


def _judgements(groups: Sequence[list[list[int]]], contests: Sequence[Contest], num: int) -> list[Judgement]:
    fought: dict[int, list[Contest]] = {}
    for contest in contests:
        for place in (contest.one, contest.other):
            fought.setdefault(place, []).append(contest)
    judgements = [_ALONE] * num
    for texts in groups:
        for same in texts:
            own = _judgement(same[0], fought.get(same[0], []), is_tie=len(same) > 1)
            for place in same:
                judgements[place] = own if place == same[0] else replace(own, cost=0.0)
    return judgements


def _judgement(place: int, contests: Sequence[Contest], *, is_tie: bool) -> Judgement:
    """The mean over a completion's contests; each costs both sides the half."""
    if not contests:
        return Judgement(_TIE) if is_tie else _ALONE
    shares = [contest.share(place) for contest in contests]
    won = [share for share in shares if share is not None]
    answers = [answer for contest in contests for answer in contest.answers]
    return Judgement(
        mean(won) if won else None,
        mean_metrics([contest.metrics for contest in contests]),
        cost=sum(answer.cost for answer in answers) / 2,
        reason="" if won else next((answer.reason for answer in answers if answer.reason), ""),
    )
