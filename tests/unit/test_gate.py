"""A candidate goes live unless a bound is broken or a metric is no number."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dpo_ray.buffer import TrialVotes
from dpo_ray.config import GateConfig
from dpo_ray.evaluation import EvaluatedCompletion, Evaluation, Flaw
from dpo_ray.gate import Verdict, judge_candidate, judge_samples
from dpo_ray.registry import PolicyManifest

BOUNDED = GateConfig(max_chosen_drop=5.0)


def candidate(**metrics: float) -> PolicyManifest:
    return PolicyManifest(version=1, metrics=metrics)


@pytest.mark.parametrize(
    ("chosen_log_ratio", "passed"), [(3.0, True), (0.0, True), (-5.0, True), (-5.1, False), (-80.0, False)]
)
def test_the_chosen_may_fall_as_far_as_the_bound(chosen_log_ratio: float, passed: bool) -> None:
    assert judge_candidate(candidate(chosen_log_ratio=chosen_log_ratio), BOUNDED).passed is passed


def test_a_refusal_says_how_far_it_fell() -> None:
    verdict = judge_candidate(candidate(chosen_log_ratio=-7.25), BOUNDED)
    assert verdict == Verdict(False, "chosen log-prob fell 7.2 nats below the reference's")


def test_without_a_bound_any_finite_candidate_passes() -> None:
    assert judge_candidate(candidate(loss=9.0, chosen_log_ratio=-1e6), GateConfig()) == Verdict(True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", [BOUNDED, GateConfig()])
def test_what_is_no_number_is_refused_by_name(value: float, config: GateConfig) -> None:
    verdict = judge_candidate(candidate(loss=value, grad_norm=1.0, chosen_log_ratio=value), config)
    assert verdict == Verdict(False, "loss, chosen_log_ratio not finite")


def evaluation(
    rewards: Sequence[float | None], *, length: int = 10, kl: float = 0.0, flaws: Sequence[Flaw] = ()
) -> Evaluation:
    """One completion for each prompt; the first ones have the flaws."""
    rows = [
        EvaluatedCompletion(index, "Q", "A", reward, 1, length, kl - 30.0, -30.0)
        for index, reward in enumerate(rewards)
    ]
    flawed = [replace(row, flaw=flaw) for row, flaw in zip(rows, flaws, strict=False)]
    return [*flawed, *rows[len(flaws) :]]


LOOPS: list[Flaw] = ["loop"] * 40
CUT_OFF: list[Flaw] = ["cut off"] * 40
EVEN = evaluation([0.0, 1.0] * 20)


def verdict(candidate: Evaluation, **bounds: float) -> Verdict:
    return judge_samples(candidate, previous=EVEN, start=EVEN, config=GateConfig.model_validate(bounds))


def won(num: int, of: int = 40) -> Evaluation:
    """Better than the version before on `num` of the prompts, worse on the others."""
    return evaluation([9.0] * num + [-9.0] * (of - num))


def test_without_bounds_any_samples_pass() -> None:
    assert verdict(evaluation([None] * 40, length=900, kl=1e6, flaws=LOOPS)) == Verdict(True)


@pytest.mark.parametrize(("kl", "passed"), [(-1.0, True), (8.0, True), (8.01, False)])
def test_the_policy_may_drift_as_far_as_the_bound(kl: float, passed: bool) -> None:
    assert verdict(evaluation([1.0] * 40, kl=kl), max_kl=8.0).passed is passed


def test_a_kl_that_is_no_number_is_refused() -> None:
    assert verdict(evaluation([1.0] * 40, kl=math.nan)) == Verdict(False, "kl/start not finite")


def test_a_loss_that_may_be_chance_is_no_refusal() -> None:
    # Wilson's interval of 14 of 40 ends at 0.505, that of 13 of 40 at 0.480.
    assert verdict(won(14), min_win_rate=0.5).passed
    refused = verdict(won(13), min_win_rate=0.5)
    assert refused.reason == "wins 32% against the version before (95 % interval 20% to 48%), below 50%"


def test_the_same_rate_on_more_prompts_may_be_no_chance() -> None:
    previous, bounds = evaluation([0.0] * 80), GateConfig(min_win_rate=0.5)
    assert judge_samples(won(14), previous=previous, start=previous, config=bounds).passed
    assert not judge_samples(won(28, of=80), previous=previous, start=previous, config=bounds).passed


@pytest.mark.parametrize(
    ("gains", "bound", "passed"),
    [
        ([-0.5, -0.3], 0.0, False),  # -0.4, give or take 0.03.
        ([-0.5, -0.3], -0.5, True),
        ([-3.0, 2.2], 0.0, True),  # -0.4, give or take 0.8.
        ([0.1, 0.3], 0.5, False),
        ([0.1, 0.3], 0.2, True),
    ],
)
def test_the_reward_may_fall_as_far_as_the_bound(gains: list[float], bound: float, passed: bool) -> None:
    rewards = [before + gain for before, gain in zip([0.0, 1.0] * 20, gains * 20, strict=True)]
    assert verdict(evaluation(rewards), min_reward_gain=bound).passed is passed


def test_a_fallen_reward_is_told_with_its_interval() -> None:
    refused = verdict(evaluation([-0.5, 0.7] * 20), min_reward_gain=0.0)
    expected = (
        "reward changed by -0.400 against the version before (95 % interval -0.431 to -0.369), below +0"
    )
    assert refused.reason == expected


@pytest.mark.parametrize(
    ("bounds", "unknown"),
    [({"min_win_rate": 0.1}, "the win rate"), ({"min_reward_gain": -9.0}, "the reward gain")],
)
def test_what_no_judge_could_compare_does_not_go_live(bounds: dict[str, float], unknown: str) -> None:
    refused = verdict(evaluation([None] * 40), **bounds)
    assert refused == Verdict(False, f"{unknown} is unknown: on no prompt have both versions a reward")


@pytest.mark.parametrize(("length", "passed"), [(5, True), (15, True), (16, False)])
def test_completions_may_grow_as_far_as_the_bound(length: int, passed: bool) -> None:
    assert verdict(evaluation([1.0] * 40, length=length), max_length_ratio=1.5).passed is passed


def test_degenerate_completions_are_counted_by_kind() -> None:
    flawed = evaluation([1.0] * 40, flaws=["loop", "loop", "empty", "cut off"])
    assert verdict(flawed, max_degenerate_rise=0.1).passed
    refused = verdict(flawed, max_degenerate_rise=0.09)
    assert refused.reason == (
        "10% of completions are degenerate (1 cut off, 1 empty, 2 loop), 10% more than the start's, above 9%"
    )


def test_a_start_that_is_degenerate_may_stay_so() -> None:
    start = evaluation([1.0] * 40, flaws=CUT_OFF[:20])
    worse = evaluation([1.0] * 40, flaws=CUT_OFF[:30])
    config = GateConfig(max_degenerate_rise=0.2)
    assert judge_samples(start, previous=start, start=start, config=config).passed
    refused = judge_samples(worse, previous=start, start=start, config=config)
    assert "75% of completions are degenerate (30 cut off), 25% more than the start's" in refused.reason


def test_all_broken_bounds_are_named() -> None:
    bad = evaluation([-5.0] * 40, length=99, kl=50.0, flaws=LOOPS)
    bounds = {"max_kl": 8, "min_win_rate": 0.5, "min_reward_gain": 0, "max_length_ratio": 2}
    assert len(verdict(bad, **bounds, max_degenerate_rise=0).reason.split("; ")) == 5


def test_length_is_against_the_start_and_reward_against_the_version_before() -> None:
    candidate, previous = evaluation([1.0] * 40, length=20), evaluation([2.0] * 40, length=20)
    start = evaluation([0.0] * 40, length=10)
    config = GateConfig(max_length_ratio=1.5, min_win_rate=0.5)
    refused = judge_samples(candidate, previous=previous, start=start, config=config)
    assert len(refused.reason.split("; ")) == 2
    assert judge_samples(candidate, previous=start, start=previous, config=config) == Verdict(True)


def voted(votes: TrialVotes, **bounds: float) -> Verdict:
    config = GateConfig.model_validate(bounds)
    return judge_samples(EVEN, previous=EVEN, start=EVEN, config=config, votes=votes)


@pytest.mark.parametrize(("wins", "ties", "passed"), [(13, 0, False), (14, 0, True), (8, 12, True)])
def test_people_may_prefer_the_live_version_as_far_as_chance(wins: int, ties: int, passed: bool) -> None:
    # As of prompts: the interval of 14 of 40 reaches one half, that of 13 does not.
    votes = TrialVotes(wins=wins, losses=40 - wins - ties, ties=ties)
    judged = judge_samples(
        EVEN, previous=EVEN, start=EVEN, config=GateConfig(min_vote_share=0.5), votes=votes
    )
    assert (judged.passed, judged.votes) == (passed, votes)


def test_a_candidate_that_people_vote_down_is_told_so() -> None:
    votes = TrialVotes(wins=2, losses=16, ties=2)
    judged = judge_samples(
        EVEN, previous=EVEN, start=EVEN, config=GateConfig(min_vote_share=0.5), votes=votes
    )
    expected = "gets 15% of 20 people's votes against the live version (95 % interval 5% to 36%), below 50%"
    assert judged.reason == expected
    assert voted(votes).passed
