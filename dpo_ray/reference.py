"""The reference: what the policy is compared with, in memory only as long as it is needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_ray.batching import PromptGroup
from dpo_ray.config import TrainingConfig
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.lora import AdapterOff
from dpo_ray.losses import needs_reference, needs_sequential_kl
from dpo_ray.parallel import Peers, compute_dtype, copy_into, gathered, weights_of
from dpo_ray.policy import Policy
from dpo_ray.reference_cache import fingerprint
from dpo_ray.reference_logps import ReferenceLogps
from dpo_ray.types import Pair


class Reference:
    """The start, what a round began with, or a moving average; mostly known by its log-probs alone."""

    def __init__(
        self, policy: Policy, folder: Path, start: Path, config: TrainingConfig, peers: Peers
    ) -> None:
        self._policy = policy
        self._folder = folder if config.reference.kind == "round_start" else start
        self._config = config
        self._peers = peers
        self._logps = ReferenceLogps(config, peers, self._name())
        # A KL needs the reference's whole distributions, a moving average its weights.
        resident = needs_sequential_kl(config.loss) or config.early_stopping.max_kl is not None
        self._frozen: CompletionScorer | None = None
        if config.lora.rank and config.reference.kind == "start":
            self._frozen = AdapterOff(policy.scorer)
        elif resident or config.reference.kind == "ema":
            self._frozen = policy.load_frozen(self._folder)

    def begin_round(self, batches: Sequence[Sequence[Pair]]) -> None:
        """Compute what is missing for these batches, each in the forward passes of its training step."""
        # Whether this process has seen a round before or took over now, it mismatches the same completions.
        self._logps.forget_mismatched()
        if self._config.reference.kind == "round_start":
            self._logps.forget()
            if self._frozen is not None:
                ours = self._policy.plain_weights()
                names = [name for name, _ in self._frozen.model.named_parameters()]
                copy_into(weights_of(self._frozen), [ours[name] for name in names])
        if self._config.reference.kind == "ema" or not self.is_needed:
            return
        if self._policy.is_start and batches:
            # The very first step proves that policy and reference see the same tokens: never from a cache.
            with self.scorer() as scorer:
                self._logps.compute(scorer, batches[0])
        self._compute(batches)

    def logps(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Of the chosen and rejected completions, summed, in nats; zeros for a loss without reference."""
        if not self.is_needed:
            return [(0.0, 0.0)] * len(pairs)
        if self._config.reference.kind == "ema":
            self._logps.forget()
        self._compute([pairs])
        return self._logps.of(pairs)

    def mismatched(self, pairs: Sequence[Pair]) -> tuple[list[PromptGroup], Tensor]:
        """Each prompt with another pair's completion, and [B] their log-probs."""
        return self._logps.mismatched_groups(pairs), self._logps.mismatched_logps(pairs)

    @property
    def is_needed(self) -> bool:
        bounded = self._config.early_stopping.max_chosen_drop is not None
        return needs_reference(self._config.loss) or bounded

    @contextmanager
    def scorer(self) -> Iterator[CompletionScorer]:
        """The reference's weights, for as long as the context is open."""
        if self._frozen is not None:
            yield self._frozen
        elif self._config.reference.kind == "round_start":
            yield self._policy.scorer  # Called only before the round's first step.
        else:
            with self._policy.start() as start:
                yield start

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """reference = alpha * policy + (1 - alpha) * reference, now and then (arXiv:2404.09656)."""
        self._policy.is_start = False
        settings = self._config.reference
        if settings.kind != "ema" or step % settings.ema_every_steps:
            return
        assert self._frozen is not None
        for ours, theirs in zip(weights_of(self._frozen), weights_of(self._policy.scorer), strict=True):
            ours.lerp_(theirs, settings.ema_alpha)

    def state_dict(self) -> dict[str, Any]:
        """A collective."""
        if self._config.reference.kind != "ema":
            return {"logps": self._logps.state_dict()}
        assert self._frozen is not None
        return {"weights": gathered(weights_of(self._frozen), keep=self._peers.rank == 0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._logps.load_state_dict(state.get("logps", {}))
        if "weights" in state and self._config.reference.kind == "ema":
            assert self._frozen is not None
            copy_into(weights_of(self._frozen), state["weights"])

    def _compute(self, batches: Sequence[Sequence[Pair]]) -> None:
        if not self.is_needed:
            return
        unfinished = [batch for batch in batches if not self._logps.covers(batch)]
        if unfinished:
            with self.scorer() as scorer:
                for batch in unfinished:
                    self._logps.compute(scorer, batch)

    def _name(self) -> str | None:
        """Of the start alone: the other references are different in every run."""
        settings, config = self._config.reference, self._config
        if settings.kind != "start" or not settings.keep_logps:
            return None
        dtype = compute_dtype(config, self._peers.device)
        decides = (dtype, config.parallelism, config.packing, config.loss.ld_alpha)
        return f"{fingerprint(self._folder)} {decides}" if self._peers.rank == 0 else ""
