"""One optimizer step of preference optimization, data-parallel; runs without Ray and vLLM."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_ray.batching import sequence_groups
from dpo_ray.config import TrainingConfig
from dpo_ray.lm_head import CompletionSums, Objective
from dpo_ray.logprobs import CompletionScorer, Wanted
from dpo_ray.losses import needs_mismatched, needs_sequential_kl, needs_whole_batch, preference_loss
from dpo_ray.metrics import StepMetrics
from dpo_ray.models import make_canaries
from dpo_ray.optimization import learning_rate, make_optimizer
from dpo_ray.pair_batch import PairBatch
from dpo_ray.parallel import Peers, copy_into, exchange, gathered, parallel, sharded_like
from dpo_ray.policy import Policy
from dpo_ray.reference import Reference
from dpo_ray.registry import Canary
from dpo_ray.scoring import Collected, own_passes, precision, score
from dpo_ray.step_metrics import batch_metrics, mean_reward
from dpo_ray.types import Pair, TokenSequence


class TrainingError(ValueError):
    """Training cannot go on, and would fail again if it were repeated."""


class Learner:
    """Policy, optimizer and step count of one process; all processes hold the same, or their shards of it."""

    def __init__(self, folder: Path, reference: Path, config: TrainingConfig, peers: Peers) -> None:
        """A policy that goes on from `folder`, compared with the one of `reference`."""
        self.config = config
        self.peers = peers
        self.step = 0
        self.policy = Policy(folder, reference, config, peers)
        self.reference = Reference(self.policy, folder, reference, config, peers)
        self._parallel = parallel(self.policy.scorer, config, peers)
        self._optimizer = make_optimizer(self.policy.scorer.parameters(), config)
        self._rewards_seen = (0, 0.0)
        """How many rewards there were so far, and their mean (BCO's delta)."""

    @property
    def model(self) -> PreTrainedModel:
        return self.policy.scorer.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.policy.tokenizer

    def train_step(self, batch: Sequence[Pair], *, progress: float = 0.0) -> StepMetrics:
        """One optimizer step on a global batch, of which every process computes its share.

        `progress`, in [0, 1), places the step on the learning-rate schedule. TrainingError: a loss or a
        gradient is not finite; the weights are as they were.
        """
        table = PairBatch(batch, self.reference.logps(batch), self.peers.device)
        rewards_seen = self._rewards_seen_with(table)
        extras = self._extras(table, rewards_seen[1])
        collected = Collected(table.groups, self.peers)
        passes = own_passes(table.groups, self.config, self.peers)
        with self._reference_for_kl() as reference:
            slopes = self._slopes(table, extras)
            for number, indices in enumerate(passes, start=1):
                with exchange(self._parallel, wanted=number == len(passes)):
                    collected.add(indices, self._backward(table, indices, slopes, reference))
        logps = table.logps(range(len(batch)), collected.result(), **extras)
        losses = preference_loss(logps, self.config.loss)
        metrics = batch_metrics(losses, logps, self.config)
        rate = learning_rate(self.config, step=self.step + 1, progress=progress)
        norm = self._update(batch, losses, rate)
        self.step, self._rewards_seen = self.step + 1, rewards_seen
        self.reference.after_step(self.step)
        return {**metrics, "grad_norm": norm, "learning_rate": rate, "step": self.step}

    def evaluate(self, pairs: Sequence[Pair]) -> StepMetrics:
        """The metrics of held-out pairs; nothing is updated."""
        table = PairBatch(pairs, self.reference.logps(pairs), self.peers.device)
        with self._reference_for_kl() as reference:
            sums = self._score(table, reference)
        logps = table.logps(range(len(pairs)), sums, **self._extras(table, self._rewards_seen[1]))
        losses = preference_loss(logps, self.config.loss)
        metrics = batch_metrics(losses, logps, self.config)
        if self.config.early_stopping.max_kl is not None and any(pair.chosen_ids for pair in pairs):
            metrics["kl/reference"] = self._kl_to_reference(pairs)
        return metrics

    def logps(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """Summed completion log-probs under the policy. A collective."""
        groups = sequence_groups(sequences)
        return score(self.policy.scorer, groups, self.config, self.peers, wanted=Wanted()).logp.tolist()

    def start_logps(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """The same under the start, which leaves memory afterwards."""
        groups = sequence_groups(sequences)
        with self.policy.start() as scorer:
            return score(scorer, groups, self.config, self.peers, wanted=Wanted()).logp.tolist()

    def canaries(self, sequences: Sequence[Sequence[int]]) -> list[Canary]:
        """What the policy says of fixed sequences. A collective."""
        return make_canaries(self.policy.scorer, sequences)

    def state_dict(self) -> dict[str, Any]:
        """What goes on from here, beside the weights; whole on the first process. A collective."""
        return {
            "step": self.step,
            "optimizer": gathered(self._optimizer.state_dict(), keep=self.peers.rank == 0),
            "rewards_seen": self._rewards_seen,
            "reference": self.reference.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self._rewards_seen = tuple(state["rewards_seen"])
        self.reference.load_state_dict(state["reference"])
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        optimizer = state["optimizer"]
        moments = {
            index: {name: sharded_like(value, parameters[index]) for name, value in values.items()}
            for index, values in optimizer["state"].items()
        }
        self._optimizer.load_state_dict({**optimizer, "state": moments})

    def weights(self) -> list[Tensor]:
        """Copies of the trained weights, sharded as they are."""
        return [parameter.detach().clone() for parameter in self.policy.trained]

    def load_weights(self, weights: Sequence[Tensor]) -> None:
        """Trained weights, whole or sharded."""
        self.policy.is_start = False
        copy_into(self.policy.trained, weights)

    def _rewards_seen_with(self, table: PairBatch) -> tuple[int, float]:
        """The number and mean of rewards, those of this batch included, where the loss reads them."""
        if not any(term.type == "bco" for term in self.config.loss.terms):
            return self._rewards_seen
        logps = table.logps(range(len(table.pairs)), self._score(table, None))
        count, mean = self._rewards_seen
        new, new_mean = mean_reward(logps, self.config.loss)
        return count + new, mean + (new_mean - mean) * new / (count + new)

    def _extras(self, table: PairBatch, mean: float) -> dict[str, Tensor | None]:
        """What a loss takes beside log-probs."""
        running = torch.tensor(mean, device=self.peers.device)
        if not needs_mismatched(self.config.loss):
            return {"running_reward": running, "mismatched_ratio": None}
        groups, theirs = self.reference.mismatched(table.pairs)
        ours = score(self.policy.scorer, groups, self.config, self.peers, wanted=Wanted()).logp
        return {"running_reward": running, "mismatched_ratio": ours - theirs}

    def _slopes(self, table: PairBatch, extras: dict[str, Tensor | None]) -> Tensor | None:
        """[C] derivatives of the mean loss by log-probs, where a pair's loss depends on other pairs."""
        if not needs_whole_batch(self.config.loss):
            return None
        sums = self._score(table, None)
        logp = sums.logp.requires_grad_()
        logps = table.logps(range(len(table.pairs)), sums._replace(logp=logp), **extras)
        return torch.autograd.grad(preference_loss(logps, self.config.loss).mean(), logp)[0]

    def _backward(
        self,
        table: PairBatch,
        indices: Sequence[int],
        slopes: Tensor | None,
        reference: CompletionScorer | None,
    ) -> CompletionSums:
        """Add the gradient of these pairs; without any, take part in the exchange with a gradient of 0."""
        groups = [table.groups[index] for index in indices] or table.groups[:1]
        objective = self._objective(table, indices, slopes)
        with precision(self.config, self.peers):
            loss, sums = self._parallel(groups, objective, wanted=self._wanted, reference=reference)
        loss.backward()
        return sums

    def _objective(self, table: PairBatch, indices: Sequence[int], slopes: Tensor | None) -> Objective:
        # The exchange takes the mean over processes; the gradient wanted is that of the global mean.
        scale = self.peers.world_size / len(table.pairs)

        def loss(groups: range, sums: CompletionSums) -> Tensor:
            if not indices:
                return 0.0 * sums.logp.sum()
            some = [indices[group] for group in groups]
            if slopes is not None:
                return self.peers.world_size * (slopes[table.completions(some)] * sums.logp).sum()
            return scale * preference_loss(table.logps(some, sums), self.config.loss).sum()

        return loss

    def _update(self, batch: Sequence[Pair], losses: Tensor, rate: float) -> float:
        norm = self._clip(self.config.max_grad_norm)
        if not (math.isfinite(norm) and losses.isfinite().all()):
            self._optimizer.zero_grad()
            raise TrainingError(self._complaint(batch, losses, norm))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _clip(self, limit: float) -> float:
        """Scale the gradients down to a norm of `limit`; the norm that they had. A collective."""
        norm = torch.nn.utils.clip_grad_norm_(self.policy.trained, limit)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def _complaint(self, batch: Sequence[Pair], losses: Tensor, norm: float) -> str:
        bad = [pair.pair_id for pair in batch if not self._is_finite(pair)]
        return (
            f"loss {losses.mean().item()} and gradient norm {norm} at step {self.step + 1}, from the pairs "
            f"{', '.join(bad or [pair.pair_id for pair in batch])}: lower learning_rate, or leave them out; "
            "the last version and checkpoint are kept"
        )

    def _is_finite(self, pair: Pair) -> bool:
        """Whether loss and gradient of this pair alone are finite: some losses mix or sort the pairs.

        Every process computes the same pair, since they meet in each pass.
        """
        table = PairBatch([pair], self.reference.logps([pair]), self.peers.device)
        extras = self._extras(table, self._rewards_seen[1])
        with self._reference_for_kl() as reference:
            sums = self._backward(table, [0], self._slopes(table, extras), reference)
        loss = preference_loss(table.logps([0], sums, **extras), self.config.loss)
        norm = self._clip(math.inf)
        self._optimizer.zero_grad()
        return math.isfinite(loss.item()) and math.isfinite(norm)

    def _score(self, table: PairBatch, reference: CompletionScorer | None) -> CompletionSums:
        return score(
            self.policy.scorer,
            table.groups,
            self.config,
            self.peers,
            wanted=self._wanted,
            reference=reference,
        )

    def _kl_to_reference(self, pairs: Sequence[Pair]) -> float:
        """Nats of KL(policy || reference), exact at each token of the chosen completions, per completion."""
        groups = sequence_groups([TokenSequence(p.prompt_ids, p.chosen_ids) for p in pairs if p.chosen_ids])
        with self.reference.scorer() as reference:
            wanted = Wanted(kl="to_reference")
            sums = score(
                self.policy.scorer, groups, self.config, self.peers, wanted=wanted, reference=reference
            )
        assert sums.kl is not None
        return sums.kl.mean().item()

    @contextmanager
    def _reference_for_kl(self) -> Iterator[CompletionScorer | None]:
        if not needs_sequential_kl(self.config.loss):
            yield None
            return
        with self.reference.scorer() as scorer:
            yield scorer

    @property
    def _wanted(self) -> Wanted:
        loss = self.config.loss
        return Wanted(square=loss.weighting == "wpo", ld_alpha=loss.ld_alpha)
