"""Preference losses: pure functions of summed log-probs, one value per pair."""

from dataclasses import dataclass
from typing import assert_never

import torch.nn.functional as F
from torch import Tensor

from dpo_ray.config import LossConfig


@dataclass(frozen=True, slots=True)
class PairLogps:
    """[B] log-probs of a batch of pairs, summed over completion tokens, in nats."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor
    """[B] tokens in the chosen completion."""

    @property
    def chosen_ratio(self) -> Tensor:
        """[B] h(y_w): policy over reference, of the chosen completion."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """[B] h(y_l): policy over reference, of the rejected completion."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """[B] h(y_w) - h(y_l), without beta."""
        return self.chosen_ratio - self.rejected_ratio


def sigmoid_loss(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[B] losses. Eq. 7 of arXiv:2305.18290; with label smoothing its conservative form, cDPO."""
    logits = beta * logps.margin
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses. Eq. 17 of arXiv:2310.12036 on summed log-probs: regress the margin to 1 / (2 beta)."""
    return (logps.margin - 1 / (2 * beta)) ** 2


def minor_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses. MinorDPO, arXiv:2408.09834: the rejected is pushed down only while above its reference.

    At h(y_l) = 0 the sub-gradient is 1, so that the first step is DPO's.
    """
    return -F.logsigmoid(beta * (logps.chosen_ratio - logps.rejected_ratio.clamp(min=0)))


def chosen_nll(logps: PairLogps) -> Tensor:
    """[B] negative log-likelihood per chosen token: the NLL term of arXiv:2404.19733."""
    return -logps.chosen / logps.chosen_length


def preference_loss(logps: PairLogps, config: LossConfig) -> Tensor:
    """[B] losses as configured; the caller takes the mean."""
    match config.type:
        case "sigmoid":
            loss = sigmoid_loss(logps, beta=config.beta, label_smoothing=config.label_smoothing)
        case "ipo":
            loss = ipo_loss(logps, beta=config.beta)
        case "minor":
            loss = minor_loss(logps, beta=config.beta)
        case _:
            assert_never(config.type)
    return loss + config.nll_coef * chosen_nll(logps)
