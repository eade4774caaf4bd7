"""May this candidate go live?"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from dpo_ray.buffer import TrialVotes
from dpo_ray.config import GateConfig
from dpo_ray.evaluation import (
    Evaluation,
    degenerate,
    mean,
    mean_interval,
    num_compared,
    reward_gains,
    summary,
    wilson,
    win_rate,
)
from dpo_ray.registry import PolicyManifest
from dpo_ray.run_warnings import RunWarning, reasons_to


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's decision, with its reason where it is no."""

    passed: bool
    reason: str = ""
    votes: TrialVotes = field(default_factory=TrialVotes)
    """What people said of it before."""


NO_VOTES = TrialVotes()


class GateError(RuntimeError):
    """A candidate was refused, and the job is told to stop then."""


def judge_candidate(candidate: PolicyManifest, config: GateConfig) -> Verdict:
    """Compare the metrics of the candidate's last optimizer step with the configured bounds."""
    broken = [name for name, value in candidate.metrics.items() if not math.isfinite(value)]
    if broken:
        return Verdict(False, f"{', '.join(broken)} not finite")
    drop = -candidate.metrics.get("chosen_log_ratio", 0.0)
    if config.max_chosen_drop is not None and drop > config.max_chosen_drop:
        return Verdict(False, f"chosen log-prob fell {drop:.1f} nats below the reference's")
    return Verdict(True)


def judge_samples(
    candidate: Evaluation,
    *,
    previous: Evaluation,
    start: Evaluation,
    config: GateConfig,
    votes: TrialVotes = NO_VOTES,
) -> Verdict:
    """Compare what the candidate wrote for held-out prompts, and people's votes, with the configured bounds.

    `previous` is of the version that was live before.
    """
    reasons = [
        *_drifted(candidate, config),
        *_lost(candidate, previous, config),
        *_gained_too_little(candidate, previous, config),
        *_grew(candidate, start, config),
        *_degenerated(candidate, start, config),
        *_voted_down(votes, config),
    ]
    return Verdict(not reasons, "; ".join(reasons), votes)


def judge_warnings(verdict: Verdict, warnings: Sequence[RunWarning]) -> Verdict:
    """The verdict after what the candidate's round gave cause for."""
    reasons = reasons_to("roll_back", warnings)
    return replace(verdict, passed=False, reason=reasons) if verdict.passed and reasons else verdict


def _drifted(candidate: Evaluation, config: GateConfig) -> Iterator[str]:
    kl = summary(candidate)["kl/start"]
    if not math.isfinite(kl):
        yield "kl/start not finite"
    elif config.max_kl is not None and kl > config.max_kl:
        yield f"kl/start is {kl:.2f} nats, above {config.max_kl:g}"


def _lost(candidate: Evaluation, previous: Evaluation, config: GateConfig) -> Iterator[str]:
    if config.min_win_rate is None:
        return
    num = num_compared(candidate, previous)
    if num == 0:
        yield "the win rate is unknown: on no prompt have both versions a reward"
        return
    rate = win_rate(candidate, previous)
    if (interval := wilson(rate, num)).high < config.min_win_rate:
        yield (
            f"wins {rate:.0%} against the version before "
            f"(95 % interval {interval.low:.0%} to {interval.high:.0%}), below {config.min_win_rate:.0%}"
        )


def _gained_too_little(candidate: Evaluation, previous: Evaluation, config: GateConfig) -> Iterator[str]:
    if config.min_reward_gain is None:
        return
    gains = reward_gains(candidate, previous)
    if not gains:
        yield "the reward gain is unknown: on no prompt have both versions a reward"
        return
    if (interval := mean_interval(gains)).high < config.min_reward_gain:
        yield (
            f"reward changed by {mean(gains):+.3f} against the version before "
            f"(95 % interval {interval.low:+.3f} to {interval.high:+.3f}), below {config.min_reward_gain:+g}"
        )


def _grew(candidate: Evaluation, start: Evaluation, config: GateConfig) -> Iterator[str]:
    ratio = mean([row.length for row in candidate]) / mean([row.length for row in start])
    if config.max_length_ratio is not None and ratio > config.max_length_ratio:
        yield f"completions are {ratio:.2f} times as long as the start's, above {config.max_length_ratio:g}"


def _degenerated(candidate: Evaluation, start: Evaluation, config: GateConfig) -> Iterator[str]:
    flaws = degenerate(candidate)
    share, at_start = flaws.total() / len(candidate), degenerate(start).total() / len(start)
    if config.max_degenerate_rise is not None and share - at_start > config.max_degenerate_rise:
        counts = ", ".join(f"{count} {flaw}" for flaw, count in sorted(flaws.items()))
        yield (
            f"{share:.0%} of completions are degenerate ({counts}), {share - at_start:.0%} more than the "
            f"start's, above {config.max_degenerate_rise:.0%}"
        )


def _voted_down(votes: TrialVotes, config: GateConfig) -> Iterator[str]:
    if config.min_vote_share is None or not votes.compared:
        return
    share = (votes.wins + votes.ties / 2) / votes.compared
    if (interval := wilson(share, votes.compared)).high < config.min_vote_share:
        yield (
            f"gets {share:.0%} of {votes.compared} people's votes against the live version "
            f"(95 % interval {interval.low:.0%} to {interval.high:.0%}), below {config.min_vote_share:.0%}"
        )
