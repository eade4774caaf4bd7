"""Findings in words: who is better, or how much more it would take to say."""

from collections.abc import Sequence

from dpo_ray.evaluating.findings import Comparison, JudgeBill
from dpo_ray.evaluating.statistics import Estimate


def verdict(comparison: Comparison) -> str:
    """Whether the policy is better, in one sentence."""
    rate = comparison.win_rate
    finding = "within noise" if not comparison.is_settled else "better" if rate.value > 0.5 else "worse"
    sentence = (
        f"{comparison.policy} against {comparison.baseline}: {finding}, wins {percent(rate.value)} "
        f"({interval(rate)}) on {comparison.prompts} prompts"
    )
    return sentence if comparison.is_settled else f"{sentence}; {remedy(comparison.more_prompts)}"


def remedy(more_prompts: int | None) -> str:
    """What would settle a difference within noise."""
    if more_prompts is None:
        return "at this rate no number of prompts would settle it"
    return f"about {more_prompts:,} more would settle it, were the rate to stay"


def judged(bill: JudgeBill) -> str:
    """What the judge did, and what it cost."""
    parts = [f"{bill.judgements:,} judgements"]
    if bill.unjudged:
        parts.append(f"{bill.unjudged:,} without a reward")
    if bill.cached:
        parts.append(f"{bill.cached:,} of them kept from before")
    return ", ".join([*parts, f"cost {bill.cost:.4g}"])


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def interval(estimate: Estimate) -> str:
    """The 95 % interval of a share."""
    return f"{100 * estimate.low:.1f} to {percent(estimate.high)}"


def errors(policy: str, counts: dict[str, int]) -> Sequence[str]:
    """A sentence for each error of an endpoint."""
    return [f"{policy}: {count} completions are missing: {error}" for error, count in counts.items()]
