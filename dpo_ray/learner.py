"""Data-parallel preference optimization of one policy, round by round; runs without Ray and vLLM."""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from dpo_ray.batching import pad_rows, pair_sequences
from dpo_ray.config import TrainingConfig
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.losses import PairLogps, preference_loss
from dpo_ray.metrics import StepMetrics
from dpo_ray.models import load_model, load_tokenizer, make_canaries, save_policy
from dpo_ray.registry import Canary
from dpo_ray.types import Pair, TokenSequence


class TrainingError(ValueError):
    """Training cannot go on, and would fail again if it were repeated."""


@dataclass(frozen=True, slots=True)
class Peers:
    """This process among the data-parallel ones. Every collective below is a no-op for a single process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device) -> "Peers":
        if not dist.is_initialized():
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's items of a list that all processes hold."""
        return items[self.rank :: self.world_size]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


class Learner:
    """Policy, optimizer and step count of one process; all processes hold the same."""

    def __init__(self, folder: Path, reference: Path, config: TrainingConfig, peers: Peers) -> None:
        self.config = config
        self.peers = peers
        self.step = 0
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        self.model = load_model(folder, device=peers.device)
        self._reference = reference
        self._reference_logps: dict[str, tuple[float, float]] = {}
        self._scorer = CompletionScorer(self.model)
        self._parallel = DistributedDataParallel(self._scorer) if peers.world_size > 1 else self._scorer
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def train_round(
        self, pairs: Sequence[Pair], *, seed: str, on_step: Callable[[StepMetrics, int], None]
    ) -> list[StepMetrics]:
        """Go through the pairs `epochs` times; `on_step` gets each step's metrics and the number of steps.

        TrainingError: a loss or gradient is not finite.
        """
        self._score_with_reference(pairs)
        batches = [
            batch for epoch in range(self.config.epochs) for batch in self._batches(pairs, f"{seed} {epoch}")
        ]
        history = []
        for batch in batches:
            history.append(self.train_step(batch))
            on_step(history[-1], len(batches))
        return history

    def train_step(self, batch: Sequence[Pair]) -> StepMetrics:
        """One optimizer step on a global batch, of which every process computes its share."""
        self._score_with_reference(batch)
        self._set_learning_rate()
        totals = torch.zeros(len(_STEP_METRICS), dtype=torch.float64, device=self.peers.device)
        micro_batches = _split(self.peers.share(batch), self.config.micro_batch_size)
        # A process without a pair takes part in the gradient exchange with a loss of weight 0.
        for index, pairs in enumerate(micro_batches or [batch[:1]]):
            last = index == max(0, len(micro_batches) - 1)
            with nullcontext() if last else self._without_exchange():
                totals += self._backward(pairs, len(batch), weight=1.0 if micro_batches else 0.0)
        means = self.peers.sum(totals) / len(batch)
        metrics: StepMetrics = dict(zip(_STEP_METRICS, means.tolist(), strict=True))
        metrics["grad_norm"] = self._update(metrics["loss"], batch)
        self.step += 1
        return {**metrics, "learning_rate": self._learning_rate(self.step), "step": self.step}

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair]) -> StepMetrics:
        """The metrics of held-out pairs; nothing is updated."""
        self._score_with_reference(pairs)
        totals = torch.zeros(len(_STEP_METRICS), dtype=torch.float64, device=self.peers.device)
        for some in _split(self.peers.share(pairs), self.config.micro_batch_size):
            totals += _metric_sums(*self._losses(self._scorer, some), self.config.loss.beta)
        means = self.peers.sum(totals) / len(pairs)
        return dict(zip(_STEP_METRICS, means.tolist(), strict=True))

    @torch.no_grad()
    def reference_logps(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """Summed completion log-probs under the reference; the reference leaves memory afterwards."""
        sums = torch.zeros(len(sequences), dtype=torch.float64, device=self.peers.device)
        scorer = CompletionScorer(load_model(self._reference, device=self.peers.device))
        for indices in _split(self.peers.share(range(len(sequences))), 2 * self.config.micro_batch_size):
            with self._precision():
                logps = scorer(pad_rows([sequences[i] for i in indices]).to(self.peers.device))
            sums[torch.tensor(list(indices))] = logps.double()
        return self.peers.sum(sums).tolist()

    def canaries(self, sequences: Sequence[Sequence[int]]) -> list[Canary]:
        return make_canaries(self.model, sequences)

    def save(self, folder: Path) -> None:
        """The policy as a Hugging Face folder."""
        save_policy(self.model, self.tokenizer, folder)

    def state_dict(self) -> dict[str, Any]:
        """What goes on from here, beside the weights."""
        return {"step": self.step, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self._optimizer.load_state_dict(state["optimizer"])

    def _batches(self, pairs: Sequence[Pair], seed: str) -> list[list[Pair]]:
        order = random.Random(seed).sample(range(len(pairs)), len(pairs))
        return [[pairs[i] for i in some] for some in _split(order, self.config.batch_size)]

    def _score_with_reference(self, pairs: Sequence[Pair]) -> None:
        new = [pair for pair in pairs if pair.pair_id not in self._reference_logps]
        if not new:
            return
        logps = self.reference_logps(pair_sequences(new))
        for pair, chosen, rejected in zip(new, logps[: len(new)], logps[len(new) :], strict=True):
            self._reference_logps[pair.pair_id] = (chosen, rejected)

    def _backward(self, pairs: Sequence[Pair], batch_size: int, *, weight: float) -> Tensor:
        """Add these pairs' gradient; their summed metrics, in the order of `_STEP_METRICS`."""
        losses, logps = self._losses(self._parallel, pairs)
        # The exchange takes the mean over processes; the gradient wanted is the mean over the global batch.
        (losses.sum() * (weight * self.peers.world_size / batch_size)).backward()
        return weight * _metric_sums(losses, logps, self.config.loss.beta)

    def _losses(self, scorer: nn.Module, pairs: Sequence[Pair]) -> tuple[Tensor, PairLogps]:
        rows = pad_rows(pair_sequences(pairs)).to(self.peers.device)
        with self._precision():
            chosen, rejected = scorer(rows).chunk(2)
        scored = [self._reference_logps[pair.pair_id] for pair in pairs]
        references = torch.tensor(scored, device=chosen.device)
        lengths = torch.tensor([len(pair.chosen_ids) for pair in pairs], device=chosen.device)
        logps = PairLogps(chosen, rejected, references[:, 0], references[:, 1], lengths)
        return preference_loss(logps, self.config.loss), logps

    def _update(self, loss: float, batch: Sequence[Pair]) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            ids = ", ".join(pair.pair_id for pair in batch)
            raise TrainingError(f"loss {loss} and gradient norm {norm} at step {self.step + 1}; pairs: {ids}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _set_learning_rate(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step + 1)

    def _learning_rate(self, step: int) -> float:
        return self.config.learning_rate * min(1.0, step / (self.config.warmup_steps + 1))

    def _without_exchange(self) -> Any:
        return (
            self._parallel.no_sync() if isinstance(self._parallel, DistributedDataParallel) else nullcontext()
        )

    def _precision(self) -> Any:
        on_gpu = self.peers.device.type == "cuda"
        return torch.autocast("cuda", dtype=torch.bfloat16) if on_gpu else nullcontext()


_STEP_METRICS: tuple[str, ...] = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "chosen_log_ratio",
)


def _metric_sums(losses: Tensor, logps: PairLogps, beta: float) -> Tensor:
    with torch.no_grad():
        chosen, rejected = beta * logps.chosen_ratio, beta * logps.rejected_ratio
        accurate = (chosen > rejected).float()
        values = (
            losses,
            chosen,
            rejected,
            accurate,
            chosen - rejected,
            logps.chosen,
            logps.rejected,
            logps.chosen_ratio,
        )
        return torch.stack([value.double().sum() for value in values])


def _split(items: Sequence[Any], size: int) -> list[Any]:
    return [items[start : start + size] for start in range(0, len(items), size)]
