"""Losses of one pair that ask for more than the margin: each completion against its reference."""

from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.config.loss import LossTerm, PairLoss
from dpo_ray.losses.logps import PairLogps
from dpo_ray.losses.margin import sigmoid_loss


def minor_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses. MinorDPO, arXiv:2408.09834: the rejected is pushed down only while above its reference.

    At h(y_l) = 0 the sub-gradient is 1, so that the first step is DPO's.
    """
    return sigmoid_loss(logps.chosen_ratio - logps.rejected_ratio.clamp(min=0), beta=beta)


def dpop_loss(logps: PairLogps, *, beta: float, dpop_lambda: float) -> Tensor:
    """[B] losses. DPO-Positive, arXiv:2402.13228: inside the sigmoid, max(0, -h(y_w)) lambda off the margin.

    At h(y_w) = 0 the penalty's sub-gradient is 0, so that the first step is DPO's.
    """
    return sigmoid_loss(logps.margin - dpop_lambda * F.relu(-logps.chosen_ratio), beta=beta)


def nca_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses. arXiv:2402.05369, two answers, one of them best: noise-contrastive, on absolute rewards."""
    chosen, rejected = beta * logps.chosen_ratio, beta * logps.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses. SPPO, arXiv:2405.00675, win probabilities 1 and 0: regress h to +- 1 / (2 beta)."""
    target = 1 / (2 * beta)
    return (logps.chosen_ratio - target) ** 2 + (logps.rejected_ratio + target) ** 2


def apo_zero_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses. Eq. 7 of arXiv:2408.06266: the chosen up, the rejected down, each from the reference."""
    return torch.sigmoid(-beta * logps.chosen_ratio) + torch.sigmoid(beta * logps.rejected_ratio)


def apo_down_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses. Eq. 8 of arXiv:2408.06266: both down, the rejected more."""
    return torch.sigmoid(beta * logps.chosen_ratio) + torch.sigmoid(-beta * logps.margin)


def tdpo1_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses. TDPO1, arXiv:2404.11999: DPO with the difference of the sequential KLs off the margin."""
    assert logps.chosen_kl is not None and logps.rejected_kl is not None, "tdpo1 needs sequential KLs"
    return sigmoid_loss(logps.margin - (logps.rejected_kl - logps.chosen_kl), beta=beta)


def tdpo2_loss(logps: PairLogps, *, beta: float, alpha: float) -> Tensor:
    """[B] losses. TDPO2, arXiv:2404.11999: TDPO1 with alpha, and no gradient through the chosen's KL."""
    assert logps.chosen_kl is not None and logps.rejected_kl is not None, "tdpo2 needs sequential KLs"
    return sigmoid_loss(logps.margin - alpha * (logps.rejected_kl - logps.chosen_kl.detach()), beta=beta)


def pair_term_loss(kind: PairLoss, logps: PairLogps, term: LossTerm) -> Tensor:
    """[B] losses of a function of both log-ratios, as configured."""
    beta = term.beta
    match kind:
        case "minor":
            return minor_loss(logps, beta=beta)
        case "dpop":
            return dpop_loss(logps, beta=beta, dpop_lambda=term.dpop_lambda)
        case "nca":
            return nca_loss(logps, beta=beta)
        case "sppo":
            return sppo_loss(logps, beta=beta)
        case "apo_zero":
            return apo_zero_loss(logps, beta=beta)
        case "apo_down":
            return apo_down_loss(logps, beta=beta)
        case "tdpo1":
            return tdpo1_loss(logps, beta=beta)
        case "tdpo2":
            return tdpo2_loss(logps, beta=beta, alpha=term.tdpo_alpha)
        case _:
            assert_never(kind)
