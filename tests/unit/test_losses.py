"""The losses have the values and gradients of their papers."""

import math
from collections.abc import Callable
from dataclasses import replace
from math import exp, log
from typing import Any, get_args

import pytest
import torch
from loss_rows import Row, batch, cost, gradients, losses, ratios, sigma

from dpo_ray.config.loss import LossConfig, LossType
from dpo_ray.losses import divergence_score, preference_loss, robust_loss, sigmoid_loss

BETA = 0.3
LN_1_AND_1_E = 0.313261687518  # ln(1 + 1/e) = -ln sigma(1)
SMOOTHED = ("robust", "exo")  # Losses that have no value without label smoothing.


# The pair has log-ratios 1 and -1, so margin 2; log-probs -6 and -10 of 4 and 5 tokens.
BY_HAND: list[tuple[dict[str, Any], Row, float]] = [
    ({"type": "sigmoid", "beta": 0.5}, Row(), LN_1_AND_1_E),
    # -ln sigma(-1) = 1 - ln sigma(1)
    ({"type": "sigmoid", "beta": 0.5, "label_smoothing": 0.1}, Row(), LN_1_AND_1_E + 0.1),
    ({"type": "robust", "beta": 0.5, "label_smoothing": 0.1}, Row(), LN_1_AND_1_E - 0.1 / 0.8),
    ({"type": "ipo", "beta": 0.25}, Row(), 0.0),
    ({"type": "ipo", "beta": 0.1}, Row(), 9.0),
    ({"type": "ipo", "beta": 0.5, "ipo_normalize": "mean"}, Row(), 0.3025),  # (1/4 + 1/5 - 1)^2
    ({"type": "hinge", "beta": 0.25}, Row(), 0.5),
    ({"type": "hinge", "beta": 0.75}, Row(), 0.0),
    # sigma(ln 3) = 3/4: the policy is as sure as the labels.
    ({"type": "exo", "beta": log(3) / 2, "label_smoothing": 0.25}, Row(), 0.0),
    ({"type": "exo", "beta": 0.5, "label_smoothing": 0.25}, ratios(0.0), log(4 / 3) / 2),
    # sigma(-1) ln(1 + 1/e) + sigma(1) / e, and sigma(1) / e = sigma(-1)
    ({"type": "discopop", "beta": 0.5, "discopop_tau": 1.0}, Row(), 0.26894142137 * (1 + LN_1_AND_1_E)),
    ({"type": "sigmoid_norm", "beta": 1 / 0.45}, Row(), LN_1_AND_1_E),
    ({"type": "minor", "beta": 1.0}, Row(), LN_1_AND_1_E),
    ({"type": "minor", "beta": 0.5}, ratios(3.0, 1.0), LN_1_AND_1_E),
    ({"type": "dpop", "beta": 0.5}, Row(), LN_1_AND_1_E),
    ({"type": "dpop", "beta": 0.5}, ratios(-1.0, -8.0), LN_1_AND_1_E),  # 7 - 5 * 1
    ({"type": "nca", "beta": 1.0}, Row(), 2 * LN_1_AND_1_E + 0.5),
    ({"type": "sppo", "beta": 0.25}, Row(), 2.0),  # (1 - 2)^2 + (-1 + 2)^2
    ({"type": "apo_zero", "beta": 1.0}, Row(), 0.537882842740),  # 2 sigma(-1)
    ({"type": "apo_down", "beta": 1.0}, Row(), 0.850261500652),  # sigma(1) + sigma(-2)
    ({"type": "tdpo1", "beta": 0.5}, Row(), log(2)),  # 2 - (2.5 - 0.5)
    ({"type": "tdpo2", "beta": 1.0}, Row(), LN_1_AND_1_E),  # 2 - 0.5 * 2
    ({"type": "slic", "beta": 0.125}, Row(), 0.5),
    ({"type": "cpo", "beta": 0.25, "cpo_alpha": 0.5}, Row(), LN_1_AND_1_E + 0.5 * 6 / 4),
    ({"type": "simpo", "beta": 4.0, "gamma": 1.0}, Row(), LN_1_AND_1_E),  # 4 (-1.5 + 2) - 1
    # Odds 1 and 1/3: ln 2 + 0.1 ln(1 + 1/3)
    ({"type": "orpo"}, Row(lw=-4 * log(2), ll=-5 * log(4)), log(2) + 0.1 * log(4 / 3)),
    ({"type": "sft"}, Row(), 1.5),
    ({"type": "kto", "beta": 1.0}, Row(), (0.5 + 0.119202922022) / 2),  # sigma(1 - 1), sigma(-1 - 1)
    ({"type": "kto", "beta": 1.0, "desirable_weight": 3.0}, Row(), (1.5 + 0.119202922022) / 2),
    ({"type": "kto", "beta": 1.0, "undesirable_weight": 2.0}, ratios(1, 1), 0.75),
    ({"type": "kto", "beta": 1.0}, Row(rw=-6.0, mismatched=-3.0), (0.5 + 0.26894142137) / 2),  # z0 = 0
    ({"type": "bco", "beta": 1.0}, Row(), log(2) + 0.126928011043),  # -ln sigma(0), -ln sigma(2)
    ({"type": "aot", "beta": 0.5}, Row(), LN_1_AND_1_E),
    ({"type": "aot_unpaired", "beta": 0.5}, Row(), LN_1_AND_1_E),
]


@pytest.mark.parametrize(("settings", "row", "expected"), BY_HAND, ids=lambda value: str(value)[:60])
def test_value_by_hand(settings: dict[str, Any], row: Row, expected: float) -> None:
    assert losses([row], **settings) == pytest.approx([expected], abs=1e-11)


def test_every_type_is_worked_by_hand() -> None:
    assert {settings["type"] for settings, _, _ in BY_HAND} == set(get_args(LossType))


@pytest.mark.parametrize(
    "name", ["sigmoid", "robust", "sigmoid_norm", "minor", "dpop", "tdpo1", "tdpo2", "aot", "aot_unpaired"]
)
@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_policy_equal_to_reference_costs_log_two(name: str, beta: float) -> None:
    settings = {"label_smoothing": 0.2} if name in ("sigmoid", "aot", "aot_unpaired", *SMOOTHED) else {}
    assert losses([ratios(0.0)] * 3, type=name, beta=beta, **settings) == pytest.approx([log(2)] * 3)


def test_sigmoid_gradient_is_the_one_of_section_4() -> None:
    """-beta sigma(r(y_l) - r(y_w)) [grad log pi(y_w) - grad log pi(y_l)], r = beta (log-ratio)."""
    rows = [ratios(0.0, 0.0), ratios(2.0, -1.0), ratios(-3.0, 2.5), ratios(40.0, -40.0)]
    weights = [BETA * sigma(BETA * (row.hl - row.hw)) for row in rows]
    slopes = gradients(rows, type="sigmoid", beta=BETA)
    assert slopes["lw"] == pytest.approx([-weight for weight in weights], rel=1e-12)
    assert slopes["ll"] == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
@pytest.mark.parametrize("name", ["sigmoid", "exo"])
def test_smoothed_labels_rest_where_the_policy_is_as_sure_as_they_are(name: str, smoothing: float) -> None:
    margin = log((1 - smoothing) / smoothing) / BETA  # sigma(beta margin) = 1 - smoothing
    below, at, above = (
        gradients([ratios(margin + by)], type=name, beta=BETA, label_smoothing=smoothing)["lw"][0]
        for by in (-0.1, 0.0, 0.1)
    )
    assert below < -1e-4 < abs(at) + 1e-4 < 1.1e-4 < above


def test_robust_is_dpo_on_average_over_wrong_labels() -> None:
    margin = torch.linspace(-30, 30, 61, dtype=torch.float64)
    right, wrong = (robust_loss(sign * margin, beta=BETA, label_smoothing=0.3) for sign in (1, -1))
    torch.testing.assert_close(0.7 * right + 0.3 * wrong, sigmoid_loss(margin, beta=BETA))


def test_minor_is_dpo_while_the_rejected_is_above_its_reference() -> None:
    rows = [ratios(0.0, 0.0), ratios(2.0, 0.5), ratios(-3.0, 4.0)]
    assert losses(rows, type="minor", beta=BETA) == losses(rows, type="sigmoid", beta=BETA)
    assert gradients(rows, type="minor", beta=BETA) == gradients(rows, type="sigmoid", beta=BETA)


def test_minor_leaves_a_rejected_below_its_reference_alone() -> None:
    slopes = gradients([ratios(1.0, -0.01), ratios(1.0, -30.0)], type="minor", beta=BETA)
    assert slopes["ll"] == [0.0, 0.0]
    assert all(slope < 0 for slope in slopes["lw"])


@pytest.mark.parametrize("name", ["minor", "dpop"])
def test_the_very_first_step_is_dpos(name: str) -> None:
    assert gradients([ratios(0.0)], type=name, beta=BETA) == gradients(
        [ratios(0.0)], type="sigmoid", beta=BETA
    )
    assert gradients([ratios(0.0)], type=name, beta=BETA)["ll"] == pytest.approx([BETA / 2])


def test_aot_compares_quantiles_of_the_batch() -> None:
    # Differences 4 and 0 of the policy, 0 and 3 of the reference: by rank 0 - 0 and 4 - 3.
    rows = [Row(lw=-4, ll=-8, rw=-7, rl=-7), Row(lw=-8, ll=-8, rw=-5, rl=-8)]
    assert losses(rows, type="aot", beta=1.0) == pytest.approx([log(2), LN_1_AND_1_E])
    # Log-ratios 3 and -3 of the chosen, -1 and 0 of the rejected: by rank -3 + 1 and 3 - 0.
    assert losses(rows, type="aot_unpaired", beta=1.0) == pytest.approx([cost(-2), cost(3)])


@pytest.mark.parametrize("name", ["kto", "bco", "sft"])
def test_a_row_may_lack_a_side(name: str) -> None:
    both = Row(nl=4.0)
    up, down = replace(both, ll=0.0, rl=0.0, nl=0.0), replace(both, lw=0.0, rw=0.0, nw=0.0)
    whole, half, other = losses([both, up, down], type=name)
    share = 2 if name == "kto" else 1  # KTO takes the mean over a row's sides.
    assert whole == pytest.approx((half + other) / share)
    assert half > 0 and (other > 0) == (name != "sft")
    if name != "sft":
        slopes = gradients([up, down], type=name)
        assert slopes["lw"][0] < 0 == slopes["lw"][1] == slopes["ll"][0]


DERIVATIVES: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda u: log(u),
    "forward_kl": lambda u: 1 - 1 / u,
    "js": lambda u: log(2 * u / (1 + u)),
    "alpha": lambda u: (1 - u**-0.3) / 0.3,
}


@pytest.mark.parametrize("divergence", DERIVATIVES)
@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo", "exo", "discopop"])
def test_a_divergence_replaces_log_ratios_by_its_derivative(name: str, divergence: Any) -> None:
    rows = [ratios(1.0, -0.5), ratios(-0.7, 0.2), ratios(0.0, 0.0)]
    settings = {"type": name, "beta": BETA, **({"label_smoothing": 0.2} if name in SMOOTHED else {})}
    alpha = {"divergence_alpha": 0.3} if divergence == "alpha" else {}
    replaced = [ratios(*(DERIVATIVES[divergence](exp(h)) for h in (row.hw, row.hl))) for row in rows]
    assert losses(rows, **settings, divergence=divergence, **alpha) == pytest.approx(
        losses(replaced, **settings)
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_a_divergence_is_reverse_kl_near_the_reference(divergence: Any) -> None:
    ratio = torch.tensor([-1e-4, 0.0, 1e-4], dtype=torch.float64)
    score = divergence_score(ratio, divergence, alpha=0.7)
    scale = 0.5 if divergence == "js" else 1.0  # f''(1), of Jensen-Shannon 1/2
    torch.testing.assert_close(score, scale * ratio, rtol=1e-3, atol=0)


FAR = [ratios(hw, hl) for hw in (-2000.0, 0.0, 2000.0) for hl in (-2000.0, 0.0, 2000.0)]


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", get_args(LossType))
def test_no_loss_overflows_far_from_the_reference(name: str, divergence: str) -> None:
    settings = {"type": name, **({"label_smoothing": 0.2} if name in SMOOTHED else {})}
    if name in ("sigmoid", "robust", "hinge", "exo", "discopop"):  # The others' squares may.
        settings["divergence"] = divergence
    logps = batch(FAR, dtype=torch.float32)
    loss = preference_loss(logps, LossConfig.model_validate(settings))
    loss.sum().backward()
    assert logps.chosen.grad is not None
    assert loss.isfinite().all() and logps.chosen.grad.isfinite().all()


def test_certain_tokens_do_not_make_orpo_infinite() -> None:
    rows = [Row(lw=0.0), Row(ll=0.0), Row(lw=0.0, ll=0.0), Row(lw=-1e-9, ll=-1e-9)]
    assert all(math.isfinite(loss) for loss in losses(rows, type="orpo"))
    slopes = gradients(rows, type="orpo")
    assert all(math.isfinite(slope) for slope in (*slopes["lw"], *slopes["ll"]))
