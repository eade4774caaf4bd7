"""Weights of pairs by how likely the policy is to say them."""

import torch
from torch import Tensor

from dpo_ray.losses.logps import PairLogps, per_token


def wpo_weight(logps: PairLogps) -> Tensor:
    """[B] detached weights. Eq. 2 of arXiv:2406.11827 with its sampled alignment, as in TRL.

    Of a completion, exp of the mean over tokens of log pi(y_t) - log sum_v pi(v)^2; of a pair, the product.
    """
    assert logps.chosen_square is not None and logps.rejected_square is not None, "wpo needs squared sums"
    chosen = per_token(logps.chosen - logps.chosen_square, logps.chosen_length)
    rejected = per_token(logps.rejected - logps.rejected_square, logps.rejected_length)
    return torch.exp(chosen + rejected).detach()


def sampler_weight(logps: PairLogps) -> Tensor:
    """[B] detached weights: how much less likely per token the policy is to say a pair than its sampler was.

    Of a completion, the ratio's geometric mean over tokens, at most 1; of a pair, the product.
    ValueError: a completion has no recorded log-prob.
    """
    assert logps.chosen_sampled is not None and logps.rejected_sampled is not None, "wpo_sampler needs both"
    chosen = _sampler_ratio(logps.chosen, logps.chosen_sampled, logps.chosen_length)
    rejected = _sampler_ratio(logps.rejected, logps.rejected_sampled, logps.rejected_length)
    return torch.exp(chosen.clamp(max=0) + rejected.clamp(max=0))


def _sampler_ratio(logp: Tensor, sampled: Tensor, length: Tensor) -> Tensor:
    """[B] detached log-ratios per token, policy to sampler; 0 where the row lacks the completion."""
    num_missing = int((sampled.isnan() & (length > 0)).sum())
    if num_missing:
        raise ValueError(
            f"weighting=wpo_sampler needs the log-probs that the sampler recorded, and {num_missing} of "
            f"{len(sampled)} completions have none: train on sampled pairs, or set weighting to wpo or none"
        )
    return torch.where(length > 0, per_token(logp.detach() - sampled, length), 0.0)
