"""Pairs in plain numbers, and the losses and gradients that they have."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from typing import Any

import torch

from dpo_ray.config.loss import LossConfig
from dpo_ray.losses import PairLogps, preference_loss


@dataclass(frozen=True)
class Row:
    """One pair in plain numbers, w the chosen and l the rejected: log-probs, reference's, lengths, KLs."""

    lw: float = -6.0
    ll: float = -10.0
    rw: float = -7.0
    rl: float = -9.0
    nw: float = 4.0
    nl: float = 5.0
    kw: float = 0.5
    kl: float = 2.5
    mismatched: float = 1.0

    @property
    def hw(self) -> float:
        return self.lw - self.rw

    @property
    def hl(self) -> float:
        return self.ll - self.rl

    @property
    def margin(self) -> float:
        return self.hw - self.hl


FIELDS = {
    "chosen": "lw",
    "rejected": "ll",
    "ref_chosen": "rw",
    "ref_rejected": "rl",
    "chosen_length": "nw",
    "rejected_length": "nl",
    "chosen_kl": "kw",
    "rejected_kl": "kl",
    "mismatched_ratio": "mismatched",
}


def batch(
    rows: Sequence[Row], *, running_reward: float = 1.0, dtype: torch.dtype = torch.float64
) -> PairLogps:
    """The rows as tensors; log-probs and KLs collect gradients."""
    tensors = {
        name: torch.tensor([asdict(row)[field] for row in rows], dtype=dtype)
        for name, field in FIELDS.items()
    }
    for name in ("chosen", "rejected", "chosen_kl", "rejected_kl"):
        tensors[name].requires_grad_()
    return PairLogps(**tensors, running_reward=torch.tensor(running_reward, dtype=dtype))


def ratios(hw: float, hl: float = 0.0) -> Row:
    """A pair with these log-ratios to the reference."""
    return Row(lw=hw - 7.0, ll=hl - 9.0, kw=0.0, kl=0.0)


def losses(rows: Sequence[Row], **settings: Any) -> list[float]:
    return preference_loss(batch(rows), LossConfig.model_validate(settings)).tolist()


def gradients(rows: Sequence[Row], **settings: Any) -> dict[str, list[float]]:
    """d sum of losses / d each log-prob and KL."""
    logps = batch(rows)
    preference_loss(logps, LossConfig.model_validate(settings)).sum().backward()
    inputs = {"lw": logps.chosen, "ll": logps.rejected, "kw": logps.chosen_kl, "kl": logps.rejected_kl}
    return {
        field: ([0.0] * len(rows) if tensor is None or tensor.grad is None else tensor.grad.tolist())
        for field, tensor in inputs.items()
    }


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def cost(x: float, smoothing: float = 0.0) -> float:
    return -(1 - smoothing) * log(sigma(x)) - smoothing * log(sigma(-x))
