"""Losses of the margin alone, and the margins that divergences other than reverse KL give."""

import math
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.config.loss import Divergence, LossTerm, MarginLoss
from dpo_ray.losses.logps import PairLogps

_LARGEST_EXPONENT = 80.0
"""exp of it is finite in float32, with room for beta and sums."""


def sigmoid_loss(margin: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[B] losses. Eq. 7 of arXiv:2305.18290; with label smoothing its conservative form, cDPO."""
    logits = beta * margin
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust_loss(margin: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """[B] losses. arXiv:2403.00409: on average DPO's, where a share `label_smoothing` of labels is wrong."""
    right, wrong = sigmoid_loss(margin, beta=beta), sigmoid_loss(-margin, beta=beta)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def ipo_loss(margin: Tensor, *, beta: float) -> Tensor:
    """[B] losses. Eq. 17 of arXiv:2310.12036, its tau being beta: regress the margin to 1 / (2 beta)."""
    return (margin - 1 / (2 * beta)) ** 2


def hinge_loss(margin: Tensor, *, beta: float) -> Tensor:
    """[B] losses. RSO's hinge-norm, arXiv:2309.06657: max(0, 1 - beta margin)."""
    return F.relu(1 - beta * margin)


def exo_loss(margin: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """[B] losses. EXO-pref, Eq. 16 of arXiv:2402.00856: KL(policy's preference || smoothed label)."""
    logits = beta * margin
    right = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return right + wrong


def discopop_loss(margin: Tensor, *, beta: float, tau: float) -> Tensor:
    """[B] losses. Eq. 5 of arXiv:2406.08414: logistic, by sigma(beta margin / tau) blended to exponential.

    The exponential part is one exponential of a sum, finite for tau <= 1: apart, its factors overflow and
    vanish.
    """
    logits = beta * margin
    logistic = -F.logsigmoid(logits) * torch.sigmoid(-logits / tau)
    return logistic + torch.exp(F.logsigmoid(logits / tau) - logits)


def divergence_score(ratio: Tensor, divergence: Divergence, *, alpha: float) -> Tensor:
    """[B] f'(u) of log-ratios log u, whose place it takes. f-DPO, arXiv:2309.16240.

    Up to a constant, which the margin cancels: f'(1) is 0. alpha is the paper's and that of TRL's
    documentation, f'(u) = (1 - u^-alpha) / alpha; TRL's code takes 1 - alpha for it. Where the power of u is
    beyond e^80, there is no gradient.
    """
    match divergence:
        case "reverse_kl":
            return ratio
        case "forward_kl":
            return 1 - torch.exp((-ratio).clamp(max=_LARGEST_EXPONENT))
        case "js":
            return math.log(2) + F.logsigmoid(ratio)
        case "alpha":
            return (1 - torch.exp((-alpha * ratio).clamp(max=_LARGEST_EXPONENT))) / alpha
        case _:
            assert_never(divergence)


def term_margin(logps: PairLogps, term: LossTerm) -> Tensor:
    """[B] margins that the term's loss is a function of.

    Normalised by length, IPO is what its authors ran and TRL has; the paper's equation has the sum.
    """
    if term.type == "sigmoid_norm" or term.ipo_normalize == "mean":
        return logps.margin_per_token
    chosen, rejected = (
        divergence_score(ratio, term.divergence, alpha=term.divergence_alpha)
        for ratio in (logps.chosen_ratio, logps.rejected_ratio)
    )
    return chosen - rejected


def margin_term_loss(kind: MarginLoss, logps: PairLogps, term: LossTerm) -> Tensor:
    """[B] losses of a function of the margin, as configured."""
    margin, beta, smoothing = term_margin(logps, term), term.beta, term.label_smoothing
    match kind:
        case "sigmoid" | "sigmoid_norm":
            return sigmoid_loss(margin, beta=beta, label_smoothing=smoothing)
        case "robust":
            return robust_loss(margin, beta=beta, label_smoothing=smoothing)
        case "ipo":
            return ipo_loss(margin, beta=beta)
        case "hinge":
            return hinge_loss(margin, beta=beta)
        case "exo":
            return exo_loss(margin, beta=beta, label_smoothing=smoothing)
        case "discopop":
            return discopop_loss(margin, beta=beta, tau=term.discopop_tau)
        case _:
            assert_never(kind)
