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

    def __init__(self, config: TrainingConfig, peers: Peers, cache: ReferenceCache | None) -> None:
        self._config = config
        self._peers = peers
        self._cache = cache if peers.rank == 0 else None
        self._caches = cache is not None
        self._known: Logps = {}
        self._mismatched: dict[str, tuple[tuple[int, ...], float]] = {}

    def of(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Log-probs of the chosen and the rejected completions; 0 for one that a pair lacks."""
        return [self._known[pair.pair_id] for pair in pairs]

    def missing(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Those of which log-probs are not known. A collective where a cache is used."""
        unknown = [pair for pair in pairs if not self._knows(pair)]
        if unknown and self._caches:
            self._read_cache(unknown)
        return [pair for pair in unknown if not self._knows(pair)]

    def compute(self, scorer: CompletionScorer, pairs: Sequence[Pair]) -> None:
        """Score pairs with the reference. A collective."""
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
        if needs_mismatched(self._config.loss):
            self._compute_mismatched(scorer, pairs)

    def forget(self) -> None:
        """The reference is another one from now on."""
        self._known.clear()
        self._mismatched.clear()

    def mismatched_groups(self, pairs: Sequence[Pair]) -> list[PromptGroup]:
        """Each pair's prompt with the completion of another pair (KTO's estimate of the KL)."""
        return [PromptGroup(pair.prompt_ids, (self._mismatched[pair.pair_id][0],)) for pair in pairs]

    def mismatched_logps(self, pairs: Sequence[Pair]) -> Tensor:
        """[B] their log-probs under the reference."""
        return torch.tensor([self._mismatched[pair.pair_id][1] for pair in pairs], device=self._peers.device)

    def state_dict(self) -> Logps:
        return dict(self._known)

    def load_state_dict(self, state: Logps) -> None:
        self._known = dict(state)

    def _knows(self, pair: Pair) -> bool:
        mismatched = needs_mismatched(self._config.loss)
        return pair.pair_id in self._known and (not mismatched or pair.pair_id in self._mismatched)

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
