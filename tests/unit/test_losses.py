"""The losses have the values and gradients of their papers."""

import math

import pytest
import torch
from torch import Tensor

from dpo_ray.config import LossConfig
from dpo_ray.losses import PairLogps, ipo_loss, minor_loss, preference_loss, sigmoid_loss

BETA = 0.3


def ratios(chosen: object, rejected: object = 0.0) -> PairLogps:
    """Pairs whose log-ratios to the reference are `chosen` and `rejected`."""
    winner = torch.atleast_1d(torch.as_tensor(chosen, dtype=torch.float64))
    loser = torch.atleast_1d(torch.as_tensor(rejected, dtype=torch.float64))
    ref_winner, ref_loser = torch.full_like(winner, -7.0), torch.full_like(loser, -9.0)
    return PairLogps(
        winner + ref_winner, loser + ref_loser, ref_winner, ref_loser, torch.full_like(winner, 4.0)
    )


def leaves(chosen: list[float], rejected: list[float]) -> PairLogps:
    """The same, with log-probs that collect gradients."""
    made = ratios(chosen, rejected)
    return PairLogps(
        made.chosen.requires_grad_(),
        made.rejected.requires_grad_(),
        made.ref_chosen,
        made.ref_rejected,
        made.chosen_length,
    )


def gradients(loss: Tensor, logps: PairLogps) -> tuple[list[float], list[float]]:
    chosen, rejected = torch.autograd.grad(loss.sum(), (logps.chosen, logps.rejected))
    return chosen.tolist(), rejected.tolist()


def test_policy_equal_to_reference_costs_log_two() -> None:
    assert sigmoid_loss(ratios(0.0), beta=0.1).item() == pytest.approx(math.log(2), abs=1e-15)
    assert sigmoid_loss(ratios(0.0), beta=5.0, label_smoothing=0.2).item() == pytest.approx(math.log(2))


def test_sigmoid_loss_by_hand() -> None:
    # margin 1.5 - (-0.5) = 2, beta 0.5: -ln sigma(1) = ln(1 + 1/e)
    assert sigmoid_loss(ratios(1.5, -0.5), beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1)))
    # The labels swapped with probability 0.1: 0.9 ln(1 + 1/e) + 0.1 ln(1 + e)
    smoothed = sigmoid_loss(ratios(1.5, -0.5), beta=0.5, label_smoothing=0.1).item()
    assert smoothed == pytest.approx(0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.e))


def test_one_loss_per_pair() -> None:
    both = sigmoid_loss(ratios([0.0, 2.0], [0.0, 0.0]), beta=0.5)
    assert both.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1))])


def test_sigmoid_gradient_is_the_one_of_section_4() -> None:
    """-beta sigma(r(y_l) - r(y_w)) [grad log pi(y_w) - grad log pi(y_l)], r = beta (log-ratio)."""
    chosen, rejected = [0.0, 2.0, -3.0, 40.0], [0.0, -1.0, 2.5, -40.0]
    logps = leaves(chosen, rejected)
    weights = [BETA / (1 + math.exp(BETA * (w - r))) for w, r in zip(chosen, rejected, strict=True)]
    for_chosen, for_rejected = gradients(sigmoid_loss(logps, beta=BETA), logps)
    assert for_chosen == pytest.approx([-weight for weight in weights], rel=1e-12)
    assert for_rejected == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_cdpo_rests_where_the_preference_is_as_sure_as_the_labels(smoothing: float) -> None:
    margin = math.log((1 - smoothing) / smoothing) / BETA  # sigma(beta margin) = 1 - smoothing
    for offset, sign in [(-0.1, -1), (0.0, 0), (0.1, 1)]:
        logps = leaves([margin + offset], [0.0])
        loss = sigmoid_loss(logps, beta=BETA, label_smoothing=smoothing)
        (slope,), _ = gradients(loss, logps)
        assert slope == pytest.approx(0, abs=1e-12) if sign == 0 else slope * sign > 1e-4


def test_ipo_regresses_the_margin_to_half_the_inverse_beta() -> None:
    assert ipo_loss(ratios(1.5, -3.5), beta=0.1).item() == pytest.approx(0)  # margin 5 = 1 / 0.2
    assert ipo_loss(ratios(0.0), beta=0.1).item() == pytest.approx(25)
    assert ipo_loss(ratios(7.0), beta=0.1).item() == pytest.approx(4)


def test_minor_is_dpo_while_the_rejected_is_above_its_reference() -> None:
    chosen, rejected = [0.0, 2.0, -3.0], [0.0, 0.5, 4.0]
    ours, dpo = leaves(chosen, rejected), leaves(chosen, rejected)
    minor, sigmoid = minor_loss(ours, beta=BETA), sigmoid_loss(dpo, beta=BETA)
    assert minor.tolist() == sigmoid.tolist()
    assert gradients(minor, ours) == gradients(sigmoid, dpo)


def test_minor_leaves_a_rejected_below_its_reference_alone() -> None:
    logps = leaves([1.0, 1.0], [-0.01, -30.0])
    loss = minor_loss(logps, beta=BETA)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-BETA))] * 2)
    for_chosen, for_rejected = gradients(loss, logps)
    assert for_rejected == [0.0, 0.0]
    assert all(slope < 0 for slope in for_chosen)


def test_minor_pushes_the_rejected_at_its_very_first_step() -> None:
    logps = leaves([0.0], [0.0])
    _, for_rejected = gradients(minor_loss(logps, beta=BETA), logps)
    assert for_rejected == pytest.approx([BETA / 2])


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "minor"])
def test_the_nll_term_is_per_token_and_weighted(loss_type: str) -> None:
    plain = LossConfig.model_validate({"type": loss_type})
    with_nll = LossConfig.model_validate({"type": loss_type, "nll_coef": 0.5})
    logps = ratios(1.0)  # log pi(y_w) = 1 - 7 = -6 over 4 tokens: 1.5 nats per token
    extra = preference_loss(logps, with_nll) - preference_loss(logps, plain)
    assert extra.tolist() == pytest.approx([0.75])


def test_the_configured_loss_is_the_one_computed() -> None:
    logps = ratios([1.0, -2.0], [0.5, -3.0])
    expected = {
        "sigmoid": sigmoid_loss(logps, beta=0.2),
        "ipo": ipo_loss(logps, beta=0.2),
        "minor": minor_loss(logps, beta=0.2),
    }
    for loss_type, losses in expected.items():
        config = LossConfig.model_validate({"type": loss_type, "beta": 0.2})
        assert preference_loss(logps, config).tolist() == losses.tolist()
    smoothed = preference_loss(logps, LossConfig(beta=0.2, label_smoothing=0.1))
    assert smoothed.tolist() == sigmoid_loss(logps, beta=0.2, label_smoothing=0.1).tolist()
