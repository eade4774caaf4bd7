"""How far a judge can be trusted: against people, against itself, against the order of a question."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_ray.evaluation import mean, mean_metrics
from dpo_ray.judges.function import JudgeFunction, Question, judge_completions
from dpo_ray.types import Completion, Judgement, Pair, Prompt, Text


@dataclass(frozen=True, slots=True)
class JudgeQuality:
    """Shares from 0 to 1, NaN where there was nothing to measure."""

    judge: str
    pairs: int
    unjudged: float
    """Of pairs of which it could not say which side is better, at least once in two times."""
    agreement: float
    """Of those that it could: where it says what people said, ties counted half."""
    self_agreement: float
    """Where it says the same the second time."""
    first_wins: float
    """Of questions in both orders: how often the first place wins, a half without a bias."""
    flips: float
    """Of pairs asked in both orders: where the order alone decides."""
    cost: float
    """Money for all of it."""
    reason: str
    """Why it could not say, most often, where that is known."""


def measure_judge(judge: JudgeFunction, name: str, questions: Sequence[Question]) -> JudgeQuality:
    """Ask twice which side is better, of pairs whose first side is."""
    completions = [side for question in questions for side in question]
    asked = [[item.judgement for item in judge_completions(judge, name, completions)] for _ in range(2)]
    first, second = ([_preference(*sides) for sides in _pairs(judgements)] for judgements in asked)
    both = zip(first, second, strict=True)
    said = [(one, two) for one, two in both if one is not None and two is not None]
    judgements = [judgement for of_time in asked for judgement in of_time]
    metrics = mean_metrics([judgement.metrics for judgement in judgements])
    reasons = Counter(judgement.reason for judgement in judgements if judgement.reason)
    return JudgeQuality(
        judge=name,
        pairs=len(questions),
        unjudged=1 - len(said) / len(questions),
        agreement=mean([one for one, _ in said]),
        self_agreement=mean([float(one == two) for one, two in said]),
        first_wins=metrics.get("first_wins", float("nan")),
        flips=metrics.get("flips", float("nan")),
        cost=sum(judgement.cost for judgement in judgements),
        reason=max(reasons, key=lambda reason: reasons[reason], default=""),
    )


def as_questions(pairs: Sequence[Pair]) -> list[Question]:
    """The two sides of each pair, the better one first; pairs of one side only are left out."""
    return [
        as_question(number, pair.prompt, pair.chosen, pair.rejected, {})
        for number, pair in enumerate(pairs)
        if not pair.is_unpaired
    ]


def as_question(number: int, prompt: Text, better: Text, worse: Text, fields: dict[str, object]) -> Question:
    """`number` stands for the prompt's tokens: no question is compared with another of the same prompt."""
    asked = Prompt(prompt, (number,), fields)
    return tuple(Completion(asked, _text(side), (), 0.0, 0, "stop") for side in (better, worse))


def _text(side: Text) -> str:
    return side if isinstance(side, str) else "\n\n".join(message["content"] for message in side)


def _pairs(judgements: Sequence[Judgement]) -> list[tuple[Judgement, Judgement]]:
    return list(zip(judgements[::2], judgements[1::2], strict=True))


def _preference(better: Judgement, worse: Judgement) -> float | None:
    """1 where the judge says what people said, 0 where the opposite, a half for a tie."""
    if better.reward is None or worse.reward is None:
        return None
    return (better.reward > worse.reward) + (better.reward == worse.reward) / 2
