"""One round of training: every step in order, evaluated, stopped early, and resumed where it was killed."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from dpo_ray.config import EarlyStoppingConfig, TrainingConfig
from dpo_ray.learner import Learner, TrainingError
from dpo_ray.metrics import StepMetrics
from dpo_ray.parallel import gathered
from dpo_ray.types import Pair


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """What a round trains on, and its place among the rounds."""

    pairs: Sequence[Pair]
    seed: int
    held_out: Sequence[Pair] = ()
    round: int = 0
    rounds: int = 1

    def batches(self, config: TrainingConfig) -> list[list[Pair]]:
        """`epochs` times all pairs, each time in another order, which the seed and the round decide."""
        batches = []
        for epoch in range(config.epochs):
            order = list(range(len(self.pairs)))
            random.Random(f"{self.seed} {self.round} {epoch}").shuffle(order)
            starts = range(0, len(order), config.batch_size)
            batches += [[self.pairs[i] for i in order[start : start + config.batch_size]] for start in starts]
        return batches


class Checkpoints(Protocol):
    """Where a round's state is kept until the round is over. Every process calls both."""

    def load(self) -> dict[str, Any] | None: ...

    def save(self, state: dict[str, Any]) -> None: ...


@dataclass(slots=True)
class _Stopping:
    """Watches the evaluations of one round."""

    config: EarlyStoppingConfig
    best: float = -1.0
    worse: int = 0
    best_weights: list[Tensor] | None = None
    reason: str = ""

    def look(self, metrics: StepMetrics, learner: Learner) -> None:
        """Sets `reason` where training should stop."""
        drop, kl = -metrics.get("chosen_log_ratio", 0.0), metrics.get("kl/reference", 0.0)
        if self.config.max_chosen_drop is not None and drop > self.config.max_chosen_drop:
            self.reason = f"chosen log-prob {drop:.2f} nats below the reference's"
        if self.config.max_kl is not None and kl > self.config.max_kl:
            self.reason = f"KL to the reference {kl:.2f} nats"
        if self.config.patience is not None:
            self._look_at_accuracy(metrics["rewards/accuracies"], learner, self.config.patience)

    def _look_at_accuracy(self, accuracy: float, learner: Learner, patience: int) -> None:
        if accuracy > self.best:
            self.best, self.worse, self.best_weights = accuracy, 0, learner.weights()
            return
        self.worse += 1
        if self.worse >= patience:
            self.reason = f"rewards/accuracies did not rise above {self.best:.3f} in {patience} evaluations"


@dataclass(slots=True)
class RoundResult:
    """What came of a round."""

    history: list[StepMetrics] = field(default_factory=list)
    """Of each step; with `eval/…` where held-out pairs were looked at."""
    stopped: str = ""
    """Why training ended before its last step."""


def train_round(
    learner: Learner,
    plan: RoundPlan,
    *,
    on_step: Callable[[StepMetrics, int], None],
    checkpoints: Checkpoints | None = None,
) -> RoundResult:
    """Do the steps that are left; `on_step` gets each step's metrics and the number of steps.

    TrainingError: a loss or gradient is not finite, or no pair is held out that patience could look at.
    """
    config = learner.config
    _check(plan, config.early_stopping)
    batches = plan.batches(config)
    result, stopping = RoundResult(), _Stopping(config.early_stopping)
    learner.reference.begin_round(
        [*batches[: _per_epoch(plan, config)], *([plan.held_out] if plan.held_out else [])]
    )
    if checkpoints is not None and (state := checkpoints.load()) is not None:
        _restore(state, learner, result, stopping)
    for index in range(len(result.history), len(batches)):
        progress = (plan.round + index / len(batches)) / plan.rounds
        metrics = learner.train_step(batches[index], progress=progress)
        if plan.held_out and _is_due(index + 1, config.early_stopping.eval_every_steps):
            measured = learner.evaluate(plan.held_out)
            metrics |= {f"eval/{name}": value for name, value in measured.items()}
            stopping.look(measured, learner)
        result.history.append(metrics)
        on_step(metrics, len(batches))
        if stopping.reason:
            break
        if checkpoints is not None and _is_due(index + 1, config.checkpoint_every_steps):
            checkpoints.save(_state(learner, result, stopping))
    result.stopped = stopping.reason
    if stopping.best_weights is not None:
        learner.load_weights(stopping.best_weights)
    return result


def _check(plan: RoundPlan, config: EarlyStoppingConfig) -> None:
    if config.patience is not None and plan.held_out and all(pair.is_unpaired for pair in plan.held_out):
        raise TrainingError(
            f"early_stopping.patience={config.patience} looks at rewards/accuracies, and no held-out pair "
            "has both a chosen and a rejected completion: set max_kl or max_chosen_drop in its place"
        )


def _per_epoch(plan: RoundPlan, config: TrainingConfig) -> int:
    return -(-len(plan.pairs) // config.batch_size)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _state(learner: Learner, result: RoundResult, stopping: _Stopping) -> dict[str, Any]:
    """Nothing else is random or remembered: dropout is off, and the plan decides the order of pairs."""
    keep = learner.peers.rank == 0
    return {
        "learner": learner.state_dict(),
        "weights": gathered(learner.weights(), keep=keep),
        "history": result.history,
        "best": stopping.best,
        "worse": stopping.worse,
        "best_weights": gathered(stopping.best_weights, keep=keep),
    }


def _restore(state: dict[str, Any], learner: Learner, result: RoundResult, stopping: _Stopping) -> None:
    learner.load_state_dict(state["learner"])
    learner.load_weights(state["weights"])
    result.history += state["history"]
    stopping.best, stopping.worse = state["best"], state["worse"]
    stopping.best_weights = state["best_weights"]
