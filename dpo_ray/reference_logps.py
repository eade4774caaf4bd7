"""Reference log-probs of pairs: computed once per pair and reference, and kept."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dpo_ray.batching import PromptGroup, offsets, pair_groups
from dpo_ray.config import TrainingConfig
from dpo_ray.logprobs import CompletionScorer, Wanted
from dpo_ray.losses import needs_mismatched
from dpo_ray.parallel import Peers
from dpo_ray.reference_cache import Logps, ReferenceCache
from dpo_ray.scoring import score
from dpo_ray.types import Pair


class ReferenceLogps:
    """By pair id, on every process; the first process reads and writes what other runs left."""

    def __init__(self, config: TrainingConfig, peers: Peers, reference: str | None) -> None:
        """`reference`: what decides the log-probs, where other runs may know them; "" but on the first."""
        self._config = config
        self._peers = peers
        self._caches = reference is not None
        self._cache = ReferenceCache(reference) if reference is not None and peers.rank == 0 else None
        self._known: Logps = {}
        self._mismatched: dict[str, tuple[tuple[int, ...], float]] = {}

    def of(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Log-probs of the chosen and the rejected completions; 0 for one that a pair lacks."""
        return [self._known[pair.pair_id] for pair in pairs]

    def covers(self, pairs: Sequence[Pair]) -> bool:
        """Whether all is known of these pairs. A collective where a cache is used."""
        if self._caches and (unknown := self._unknown(pairs)):
            self._read_cache(unknown)
        return not self._unknown(pairs) and not self._lacks_mismatched(pairs)

    def compute(self, scorer: CompletionScorer, batch: Sequence[Pair]) -> None:
        """Score with the reference what is not known of a batch. A collective."""
        if pairs := self._unknown(batch):
            self._compute_logps(scorer, pairs)
        if self._lacks_mismatched(batch):
            self._compute_mismatched(scorer, batch)

    def _compute_logps(self, scorer: CompletionScorer, pairs: Sequence[Pair]) -> None:
        wanted = Wanted(ld_alpha=self._config.loss.ld_alpha)
        groups = pair_groups(pairs)
        sums = score(scorer, groups, self._config, self._peers, wanted=wanted).logp.tolist()
        new = {
            pair.pair_id: _both(pair, iter(sums[start:]))
            for pair, start in zip(pairs, offsets([len(group.completions) for group in groups]), strict=False)
        }
        self._known |= new
        if self._cache is not None:
            self._cache.write(new)

    def forget(self) -> None:
        """The reference is another one from now on."""
        self._known.clear()
        self.forget_mismatched()

    def forget_mismatched(self) -> None:
        """Each prompt gets another completion."""
        self._mismatched.clear()

    def mismatched_groups(self, pairs: Sequence[Pair]) -> list[PromptGroup]:
        """Each pair's prompt with the completion of another pair (KTO's estimate of the KL)."""
        return [PromptGroup(pair.prompt_ids, (self._mismatched[pair.pair_id][0],)) for pair in pairs]

    def mismatched_logps(self, pairs: Sequence[Pair]) -> Tensor:
        """[B] their log-probs under the reference."""
        return torch.tensor(
            [self._mismatched[pair.pair_id][1] for pair in pairs],
            dtype=torch.float64,
            device=self._peers.device,
        )

    def state_dict(self) -> Logps:
        return dict(self._known)

    def load_state_dict(self, state: Logps) -> None:
        self._known = dict(state)

    def _unknown(self, pairs: Sequence[Pair]) -> list[Pair]:
        return [pair for pair in pairs if pair.pair_id not in self._known]

    def _lacks_mismatched(self, pairs: Sequence[Pair]) -> bool:
        wanted = needs_mismatched(self._config.loss)
        return wanted and any(pair.pair_id not in self._mismatched for pair in pairs)

    def _read_cache(self, pairs: Sequence[Pair]) -> None:
        """What the first process knows from other runs, on all processes."""
        values = torch.zeros(len(pairs), 3, dtype=torch.float64, device=self._peers.device)
        if self._cache is not None:
            found = self._cache.read([pair.pair_id for pair in pairs])
            rows = [
                (1.0, *found[pair.pair_id]) if pair.pair_id in found else (0.0, 0.0, 0.0) for pair in pairs
            ]
            values += torch.tensor(rows, dtype=torch.float64, device=self._peers.device)
        for pair, (known, chosen, rejected) in zip(pairs, self._peers.sum(values).tolist(), strict=True):
            if known:
                self._known[pair.pair_id] = (chosen, rejected)

    def _compute_mismatched(self, scorer: CompletionScorer, pairs: Sequence[Pair]) -> None:
        """Each prompt gets the next pair's completion, the last the first's."""
        others = [pair.chosen_ids or pair.rejected_ids for pair in [*pairs[1:], *pairs[:1]]]
        groups = [PromptGroup(pair.prompt_ids, (ids,)) for pair, ids in zip(pairs, others, strict=True)]
        logps = score(scorer, groups, self._config, self._peers, wanted=Wanted()).logp.tolist()
        for pair, ids, logp in zip(pairs, others, logps, strict=True):
            self._mismatched[pair.pair_id] = (ids, logp)


def _both(pair: Pair, values: Iterator[float]) -> tuple[float, float]:
    chosen = next(values) if pair.chosen_ids else 0.0
    return chosen, next(values) if pair.rejected_ids else 0.0
