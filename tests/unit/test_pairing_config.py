"""A pairing that cannot be meant is refused by name."""

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from dpo_ray.config import IterativeDPOConfig, PairingConfig
from dpo_ray.config.pairing import MatchingRule
from dpo_ray.pairing import load_rule

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"rule": "best"},
        r"rule=best is no rule: take best_vs_worst, .*unpaired, or your own as module:function",
    ),
    ({"rule": "answer_vs_worst"}, "answer_column=None: answer_vs_worst needs the column"),
    ({"answer_column": "answer"}, "rule=best_vs_worst and answer_column=answer: answer_vs_worst needs"),
    ({"threshold": 0.5}, "threshold=0.5 is not read by rule=best_vs_worst: unset it, or take unpaired"),
    ({"rule": "mine:rule", "threshold": 0.5}, "threshold=0.5 is not read by rule=mine:rule"),
    ({"rule": "unpaired", "max_similarity": 0.5}, "max_similarity=0.5 is not read by rule=unpaired"),
    ({"rule": "unpaired", "max_length_ratio": 2}, "max_length_ratio=2.0 is not read by rule=unpaired"),
    ({"rule": "answer_vs_worst", "answer_column": "key", "min_margin": 0.1}, "min_margin=0.1 is not read by"),
    ({"max_similarity": 1.0}, "less than 1"),
    ({"max_length_ratio": 0.5}, "greater than or equal to 1"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_does_not_go_together_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PairingConfig(**settings)


@pytest.mark.parametrize("rule", get_args(MatchingRule))
def test_every_rule_of_the_settings_is_there(rule: str) -> None:
    assert load_rule(PairingConfig(rule=rule).rule).__name__ == rule


@pytest.mark.parametrize("settings", [{"rule": "unpaired", "threshold": 0}, {"rule": "mine:rule"}])
def test_what_goes_together_is_taken(settings: dict[str, Any]) -> None:
    assert PairingConfig(**settings).rule == settings["rule"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere:rule", r"pairing.rule 'nowhere:rule': module 'nowhere' cannot be imported"),
        ("statistics:fmeen", r"pairing.rule 'statistics:fmeen': 'fmeen' is no function of 'statistics'"),
        (":rule", r"pairing.rule ':rule' is no import path: write module:function"),
    ],
)
def test_a_rule_that_is_not_there_is_named(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rule(path)


def test_answers_have_no_log_probs_of_a_sampler() -> None:
    with pytest.raises(
        ValidationError, match=r"answers of pairing.rule=answer_vs_worst have none: set weighting"
    ):
        IterativeDPOConfig(
            pairing=PairingConfig(rule="answer_vs_worst", answer_column="key"),
            training={"loss": {"weighting": "wpo_sampler"}},  # type: ignore[arg-type]
        )
