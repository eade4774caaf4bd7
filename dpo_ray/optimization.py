"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Iterable
from typing import assert_never

import torch
from torch import nn

from dpo_ray.config import TrainingConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        case "rmsprop":
            return torch.optim.RMSprop(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        case _:
            assert_never(config.optimizer)


def learning_rate(config: TrainingConfig, *, step: int, progress: float) -> float:
    """Of the optimizer step number `step`, from 1; `progress` in [0, 1): how much of all rounds is done.

    The warm-up is that of the DPO paper's code: min(1, step / (warmup_steps + 1)).
    """
    peak = config.learning_rate * min(1.0, step / (config.warmup_steps + 1))
    match config.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * (1 + math.cos(math.pi * progress)) / 2
        case _:
            assert_never(config.schedule)
