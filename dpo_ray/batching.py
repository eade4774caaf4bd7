"""Token sequences to padded rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_ray.types import Pair, TokenSequence


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences padded on the right to one length T."""

    input_ids: Tensor
    """[R, T] token ids, 0 where padded."""
    attention_mask: Tensor
    """[R, T] 1 for real tokens."""
    completion_mask: Tensor
    """[R, T] True for completion tokens."""

    def to(self, device: torch.device) -> "Rows":
        return Rows(
            *(getattr(self, name).to(device) for name in ("input_ids", "attention_mask", "completion_mask"))
        )


def pad_rows(sequences: Sequence[TokenSequence]) -> Rows:
    """One row per sequence, in order. ValueError: a prompt has no token to predict the first one from."""
    if not all(len(sequence.prompt_ids) for sequence in sequences):
        raise ValueError("a completion without any prompt token has no log-prob: give the prompt a BOS token")
    longest = max(len(s.prompt_ids) + len(s.completion_ids) for s in sequences)
    shape = (len(sequences), longest)
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    completion_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        attention_mask[row, :end] = 1
        completion_mask[row, start:end] = True
    return Rows(input_ids, attention_mask, completion_mask)


def pair_sequences(pairs: Sequence[Pair]) -> list[TokenSequence]:
    """All chosen sequences, then all rejected ones."""
    chosen = [TokenSequence(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    return chosen + [TokenSequence(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
