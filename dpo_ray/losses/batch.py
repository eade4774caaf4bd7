"""Losses in which a pair's value depends on the other pairs: rows are those of the global batch."""

from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.config.loss import BatchLoss, LossTerm
from dpo_ray.losses.logps import PairLogps
from dpo_ray.losses.margin import sigmoid_loss


def kto_loss(
    logps: PairLogps, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """[B] losses, each the mean over the sides that a row has. Eq. 7 of arXiv:2402.01306.

    z_0, the policy's KL from its reference, is the mean log-ratio of prompts with other rows' completions,
    at least 0.
    """
    assert logps.mismatched_ratio is not None, "kto needs mismatched log-ratios"
    kl = logps.mismatched_ratio.mean().clamp(min=0).detach()
    desirable = desirable_weight * torch.sigmoid(-beta * (logps.chosen_ratio - kl))
    undesirable = undesirable_weight * torch.sigmoid(beta * (logps.rejected_ratio - kl))
    return _over_sides(logps, desirable, undesirable) / _num_sides(logps)


def bco_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses, each the sum over the sides that a row has. arXiv:2404.04656: a classifier whose logit is
    the reward, centred on the running mean of rewards.

    Of pairs it is TRL's `bco_pair` but for the centre, which TRL dropped there; of single answers TRL's BCO.
    """
    assert logps.running_reward is not None, "bco needs the running mean of rewards"
    centre = logps.running_reward.detach()
    chosen = -F.logsigmoid(beta * logps.chosen_ratio - centre)
    rejected = -F.logsigmoid(centre - beta * logps.rejected_ratio)
    return _over_sides(logps, chosen, rejected)


def aot_loss(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[B] losses by rank, not by row. Paired AOT, arXiv:2406.05882: DPO between the sorted differences of the
    policy and those of the reference, so that the first dominate in all quantiles."""
    policy = torch.sort(logps.chosen - logps.rejected).values
    reference = torch.sort(logps.ref_chosen - logps.ref_rejected).values
    return sigmoid_loss(policy - reference, beta=beta, label_smoothing=label_smoothing)


def aot_unpaired_loss(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[B] losses by rank, not by row. Unpaired AOT, arXiv:2406.05882: DPO between the sorted log-ratios of
    the chosen and those of the rejected completions."""
    chosen = torch.sort(logps.chosen_ratio).values
    rejected = torch.sort(logps.rejected_ratio).values
    return sigmoid_loss(chosen - rejected, beta=beta, label_smoothing=label_smoothing)


def _over_sides(logps: PairLogps, chosen: Tensor, rejected: Tensor) -> Tensor:
    """[B] sums of two [B] losses, without those of a completion that the row lacks."""
    return chosen * (logps.chosen_length > 0) + rejected * (logps.rejected_length > 0)


def _num_sides(logps: PairLogps) -> Tensor:
    """[B] completions of a row: 1 or 2."""
    return (logps.chosen_length > 0).int() + (logps.rejected_length > 0).int()


def batch_term_loss(kind: BatchLoss, logps: PairLogps, term: LossTerm) -> Tensor:
    """[B] losses of a function of the whole batch, as configured."""
    beta, smoothing = term.beta, term.label_smoothing
    match kind:
        case "kto":
            return kto_loss(
                logps,
                beta=beta,
                desirable_weight=term.desirable_weight,
                undesirable_weight=term.undesirable_weight,
            )
        case "bco":
            return bco_loss(logps, beta=beta)
        case "aot":
            return aot_loss(logps, beta=beta, label_smoothing=smoothing)
        case "aot_unpaired":
            return aot_unpaired_loss(logps, beta=beta, label_smoothing=smoothing)
        case _:
            assert_never(kind)
