"""Warnings fire on the far side of their bounds alone, and say the number, the bound and a remedy."""

from typing import Any

import pytest

from dpo_ray.config import WarningsConfig
from dpo_ray.gate import Verdict, judge_warnings
from dpo_ray.run_warnings import (
    RunWarning,
    StopError,
    displacement,
    duplicates,
    kl_budget,
    length_drift,
    require_no_stop,
    round_warnings,
    saturation,
)

DEFAULT = WarningsConfig()


def names(row: dict[str, Any], *steps: dict[str, Any], start: dict[str, Any] | None = None) -> list[str]:
    return [each.name for each in round_warnings(row, steps, start=start or {}, config=DEFAULT)]


@pytest.mark.parametrize(
    ("log_ratio", "margin", "fires"),
    [(-10.0, 1.0, False), (-10.1, 1.0, True), (-10.1, 0.0, False), (10.1, 1.0, False)],
)
def test_displacement_is_a_chosen_side_that_falls_while_the_margin_grows(
    log_ratio: float, margin: float, fires: bool
) -> None:
    said = displacement({"chosen_log_ratio": log_ratio, "rewards/margins": margin}, 10.0)
    assert (said is not None) == fires


@pytest.mark.parametrize(("length", "fires"), [(14.9, False), (15.1, True), (6.7, False), (6.6, True)])
def test_length_may_drift_by_the_same_factor_both_ways(length: float, fires: bool) -> None:
    said = length_drift({"eval/length_mean": length}, {"eval/length_mean": 10.0}, 1.5)
    assert (said is not None) == fires


@pytest.mark.parametrize(("margin", "fires"), [(3.0, False), (3.1, True), (-9.0, False)])
def test_saturation_is_a_margin_above_its_bound(margin: float, fires: bool) -> None:
    assert (saturation({"rewards/margins": margin}, 3.0) is not None) == fires


@pytest.mark.parametrize(("identical", "fires"), [(0, False), (4, False), (5, True)])
def test_duplicates_are_a_share_of_the_samples(identical: int, fires: bool) -> None:
    row = {"yield/identical": identical, "yield/completions": 8}
    assert (duplicates(row, 0.5) is not None) == fires


@pytest.mark.parametrize(("kl", "fires"), [(0.0, False), (4.0, False), (4.1, True)])
@pytest.mark.parametrize("name", ["kl/start", "eval/kl/reference"])
def test_the_budget_is_of_the_kl_that_was_measured(name: str, kl: float, fires: bool) -> None:
    assert (kl_budget({name: kl}, 4.0) is not None) == fires


def test_messages_have_the_number_the_bound_and_what_to_change() -> None:
    said = displacement({"chosen_log_ratio": -12.34, "rewards/margins": 1.5}, 10.0)
    assert said is not None
    assert said.startswith("chosen completions lost 12.3 nats against the reference, more than 10, while ")
    assert "Take training.loss.type dpop" in said
    # sigmoid(-ln 99) is 1 in 100.
    assert "a weight of 1%" in (saturation({"rewards/margins": 4.59512}, 3.0) or "")
    assert "62% of the samples repeat" in (
        duplicates({"yield/identical": 5, "yield/completions": 8}, 0.5) or ""
    )
    assert "25.0 nats, above 20" in (kl_budget({"kl/start": 25.0}, 20.0) or "")
    assert "0.50 times as long as the start's, below 0.67" in (
        length_drift({"eval/length_mean": 5}, {"eval/length_mean": 10}, 1.5) or ""
    )


def test_what_was_not_measured_gives_no_cause() -> None:
    assert names({}) == []
    unmeasured: dict[str, Any] = dict.fromkeys(
        ("kl/start", "eval/length_mean", "yield/identical", "eval/rewards/margins")
    )
    assert names(unmeasured, {"rewards/margins": None}, start={"eval/length_mean": None}) == []


def test_an_unset_bound_never_fires() -> None:
    far = {
        "kl/start": 1e9,
        "eval/rewards/margins": 1e3,
        "eval/chosen_log_ratio": -1e9,
        "eval/length_mean": 1e9,
    }
    copies = {"yield/identical": 8, "yield/completions": 8}
    start = {"eval/length_mean": 1}
    assert len(names(far | copies, start=start)) == len(WarningsConfig.model_fields)
    bounds = ("max_drop", "max_ratio", "max_margin", "max_share", "max_kl")
    unset = dict(zip(WarningsConfig.model_fields, ({bound: None} for bound in bounds), strict=True))
    config = WarningsConfig.model_validate(unset)
    assert round_warnings(far | copies, [], start=start, config=config) == []


def test_a_round_is_judged_by_where_its_steps_end_and_not_by_where_they_begin() -> None:
    first, last = {"rewards/margins": 0.0}, {"rewards/margins": 9.0}
    assert names({}, first, first, last, last) == ["saturation"]
    assert names({}, last, last, first, first) == []


def test_held_out_pairs_count_before_those_that_were_trained_on() -> None:
    assert names({"eval/rewards/margins": 1.0}, {"rewards/margins": 9.0}) == []
    assert names({"eval/rewards/margins": 9.0}, {"rewards/margins": 1.0}) == ["saturation"]


def test_the_demo_as_it_was_recorded_gives_no_cause() -> None:
    row = {"kl/start": 2.07, "eval/length_mean": 17.1, "yield/identical": 0, "yield/completions": 768}
    step = {"rewards/margins": 6.42, "chosen_log_ratio": 1.65}
    assert names(row, step, step, start={"eval/length_mean": 17.1}) == []


def test_only_a_warning_that_stops_ends_the_job() -> None:
    quiet = [RunWarning("kl_budget", action, "far") for action in ("log", "pause", "roll_back")]
    require_no_stop(quiet)
    with pytest.raises(StopError, match=r"^warning duplicates: copies\. The round is finished"):
        require_no_stop([*quiet, RunWarning("duplicates", "stop", "copies")])


def test_only_a_warning_that_rolls_back_refuses_the_version() -> None:
    quiet = [RunWarning("kl_budget", action, "far") for action in ("log", "pause", "stop")]
    assert judge_warnings(Verdict(True), quiet) == Verdict(True)
    refusal = judge_warnings(Verdict(True), [*quiet, RunWarning("duplicates", "roll_back", "copies")])
    assert refusal == Verdict(False, "warning duplicates: copies")
