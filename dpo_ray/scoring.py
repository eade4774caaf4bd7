"""Log-probs of many completions, each computed by one of the data-parallel processes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dpo_ray.batching import PromptGroup, offsets, split_by_tokens, split_evenly
from dpo_ray.config import TrainingConfig
from dpo_ray.lm_head import CompletionSums
from dpo_ray.logprobs import CompletionScorer, Wanted
from dpo_ray.parallel import Peers, compute_dtype

TOKENS_PER_PASS = {"cpu": 1024, "cuda": 8192}
"""By device, where it is not set: more make a GPU faster, and on a CPU only take memory."""


def own_passes(groups: Sequence[PromptGroup], config: TrainingConfig, peers: Peers) -> list[list[int]]:
    """Indices of the groups of each of this process's forward passes.

    All processes have the same number of passes, since they meet in each; one that has run out of groups
    gets an empty pass.
    """
    shares = split_evenly([group.num_tokens for group in groups], peers.world_size)
    limit = config.tokens_per_pass or TOKENS_PER_PASS[peers.device.type]
    passes = [_passes(groups, share, limit) for share in shares]
    own = passes[peers.rank]
    return own + [[]] * (max(map(len, passes)) - len(own))


def _passes(groups: Sequence[PromptGroup], share: Sequence[int], limit: int) -> list[list[int]]:
    parts = split_by_tokens([groups[index] for index in share], limit)
    return [[share[place] for place in part] for part in parts]


def precision(config: TrainingConfig, peers: Peers) -> AbstractContextManager[Any]:
    """Autocast, where the computation is in another format than the weights and FSDP does not see to it."""
    dtype = compute_dtype(config, peers.device)
    if dtype == torch.float32 or config.parallelism == "fsdp":
        return nullcontext()
    return torch.autocast(peers.device.type, dtype=dtype)


class Collected:
    """[C] sums of all completions of all processes, filled pass by pass."""

    def __init__(self, groups: Sequence[PromptGroup], peers: Peers) -> None:
        self._peers = peers
        self._starts = offsets([len(group.completions) for group in groups])
        self._values: dict[str, Tensor] = {}

    def add(self, indices: Sequence[int], sums: CompletionSums) -> None:
        """The sums of the groups at `indices`, in their order."""
        numbers = [n for i in indices for n in range(self._starts[i], self._starts[i + 1])]
        for name, values in sums._asdict().items():
            if values is not None:
                where = torch.tensor(numbers, dtype=torch.long, device=values.device)
                self._of(name, values)[where] = values.detach()[: len(numbers)].double()

    def result(self) -> CompletionSums:
        """What every process has after all passes. A collective."""
        return CompletionSums(**{name: self._peers.sum(values) for name, values in self._values.items()})

    def _of(self, name: str, like: Tensor) -> Tensor:
        if name not in self._values:
            self._values[name] = torch.zeros(self._starts[-1], dtype=torch.float64, device=like.device)
        return self._values[name]


@torch.no_grad()
def score(
    scorer: CompletionScorer,
    groups: Sequence[PromptGroup],
    config: TrainingConfig,
    peers: Peers,
    *,
    wanted: Wanted,
    reference: CompletionScorer | None = None,
) -> CompletionSums:
    """[C] sums of all completions, groups in order, on every process. A collective."""
    collected = Collected(groups, peers)
    for indices in own_passes(groups, config, peers):
        with precision(config, peers):
            some = [groups[index] for index in indices] or groups[:1]
            collected.add(indices, scorer(some, wanted=wanted, reference=reference)[1])
    return collected.result()
