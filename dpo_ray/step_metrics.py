"""The metrics of a batch of pairs, by TRL's names."""

import torch
from torch import Tensor

from dpo_ray.config import LossConfig, TrainingConfig
from dpo_ray.losses import PairLogps, needs_reference, rewards
from dpo_ray.metrics import StepMetrics


@torch.no_grad()
def batch_metrics(losses: Tensor, logps: PairLogps, config: TrainingConfig) -> StepMetrics:
    """Means over the pairs; of a side, over the pairs that have it.

    A pair counts as right where the chosen's reward is strictly higher: at the first step none is.
    """
    chosen, rejected = rewards(logps, config.loss)
    has_chosen, has_rejected = logps.chosen_length > 0, logps.rejected_length > 0
    both = has_chosen & has_rejected
    metrics = {
        "loss": _mean(losses),
        "rewards/chosen": _mean(chosen[has_chosen]),
        "rewards/rejected": _mean(rejected[has_rejected]),
        "rewards/accuracies": _mean((chosen > rejected)[both]),
        "rewards/margins": _mean((chosen - rejected)[both]),
        "logps/chosen": _mean(logps.chosen[has_chosen]),
        "logps/rejected": _mean(logps.rejected[has_rejected]),
    }
    if needs_reference(config.loss) or config.early_stopping.max_chosen_drop is not None:
        metrics["chosen_log_ratio"] = _mean(logps.chosen_ratio[has_chosen])
    return {name: value for name, value in metrics.items() if value is not None}


@torch.no_grad()
def mean_reward(logps: PairLogps, config: LossConfig) -> tuple[int, float]:
    """How many completions a batch has, and their mean reward."""
    chosen, rejected = rewards(logps, config)
    present = torch.cat([chosen[logps.chosen_length > 0], rejected[logps.rejected_length > 0]])
    return len(present), present.double().mean().item()


def _mean(values: Tensor) -> float | None:
    """None where there is nothing to measure."""
    return values.double().mean().item() if len(values) else None
