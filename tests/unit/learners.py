"""Learners of one process, one that keeps its last gradient, and how far two sets of weights are apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from textbook import Weights, gradient
from torch import Tensor

from dpo_ray.config import TrainingConfig
from dpo_ray.learner import Learner
from dpo_ray.parallel import Peers
from dpo_ray.types import Pair


def make_learner(folder: Path, start: Path | None = None, **settings: Any) -> Learner:
    return Learner(folder, start or folder, TrainingConfig.model_validate(settings), Peers())


class GradientKeeper(Learner):
    """Keeps the gradient that a step was taken with, before it was clipped."""

    gradient: Tensor

    def _update(self, batch: Sequence[Pair], losses: Tensor, rate: float) -> float:
        self.gradient = gradient(self.model)
        return super()._update(batch, losses, rate)


def first_step(
    folder: Path, start: Path, pairs: Sequence[Pair], **settings: Any
) -> tuple[dict[str, float], Tensor]:
    """Metrics and gradient of a learner's first step."""
    learner = GradientKeeper(folder, start, TrainingConfig.model_validate(settings), Peers())
    return learner.train_step(pairs), learner.gradient


def weights_of(learner: Learner) -> Weights:
    return {name: tensor.clone() for name, tensor in learner.policy.state_dict().items()}


def assert_same_update(ours: Weights, theirs: Weights, before: Weights) -> None:
    """The change of all weights together to a thousandth, and no weight apart by more than a tenth of it.

    Of a gradient that is nothing but rounding, AdamW makes a step like any other: single weights may
    differ by a part of the learning rate.
    """
    assert ours.keys() == theirs.keys() == before.keys()
    moved = torch.cat([(theirs[name] - before[name]).flatten() for name in before])
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in before])
    assert moved.norm() > 0
    assert apart.norm() < 1e-3 * moved.norm()
    assert apart.abs().max() < 0.1 * moved.abs().max()


def assert_equal(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
