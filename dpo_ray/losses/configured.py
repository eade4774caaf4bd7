"""The loss of a configuration: its terms, what modifies them, and what they need to be given."""

from typing import assert_never, get_args

import torch
from torch import Tensor

from dpo_ray.config.loss import BatchLoss, LossConfig, LossTerm, ReferenceFreeLoss, UnpairedLoss
from dpo_ray.losses.batch import batch_term_loss
from dpo_ray.losses.logps import PairLogps, per_token
from dpo_ray.losses.margin import margin_term_loss
from dpo_ray.losses.pair import pair_term_loss
from dpo_ray.losses.reference_free import chosen_nll, reference_free_term_loss
from dpo_ray.losses.weighting import sampler_weight, wpo_weight


def preference_loss(logps: PairLogps, config: LossConfig) -> Tensor:
    """[B] losses as configured; the caller takes the mean."""
    terms = [term.weight * _term_loss(logps, term) for term in config.terms]
    loss = torch.stack(terms).sum(0)
    if config.nll_coef:
        loss = loss + config.nll_coef * chosen_nll(logps)
    match config.weighting:
        case "none":
            return loss * logps.weight
        case "wpo":
            return loss * logps.weight * wpo_weight(logps)
        case "wpo_sampler":
            return loss * logps.weight * sampler_weight(logps)
        case _:
            assert_never(config.weighting)


def _term_loss(logps: PairLogps, term: LossTerm) -> Tensor:
    """[B] losses of one loss of the sum, without its weight."""
    match term.type:
        case "sigmoid" | "robust" | "ipo" | "hinge" | "exo" | "discopop" | "sigmoid_norm":
            return margin_term_loss(term.type, logps, term)
        case "minor" | "dpop" | "nca" | "sppo" | "apo_zero" | "apo_down" | "tdpo1" | "tdpo2":
            return pair_term_loss(term.type, logps, term)
        case "slic" | "cpo" | "simpo" | "orpo" | "sft":
            return reference_free_term_loss(term.type, logps, term)
        case "kto" | "bco" | "aot" | "aot_unpaired":
            return batch_term_loss(term.type, logps, term)
        case _:
            assert_never(term.type)


def rewards(logps: PairLogps, config: LossConfig) -> tuple[Tensor, Tensor]:
    """[B] and [B] implicit rewards of chosen and rejected, detached, as TRL's trainers log them.

    Of a sum, those of its first loss. beta times the log-ratio; without a reference beta times the log-prob,
    per token where the loss is.
    """
    if config.type not in get_args(ReferenceFreeLoss):
        chosen, rejected = logps.chosen_ratio, logps.rejected_ratio
    elif config.type in ("simpo", "orpo"):
        chosen = per_token(logps.chosen, logps.chosen_length)
        rejected = per_token(logps.rejected, logps.rejected_length)
    else:
        chosen, rejected = logps.chosen, logps.rejected
    return config.beta * chosen.detach(), config.beta * rejected.detach()


def needs_whole_batch(config: LossConfig) -> bool:
    """Whether a pair's loss depends on the other pairs: the loss then wants the rows of the global batch."""
    return any(term.type in get_args(BatchLoss) for term in config.terms)


def needs_sequential_kl(config: LossConfig) -> bool:
    """Whether the loss reads `chosen_kl` and `rejected_kl`."""
    return any(term.type in ("tdpo1", "tdpo2") for term in config.terms)


def needs_mismatched(config: LossConfig) -> bool:
    """Whether the loss reads `mismatched_ratio`."""
    return any(term.type == "kto" for term in config.terms)


def needs_reference(config: LossConfig) -> bool:
    """Whether any loss of the sum reads the reference's log-probs."""
    return any(term.type not in get_args(ReferenceFreeLoss) for term in config.terms)


def accepts_unpaired(config: LossConfig) -> bool:
    """Whether rows may lack their chosen or their rejected completion."""
    return all(term.type in get_args(UnpairedLoss) for term in config.terms)


def accepts_weights(config: LossConfig) -> bool:
    """Whether rows may have weights of their own: losses that sort a batch take its rows apart."""
    return all(term.type not in ("aot", "aot_unpaired") for term in config.terms)
