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
from dpo_ray.parallel import Peers, compute_dtype, copy_into, gathered
from dpo_ray.policy import Policy
from dpo_ray.reference_cache import ReferenceCache, fingerprint
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
        self._logps = ReferenceLogps(config, peers, self._cache())
        # A KL needs the reference's whole distributions, a moving average its weights.
        resident = needs_sequential_kl(config.loss) or config.early_stopping.max_kl is not None
        self._frozen: CompletionScorer | None = None
        if config.lora.rank and config.reference.kind == "start":
            self._frozen = AdapterOff(policy.scorer)
        elif resident or config.reference.kind == "ema":
            self._frozen = policy.load_frozen(self._folder)

    def begin_round(self, batches: Sequence[Sequence[Pair]]) -> None:
        """Compute what is missing for these batches, each in the forward passes of its training step."""
        if self._config.reference.kind == "round_start":
            self._logps.forget()
            if self._frozen is not None:
                copy_into(list(self._frozen.parameters()), list(self._policy.scorer.parameters()))
        if self._config.reference.kind != "ema":
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
        for ours, theirs in zip(self._frozen.parameters(), self._policy.scorer.parameters(), strict=True):
            ours.lerp_(theirs, settings.ema_alpha)

    def state_dict(self) -> dict[str, Any]:
        """A collective."""
        if self._config.reference.kind != "ema":
            return {"logps": self._logps.state_dict()}
        assert self._frozen is not None
        return {"weights": gathered(list(self._frozen.parameters()), keep=self._peers.rank == 0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._logps.load_state_dict(state.get("logps", {}))
        if "weights" in state and self._config.reference.kind == "ema":
            assert self._frozen is not None
            copy_into(list(self._frozen.parameters()), state["weights"])

    def _compute(self, batches: Sequence[Sequence[Pair]]) -> None:
        if not self.is_needed:
            return
        missing = [some for batch in batches if (some := self._logps.missing(batch))]
        if missing:
            with self.scorer() as scorer:
                for pairs in missing:
                    self._logps.compute(scorer, pairs)

    def _cache(self) -> ReferenceCache | None:
        """Of the start alone: the other references are different in every run."""
        settings, config = self._config.reference, self._config
        if settings.kind != "start" or not settings.keep_logps:
            return None
        decides = (compute_dtype(config, self._peers.device), config.packing, config.loss.ld_alpha)
        return ReferenceCache(f"{fingerprint(self._folder)} {decides}" if self._peers.rank == 0 else "")
