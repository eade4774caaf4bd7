"""Which of two policies does better on each prompt, as a judge sees it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dpo_ray.evaluating.length_control import Duel
from dpo_ray.evaluating.samples import Sample
from dpo_ray.types import Completion, Judgement, ScoredCompletion

Place = tuple[int, int]
"""Which prompt, and which of a policy's samples of it."""
AskJudge = Callable[[Sequence[Completion]], list[ScoredCompletion]]


@dataclass(frozen=True, slots=True)
class Judged:
    """A sample, and what the judge says of it."""

    sample: Sample
    judgement: Judgement

    @property
    def place(self) -> Place:
        return (self.sample.prompt, self.sample.number)


@dataclass(frozen=True, slots=True)
class Contest:
    """Samples of policy and baseline for one prompt, each judged beside the other."""

    ours: Judged
    theirs: Judged


def judge_alone(ask: AskJudge, samples: Sequence[Sample]) -> list[Judged]:
    """Each completion by itself; a sample without one is left out."""
    answered = [sample for sample in samples if sample.completion is not None]
    scored = ask([sample.completion for sample in answered if sample.completion is not None])
    return [Judged(sample, item.judgement) for sample, item in zip(answered, scored, strict=True)]


def judge_together(ask: AskJudge, ours: Sequence[Sample], theirs: Sequence[Sample]) -> list[Contest]:
    """The judge sees two completions of each prompt: the first samples of both, then the second ones, …"""
    turns: dict[int, list[Sample]] = {}
    for own, other in zip(ours, theirs, strict=True):
        assert (own.prompt, own.number) == (other.prompt, other.number), "samples are in one order"
        if own.completion is not None and other.completion is not None:
            turns.setdefault(own.number, []).extend((own, other))
    contests: list[Contest] = []
    for both in turns.values():
        judged = judge_alone(ask, both)
        contests += [Contest(*sides) for sides in zip(judged[::2], judged[1::2], strict=True)]
    return contests


def meet(ours: Sequence[Judged], theirs: Sequence[Judged]) -> list[Contest]:
    """All of a prompt's completions of one policy with all of the other, each judged by itself before."""
    rivals: dict[int, list[Judged]] = {}
    for judged in theirs:
        rivals.setdefault(judged.sample.prompt, []).append(judged)
    return [Contest(own, other) for own in ours for other in rivals.get(own.sample.prompt, [])]


def duels(contests: Iterable[Contest], *, tie_margin: float) -> list[Duel]:
    """Of the contests that the judge could decide."""
    decided: list[Duel] = []
    for ours, theirs in ((contest.ours, contest.theirs) for contest in contests):
        gain = reward_gain(ours, theirs)
        if gain is not None:
            extra = num_characters(ours.sample) - num_characters(theirs.sample)
            decided.append(Duel(ours.sample.prompt, _score(gain, tie_margin), extra))
    return decided


def reward_gain(ours: Judged, theirs: Judged) -> float | None:
    """None where the judge could not say of one of them: never a win of the other."""
    own, other = ours.judgement.reward, theirs.judgement.reward
    return None if own is None or other is None else own - other


def num_characters(sample: Sample) -> int:
    """The length that tokenizers do not change."""
    assert sample.completion is not None
    return len(sample.completion.text)


def _score(gain: float, tie_margin: float) -> float:
    return 0.5 if abs(gain) <= tie_margin else float(gain > 0)
