"""Completions to flat rows without padding, the prompt of several completions held once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_ray.types import Pair, TokenSequence


class PromptGroup(NamedTuple):
    """A prompt and its completions, as token ids; none of them is empty."""

    prompt_ids: Sequence[int]
    completions: tuple[Sequence[int], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the flat row: the prompt once, and of each completion all but the last token."""
        return len(self.prompt_ids) + sum(len(ids) - 1 for ids in self.completions)


@dataclass(frozen=True)
class FlatRow:
    """Groups one after another in one row of T tokens: prompt, first completion, second completion, …

    The last token of a completion predicts nothing and is left out. N completion tokens are predicted,
    in the order of groups and completions.
    """

    input_ids: Tensor
    """[1, T] token ids."""
    position_ids: Tensor
    """[1, T] positions: each completion goes on from its prompt."""
    lengths: tuple[tuple[int, ...], ...]
    """Of each group, the tokens in the row of its prompt and of its completions."""
    sources: Tensor
    """[N] the place in the row that predicts each completion token."""
    targets: Tensor
    """[N] the completion tokens."""
    completion_of_token: Tensor
    """[N] which completion of the row each belongs to."""
    tokens_of_group: tuple[int, ...]
    """Completion tokens of each group; they sum to N."""
    completions_of_group: tuple[int, ...]

    @cached_property
    def segments(self) -> tuple[Tensor, Tensor]:
        """[T] group of each token, and [T] its part of the group: 0 the prompt, then the completions."""
        parts = [(g, part, n) for g, group in enumerate(self.lengths) for part, n in enumerate(group)]
        repeats = torch.tensor([n for _, _, n in parts])
        ids = torch.tensor([[g, part] for g, part, _ in parts]).repeat_interleave(repeats, dim=0)
        ids = ids.to(self.input_ids.device)
        return ids[:, 0], ids[:, 1]


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """One row per completion, padded on the right to one length T."""

    input_ids: Tensor
    """[R, T] token ids, 0 where padded."""
    attention_mask: Tensor
    """[R, T] 1 for real tokens."""
    completion_mask: Tensor
    """[R, T] True for completion tokens."""


def pair_groups(pairs: Sequence[Pair]) -> list[PromptGroup]:
    """One group per pair: the chosen, then the rejected completion; unpaired feedback has only one."""
    return [
        PromptGroup(pair.prompt_ids, tuple(ids for ids in (pair.chosen_ids, pair.rejected_ids) if ids))
        for pair in pairs
    ]


def sequence_groups(sequences: Sequence[TokenSequence]) -> list[PromptGroup]:
    """Neighbours with the same prompt share it."""
    groups: list[PromptGroup] = []
    for prompt_ids, completion_ids in sequences:
        if groups and tuple(groups[-1].prompt_ids) == tuple(prompt_ids):
            groups[-1] = PromptGroup(prompt_ids, (*groups[-1].completions, completion_ids))
        else:
            groups.append(PromptGroup(prompt_ids, (completion_ids,)))
    return groups


def flatten(groups: Sequence[PromptGroup], device: torch.device) -> FlatRow:
    """One row of all groups. ValueError: a prompt has no token to predict the first one from."""
    check_prompts(groups)
    input_ids: list[int] = []
    position_ids: list[int] = []
    sources: list[int] = []
    for prompt_ids, completions in groups:
        prompt_end = len(input_ids) + len(prompt_ids)
        input_ids += prompt_ids
        position_ids += range(len(prompt_ids))
        for ids in completions:
            # The prompt's last token predicts the first token of each of its completions.
            sources += [prompt_end - 1, *range(len(input_ids), len(input_ids) + len(ids) - 1)]
            input_ids += ids[:-1]
            position_ids += range(len(prompt_ids), len(prompt_ids) + len(ids) - 1)
    completions = [ids for group in groups for ids in group.completions]
    sizes = torch.tensor([len(ids) for ids in completions])
    return FlatRow(
        input_ids=torch.tensor([input_ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        lengths=tuple((len(g.prompt_ids), *(len(ids) - 1 for ids in g.completions)) for g in groups),
        sources=torch.tensor(sources, device=device),
        targets=torch.tensor(list(chain.from_iterable(completions)), device=device),
        completion_of_token=torch.arange(len(completions)).repeat_interleave(sizes).to(device),
        tokens_of_group=tuple(sum(map(len, group.completions)) for group in groups),
        completions_of_group=tuple(len(group.completions) for group in groups),
    )


def pad(groups: Sequence[PromptGroup], device: torch.device) -> PaddedRows:
    """One row per completion, in order. ValueError: a prompt has no token to predict the first one from."""
    check_prompts(groups)
    rows = [(group.prompt_ids, ids) for group in groups for ids in group.completions]
    shape = (len(rows), max(len(prompt) + len(completion) for prompt, completion in rows))
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    completion_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        attention_mask[row, :end] = 1
        completion_mask[row, start:end] = True
    return PaddedRows(input_ids.to(device), attention_mask.to(device), completion_mask.to(device))


def check_prompts(groups: Sequence[PromptGroup]) -> None:
    if not all(len(group.prompt_ids) for group in groups):
        raise ValueError("a completion without any prompt token has no log-prob: give the prompt a BOS token")


def split_by_tokens(groups: Sequence[PromptGroup], limit: int) -> list[range]:
    """Neighbouring groups whose tokens stay within `limit`; a longer group is alone."""
    passes: list[range] = []
    start, tokens = 0, 0
    for index, group in enumerate(groups):
        if index > start and tokens + group.num_tokens > limit:
            passes.append(range(start, index))
            start, tokens = index, 0
        tokens += group.num_tokens
    return [*passes, range(start, len(groups))] if groups else []


def split_evenly(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Indices of items for each share, so that the shares cost about the same; each index once.

    Dearest first, back and forth over the shares: 0 1 2 2 1 0 0 1 2 …
    """
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for place, index in enumerate(order):
        lap, position = divmod(place, num_shares)
        shares[position if lap % 2 == 0 else num_shares - 1 - position].append(index)
    return shares


def offsets(sizes: Sequence[int]) -> list[int]:
    """Where each of consecutive pieces starts, and where the last ends."""
    return [0, *accumulate(sizes)]
