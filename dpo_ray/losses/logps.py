"""What the losses know of a batch of pairs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairLogps:
    """[B] log-probs of a batch of pairs, summed over completion tokens, in nats.

    A row may lack a side (a thumb up has no rejected completion): its length and log-probs there are 0.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor
    """[B] tokens in the chosen completion."""
    rejected_length: Tensor
    """[B] tokens in the rejected completion."""
    weight: Tensor = field(default_factory=lambda: torch.ones(()))
    """[B] weights that the pairs came with."""
    mean_chosen_length: float | Tensor | None = None
    """Mean tokens of a chosen completion over the global batch; None: over these rows."""
    chosen_kl: Tensor | None = None
    """[B] KL(reference || policy) of a token, summed over the chosen completion's positions, in nats."""
    rejected_kl: Tensor | None = None
    """[B] the same of the rejected completion."""
    chosen_square: Tensor | None = None
    """[B] sum over the chosen completion's positions of log sum_v pi(v)^2, detached."""
    rejected_square: Tensor | None = None
    """[B] the same of the rejected completion."""
    chosen_sampled: Tensor | None = None
    """[B] summed log-prob that the sampler recorded for the chosen completion, NaN where it recorded none."""
    rejected_sampled: Tensor | None = None
    """[B] the same of the rejected completion."""
    mismatched_ratio: Tensor | None = None
    """[B] log-ratio to the reference of each prompt with another row's completion, detached."""
    running_reward: Tensor | None = None
    """[] running mean of the rewards, this batch's included."""

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

    @property
    def margin_per_token(self) -> Tensor:
        """[B] h(y_w) / |y_w| - h(y_l) / |y_l|."""
        return per_token(self.chosen_ratio, self.chosen_length) - per_token(
            self.rejected_ratio, self.rejected_length
        )


def per_token(summed: Tensor, length: Tensor) -> Tensor:
    """[B] means over tokens of [B] sums; 0 where there is no token."""
    return summed / length.clamp(min=1)
