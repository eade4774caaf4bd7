"""What is measured of each policy, and what is found of it beside the baseline."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ray.config import EvaluateConfig
from dpo_ray.evaluating.diversity import distinct_share, self_bleu
from dpo_ray.evaluating.duels import Contest, Judged, duels, num_characters, reward_gain
from dpo_ray.evaluating.length_control import controlled_win_rate
from dpo_ray.evaluating.samples import Sample
from dpo_ray.evaluating.statistics import (
    Estimate,
    bootstrap_mean,
    is_settled,
    prompt_means,
    prompts_needed,
)
from dpo_ray.evaluation import Flaw, mean, mean_metrics
from dpo_ray.judges import JudgeError
from dpo_ray.types import Judgement

_OF_THE_JUDGE = {"unjudged", "unjudged_budget", "retries", "cached", "truncated", "first_wins", "flips"}
"""Metrics that say how the judge did, and nothing of the policy."""
QUANTILES = tuple(step / 20 for step in range(21))


@dataclass(frozen=True, slots=True)
class Measures:
    """One policy by itself."""

    policy: str
    versions: list[int]
    """Those that wrote its completions."""
    completions: int
    errors: dict[str, int]
    """How often each error took the place of a completion."""
    reward: Estimate | None
    """None of a judge that only compares, as are the quantiles."""
    reward_quantiles: list[float] | None
    """Rewards in steps of 5 %, from the lowest to the highest."""
    tokens: Estimate | None
    """None where an endpoint does not count them."""
    characters: Estimate | None
    kl: Estimate | None
    """Sequence KL to the baseline in nats, exact at every token of the samples."""
    kl_sampled: Estimate | None
    distinct_1: float
    distinct_2: float
    self_bleu: float
    flaws: dict[Flaw, int]
    metrics: dict[str, float]
    """Means of what the judge measures beside the reward."""

    @property
    def degenerate_share(self) -> float:
        return sum(self.flaws.values()) / self.completions if self.completions else math.nan


@dataclass(frozen=True, slots=True)
class Comparison:
    """One policy beside the baseline; each prompt counts once."""

    policy: str
    baseline: str
    prompts: int
    wins: float
    ties: float
    losses: float
    win_rate: Estimate
    controlled: Estimate | None
    """The win rate at equal length; None where one side is the longer one in all contests."""
    reward_gain: Estimate | None
    """None of a judge that only compares."""
    is_settled: bool
    """Whether the win rate is beyond noise."""
    more_prompts: int | None
    """How many more would settle it, were the rate to stay; None where it is settled, or exactly a half."""
    undecided: int
    """Contests that the judge could not decide."""
    flips: float
    """Share of contests in which the judge prefers a place, not a completion; NaN where it has no places."""


@dataclass(frozen=True, slots=True)
class JudgeBill:
    """What the judge was asked, and what that cost."""

    judgements: int
    unjudged: int
    cached: int
    """Answers that were there from before."""
    cost: float


def measure(
    policy: str, samples: Sequence[Sample], judged: Sequence[Judged] | None, config: EvaluateConfig
) -> Measures:
    """`judged`: the samples with what was said of each by itself; None of a judge that only compares."""

    def estimate(value_of: Callable[[Sample], float | None]) -> Estimate | None:
        return _estimate([(sample.prompt, value_of(sample)) for sample in answered], config)

    answered = [sample for sample in samples if sample.completion is not None]
    groups = _texts_by_prompt(answered)
    texts = [text for group in groups for text in group]
    rewards = [(each.sample.prompt, each.judgement.reward) for each in judged or ()]
    return Measures(
        policy=policy,
        versions=sorted({sample.completion.policy_version for sample in answered if sample.completion}),
        completions=len(answered),
        errors=dict(Counter(sample.error for sample in samples if sample.completion is None)),
        reward=_estimate(rewards, config),
        reward_quantiles=_quantiles([reward for _, reward in rewards if reward is not None]),
        tokens=estimate(lambda sample: sample.num_tokens),
        characters=estimate(num_characters),
        kl=estimate(lambda sample: sample.kl),
        kl_sampled=estimate(lambda sample: sample.logp_gain),
        distinct_1=distinct_share(texts, n=1),
        distinct_2=distinct_share(texts, n=2),
        self_bleu=self_bleu(groups),
        flaws=dict(Counter(sample.flaw for sample in answered if sample.flaw)),
        metrics=_metrics([each.judgement for each in judged or ()]),
    )


def compare(
    policy: str, contests: Sequence[Contest], config: EvaluateConfig, *, baseline: str, is_relative: bool
) -> Comparison:
    """JudgeError: the judge could decide none of the contests."""
    decided = duels(contests, tie_margin=config.tie_margin)
    if not decided:
        raise JudgeError(f"the judge decided none of {len(contests)} contests of {policy} and {baseline}")
    scores = prompt_means([(duel.prompt, duel.score) for duel in decided])
    rate = bootstrap_mean(scores, resamples=config.resamples, seed=config.seed)
    differences = [score - 0.5 for score in scores]
    settled = is_settled(differences, Estimate(*(bound - 0.5 for bound in rate)))
    gains = [(each.ours.sample.prompt, reward_gain(each.ours, each.theirs)) for each in contests]
    metrics = mean_metrics([each.ours.judgement.metrics for each in contests])
    return Comparison(
        policy=policy,
        baseline=baseline,
        prompts=len(scores),
        wins=mean(prompt_means([(duel.prompt, float(duel.score == 1)) for duel in decided])),
        ties=mean(prompt_means([(duel.prompt, float(duel.score == 0.5)) for duel in decided])),
        losses=mean(prompt_means([(duel.prompt, float(duel.score == 0)) for duel in decided])),
        win_rate=rate,
        controlled=controlled_win_rate(decided, resamples=config.resamples, seed=config.seed),
        reward_gain=None if is_relative else _estimate(gains, config),
        is_settled=settled,
        more_prompts=None if settled else more_prompts(differences),
        undecided=len(contests) - len(decided),
        flips=metrics.get("flips", math.nan),
    )


def more_prompts(differences: Sequence[float]) -> int | None:
    """How many more than there are would settle the mean of one difference per prompt, were it to stay."""
    needed = prompts_needed(differences)
    return None if needed is None else max(1, needed - len(differences))


def bill(judgements: Sequence[Judgement]) -> JudgeBill:
    return JudgeBill(
        judgements=len(judgements),
        unjudged=sum(each.reward is None for each in judgements),
        cached=sum(each.metrics.get("cached") == 1 for each in judgements),
        cost=sum(each.cost for each in judgements),
    )


def _estimate(numbered: Sequence[tuple[int, float | None]], config: EvaluateConfig) -> Estimate | None:
    """Each prompt counts once; None where nothing is known."""
    means = prompt_means(numbered)
    return bootstrap_mean(means, resamples=config.resamples, seed=config.seed) if means else None


def _texts_by_prompt(samples: Sequence[Sample]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for sample in samples:
        assert sample.completion is not None
        groups.setdefault(sample.prompt, []).append(sample.completion.text)
    return list(groups.values())


def _quantiles(rewards: Sequence[float]) -> list[float] | None:
    return np.quantile(rewards, QUANTILES).tolist() if rewards else None


def _metrics(judgements: Sequence[Judgement]) -> dict[str, float]:
    means = mean_metrics([each.metrics for each in judgements])
    return {name: value for name, value in means.items() if name.rpartition("/")[2] not in _OF_THE_JUDGE}
