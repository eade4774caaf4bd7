"""Preference pairs to a reward model, by the Bradley–Terry likelihood."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_ray.config import RewardModelConfig
from dpo_ray.judges.reward_model import batch_rewards, reward_row, score_rows
from dpo_ray.types import Pair

_MAX_GRAD_NORM = 1.0
OnStep = Callable[[int, int], None]
"""Told (done, total) steps."""


@dataclass(frozen=True, slots=True)
class Example:
    """One pair, as the model reads it."""

    chosen: list[int]
    rejected: list[int]
    margin: float
    """By how much the chosen's reward should be higher, at least."""
    weight: float


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """[B] losses: -log sigmoid(chosen - rejected - margin), eq. 2 of arXiv:2307.09288."""
    return -F.logsigmoid(chosen - rejected - margin)


def make_example(pair: Pair, tokenizer: PreTrainedTokenizerBase, *, margin: float) -> Example:
    """`margin` multiplies the difference of the pair's rewards, where it has both."""
    gap = 0.0
    if pair.chosen_reward is not None and pair.rejected_reward is not None:
        gap = pair.chosen_reward - pair.rejected_reward
    sides = (reward_row(tokenizer, pair.prompt, side, {}) for side in (pair.chosen, pair.rejected))
    return Example(*sides, margin=margin * gap, weight=pair.weight)


def train_reward_model(
    model: PreTrainedModel, examples: Sequence[Example], config: RewardModelConfig, on_step: OnStep
) -> None:
    """Train in place, in float32, on the device where the model is."""
    per_epoch = -(-len(examples) // config.batch_size)
    total = per_epoch * config.epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=total)
    model.train()
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        order = random.Random(f"{config.seed} {epoch}").sample(range(len(examples)), len(examples))
        chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
        _batch_loss(model, [examples[number] for number in chosen]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(step + 1, total)
    model.eval()


def accuracy(model: PreTrainedModel, examples: Sequence[Example], *, batch_size: int) -> float:
    """Share of pairs whose chosen side has the higher reward; equal rewards count half."""
    rows = [*(example.chosen for example in examples), *(example.rejected for example in examples)]
    rewards = score_rows(model, rows, batch_size=batch_size)
    sides = zip(rewards[: len(examples)], rewards[len(examples) :], strict=True)
    return sum((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in sides) / len(examples)


def _batch_loss(model: PreTrainedModel, batch: Sequence[Example]) -> Tensor:
    """The mean over the batch, both sides in one forward pass."""
    rows = [*(example.chosen for example in batch), *(example.rejected for example in batch)]
    chosen, rejected = batch_rewards(model, rows).chunk(2)
    margin, weight = (
        chosen.new_tensor([getattr(example, name) for example in batch]) for name in ("margin", "weight")
    )
    return (weight * bradley_terry_loss(chosen, rejected, margin)).mean()
