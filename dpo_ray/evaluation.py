"""How good a policy version is, on prompts that no round trains on."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from dpo_ray.storage import Storage
from dpo_ray.types import ScoredCompletion, Text


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
        )
        for place, (item, start_logp) in enumerate(zip(scored, start_logps, strict=True))
    ]


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
    rewards: dict[int, list[float]] = defaultdict(list)
    for row in theirs:
        if row.reward is not None:
            rewards[row.index].append(row.reward)
    scores = [
        (row.reward > other) + (row.reward == other) / 2
        for row in ours
        if row.reward is not None
        for other in rewards[row.index]
    ]
    return mean(scores)


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
