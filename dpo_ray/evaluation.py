"""How good a policy version is, on prompts that no round trains on."""

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

from dpo_ray.storage import Storage
from dpo_ray.types import Completion, ScoredCompletion, Text

Flaw = Literal["", "empty", "cut off", "loop"]
"""What makes a completion degenerate: no text, no end, or the same tokens over and over."""
_Z95 = 1.96
_LOOP_REPEATS = 4
_LONGEST_PERIOD = 64
_SHORTEST_LOOP = 16
"""Tokens: shorter repetitions are dots, rulers and numbers."""


@dataclass(frozen=True, slots=True)
class EvaluatedCompletion:
    """One completion of a held-out prompt."""

    index: int
    """Which prompt: the same number is the same prompt in every version's evaluation."""
    prompt: Text
    text: str
    reward: float | None
    policy_version: int
    length: int
    """Tokens."""
    logp: float
    """Summed log-prob under the policy that wrote it, in nats."""
    start_logp: float
    """The same under version 0."""
    metrics: dict[str, float] = field(default_factory=dict)
    flaw: Flaw = ""


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


Evaluation = list[EvaluatedCompletion]


def evaluated(
    scored: Sequence[ScoredCompletion], start_logps: Sequence[float], *, per_prompt: int
) -> Evaluation:
    """Scored completions, `per_prompt` in a row for each prompt, with their log-probs under version 0."""
    return [
        EvaluatedCompletion(
            index=place // per_prompt,
            prompt=item.completion.prompt.text,
            text=item.completion.text,
            reward=item.judgement.reward,
            policy_version=item.completion.policy_version,
            length=len(item.completion.token_ids),
            logp=item.completion.logp,
            start_logp=start_logp,
            metrics=item.judgement.metrics,
            flaw=flaw(item.completion),
        )
        for place, (item, start_logp) in enumerate(zip(scored, start_logps, strict=True))
    ]


def beside_start(
    completions: Sequence[Completion], start: Evaluation, *, per_prompt: int
) -> list[Completion]:
    """The completions of each prompt, and after them what version 0 answered: rivals that stay the same."""
    rivals: defaultdict[int, list[EvaluatedCompletion]] = defaultdict(list)
    for row in start:
        rivals[row.index].append(row)
    together: list[Completion] = []
    for index in range(len(completions) // per_prompt):
        ours = completions[index * per_prompt : (index + 1) * per_prompt]
        together += ours
        together += [Completion(ours[0].prompt, row.text, (), row.logp, 0, "stop") for row in rivals[index]]
    return together


def flaw(completion: Completion) -> Flaw:
    """Why a completion is degenerate; "" where it is not."""
    if loops(completion.token_ids):
        return "loop"
    if completion.finish_reason != "stop":
        return "cut off"
    return "" if completion.text.strip() else "empty"


def loops(token_ids: Sequence[int]) -> bool:
    """Whether up to 64 tokens come at least four times in a row, over 16 tokens or more."""
    for period in range(1, min(_LONGEST_PERIOD, len(token_ids) // _LOOP_REPEATS) + 1):
        enough = max(_LOOP_REPEATS * period, _SHORTEST_LOOP) - period
        run = 0  # Tokens that are those of one period before.
        for token, before in zip(token_ids[period:], token_ids, strict=False):
            run = run + 1 if token == before else 0
            if run == enough:
                return True
    return False


def degenerate(evaluation: Evaluation) -> Counter[Flaw]:
    """How many completions have each flaw."""
    return Counter(row.flaw for row in evaluation if row.flaw)


def summary(evaluation: Evaluation) -> dict[str, float]:
    """Means over the completions; `kl/start` is the sampled sequence KL to version 0, in nats."""
    rewards = [row.reward for row in evaluation if row.reward is not None]
    values = {
        "eval/reward_mean": mean(rewards),
        "eval/reward_std": statistics.pstdev(rewards) if rewards else float("nan"),
        "eval/length_mean": mean([row.length for row in evaluation]),
        "kl/start": mean([row.logp - row.start_logp for row in evaluation]),
    }
    return {
        **values,
        **{f"eval/{name}": value for name, value in mean_metrics([r.metrics for r in evaluation]).items()},
    }


def win_rate(ours: Evaluation, theirs: Evaluation) -> float:
    """Share of comparisons on the same prompt that ours wins, ties counted half; NaN where there is none."""
    rewards = _rewards(theirs)
    scores = [
        (row.reward > other) + (row.reward == other) / 2
        for row in ours
        if row.reward is not None
        for other in rewards[row.index]
    ]
    return mean(scores)


def num_compared(ours: Evaluation, theirs: Evaluation) -> int:
    """Prompts on which both have a reward."""
    return len(_rewards(ours).keys() & _rewards(theirs).keys())


def reward_gains(ours: Evaluation, theirs: Evaluation) -> list[float]:
    """Mean reward of ours less that of theirs, on each prompt where both have one."""
    new, old = _rewards(ours), _rewards(theirs)
    return [mean(new[index]) - mean(old[index]) for index in sorted(new.keys() & old.keys())]


def wilson(rate: float, count: int) -> Interval:
    """95 % score interval of a rate over `count` trials (Wilson, JASA 1927)."""
    scale = 1 + _Z95**2 / count
    centre = (rate + _Z95**2 / (2 * count)) / scale
    half = _Z95 / scale * math.sqrt(rate * (1 - rate) / count + _Z95**2 / (4 * count**2))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def mean_interval(values: Sequence[float]) -> Interval:
    """1.96 standard errors around the mean; boundless for fewer than two values."""
    if len(values) < 2:
        return Interval(-math.inf, math.inf)
    half = _Z95 * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean(values) - half, mean(values) + half)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN of nothing."""
    return statistics.fmean(values) if values else float("nan")


def mean_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each judge metric over the completions that have it."""
    names = sorted({name for each in metrics for name in each})
    return {name: mean([each[name] for each in metrics if name in each]) for name in names}


def write_evaluation(storage: Storage, version: int, evaluation: Evaluation) -> None:
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in evaluation]
    storage.write_text(_file(version), "\n".join(lines) + "\n")


def read_evaluation(storage: Storage, version: int) -> Evaluation | None:
    """None where the version was not evaluated yet."""
    if not storage.exists(_file(version)):
        return None
    # Lines of bytes: those of text also end at separators that JSON allows inside of strings.
    return [
        EvaluatedCompletion(**json.loads(line)) for line in storage.read_bytes(_file(version)).splitlines()
    ]


def _file(version: int) -> str:
    return f"evaluation/v{version:05d}.jsonl"


def _rewards(evaluation: Evaluation) -> defaultdict[int, list[float]]:
    """By prompt, those that the judge gave."""
    rewards: defaultdict[int, list[float]] = defaultdict(list)
    for row in evaluation:
        if row.reward is not None:
            rewards[row.index].append(row.reward)
    return rewards
