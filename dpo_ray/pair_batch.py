"""A batch of pairs, from the log-probs of its completions to what a loss takes."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from dpo_ray.batching import PromptGroup, pair_groups
from dpo_ray.lm_head import CompletionSums
from dpo_ray.losses import PairLogps
from dpo_ray.types import Pair


class PairBatch:
    """What is known of a batch before the policy scores it. Its C completions are numbered pair by pair."""

    def __init__(
        self, pairs: Sequence[Pair], references: Sequence[tuple[float, float]], device: torch.device
    ) -> None:
        self.pairs = pairs
        self.groups: list[PromptGroup] = pair_groups(pairs)
        self._references = torch.tensor(references, dtype=torch.float64, device=device)
        self._lengths = torch.tensor(
            [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs], device=device
        )
        self._weight = torch.tensor([pair.weight for pair in pairs], dtype=torch.float64, device=device)

    @cached_property
    def _sampled(self) -> Tensor:
        """[B, 2] log-probs that the sampler recorded, NaN where it did not."""
        nan = float("nan")
        recorded = [(pair.chosen_logp, pair.rejected_logp) for pair in self.pairs]
        values = [tuple(nan if logp is None else logp for logp in both) for both in recorded]
        return torch.tensor(values, dtype=torch.float64, device=self._weight.device)

    def logps(
        self,
        indices: Sequence[int],
        sums: CompletionSums,
        *,
        mismatched_ratio: Tensor | None = None,
        running_reward: Tensor | None = None,
    ) -> PairLogps:
        """Of the pairs at `indices`, from the sums of just their completions, in that order."""
        rows = torch.tensor(indices, device=self._weight.device)
        chosen, rejected = self._columns(rows, sums.logp)
        squares = (None, None) if sums.square is None else self._columns(rows, sums.square)
        kls = (None, None) if sums.kl is None else self._columns(rows, sums.kl)
        reference, length = self._references[rows], self._lengths[rows]
        return PairLogps(
            chosen=chosen,
            rejected=rejected,
            ref_chosen=reference[:, 0],
            ref_rejected=reference[:, 1],
            chosen_length=length[:, 0],
            rejected_length=length[:, 1],
            weight=self._weight[rows],
            mean_chosen_length=self._lengths[:, 0].double().mean(),
            chosen_kl=kls[0],
            rejected_kl=kls[1],
            chosen_square=squares[0],
            rejected_square=squares[1],
            chosen_sampled=self._sampled[rows, 0],
            rejected_sampled=self._sampled[rows, 1],
            mismatched_ratio=mismatched_ratio,
            running_reward=running_reward,
        )

    def completions(self, indices: Sequence[int]) -> list[int]:
        """The numbers of the completions of some pairs, in their order."""
        starts = self._starts
        return [number for index in indices for number in range(starts[index], starts[index + 1])]

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for group in self.groups:
            starts.append(starts[-1] + len(group.completions))
        return starts

    def _columns(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[b] of the chosen and [b] of the rejected completions, 0 where a pair lacks one."""
        present = self._lengths[rows].flatten() > 0
        place = torch.arange(len(present), device=present.device)[present]
        both = torch.zeros(len(present), device=values.device, dtype=values.dtype)
        return both.index_put((place,), values).view(-1, 2).unbind(1)  # type: ignore[return-value]
