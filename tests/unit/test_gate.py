"""A candidate goes live unless a bound is broken or a metric is no number."""

import math

import pytest

from dpo_ray.config import GateConfig
from dpo_ray.gate import Verdict, judge_candidate
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
