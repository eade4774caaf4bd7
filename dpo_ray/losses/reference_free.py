"""Losses of the policy's log-probs alone."""

from typing import assert_never

import torch
from torch import Tensor

from dpo_ray.config.loss import LossTerm, ReferenceFreeLoss
from dpo_ray.losses.logps import PairLogps, per_token
from dpo_ray.losses.margin import hinge_loss, sigmoid_loss


def chosen_nll(logps: PairLogps) -> Tensor:
    """[B] negative log-likelihood per chosen token: the NLL term of arXiv:2404.19733."""
    return -per_token(logps.chosen, logps.chosen_length)


def sft_loss(logps: PairLogps) -> Tensor:
    """[B] losses, whose mean over the global batch is the negative log-likelihood per chosen token of it."""
    mean_length = logps.mean_chosen_length
    if mean_length is None:
        mean_length = logps.chosen_length.to(logps.chosen.dtype).mean()
    # A batch without any chosen token costs 0.
    shortest = 1 / max(1, logps.chosen.numel())
    return -logps.chosen / torch.as_tensor(mean_length, dtype=logps.chosen.dtype).clamp(min=shortest)


def slic_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses. SLiC-HF, Eq. 1 of arXiv:2305.10425, with delta = 1 / beta and scaled by beta as in TRL."""
    return hinge_loss(logps.chosen - logps.rejected, beta=beta)


def cpo_loss(logps: PairLogps, *, beta: float, label_smoothing: float, cpo_alpha: float) -> Tensor:
    """[B] losses. Eq. 3 of arXiv:2401.08417: DPO under a uniform reference, and the chosen's likelihood.

    The likelihood is per token of the batch, as in the authors' code and TRL; the paper writes the sum.
    """
    preference = sigmoid_loss(logps.chosen - logps.rejected, beta=beta, label_smoothing=label_smoothing)
    return preference + cpo_alpha * sft_loss(logps)


def simpo_loss(logps: PairLogps, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """[B] losses. Eq. 6 of arXiv:2405.14734: rewards are beta times log-probs per token, gamma apart."""
    chosen = per_token(logps.chosen, logps.chosen_length)
    rejected = per_token(logps.rejected, logps.rejected_length)
    return sigmoid_loss(chosen - rejected - gamma / beta, beta=beta, label_smoothing=label_smoothing)


def orpo_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses. Eq. 6 of arXiv:2403.07691, its lambda being beta: likelihood, and odds ratio per token.

    The likelihood is the completion's, as in the paper; TRL's takes in the prompt.
    """
    chosen = _log_odds(per_token(logps.chosen, logps.chosen_length))
    rejected = _log_odds(per_token(logps.rejected, logps.rejected_length))
    return chosen_nll(logps) + beta * sigmoid_loss(chosen - rejected, beta=1.0)


def _log_odds(logp: Tensor) -> Tensor:
    """[B] log(P / (1 - P)) of [B] log P; a P that rounds to 1 counts as 1 less the dtype's resolution."""
    surprise = (-logp).clamp(min=torch.finfo(logp.dtype).eps)
    return -surprise - torch.log(-torch.expm1(-surprise))


def reference_free_term_loss(kind: ReferenceFreeLoss, logps: PairLogps, term: LossTerm) -> Tensor:
    """[B] losses of a function of the policy's log-probs, as configured."""
    beta, smoothing = term.beta, term.label_smoothing
    match kind:
        case "slic":
            return slic_loss(logps, beta=beta)
        case "cpo":
            return cpo_loss(logps, beta=beta, label_smoothing=smoothing, cpo_alpha=term.cpo_alpha)
        case "simpo":
            return simpo_loss(logps, beta=beta, gamma=term.gamma, label_smoothing=smoothing)
        case "orpo":
            return orpo_loss(logps, beta=beta)
        case "sft":
            return sft_loss(logps)
        case _:
            assert_never(kind)
