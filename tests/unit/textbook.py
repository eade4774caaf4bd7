"""What the training core is held against: padded rows, the model's own logits, formulas written out."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_ray.batching import PromptGroup
from dpo_ray.types import Pair

Weights = dict[str, Tensor]

NUM_TOKENS = 80
"""Token ids from 3 to here are words of the tiny model."""


def make_pairs(num: int, *, seed: int = 0, longest: int = 9, **fields: Any) -> list[Pair]:
    """Random pairs of 1 to `longest` tokens in prompt, chosen and rejected."""
    rng = random.Random(seed)
    rows = [[_some_ids(rng, longest) for _ in range(3)] for _ in range(num)]
    return [
        Pair("p", "a", "b", prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, **fields)
        for prompt, chosen, rejected in rows
    ]


def make_groups(num: int, *, seed: int = 0, longest: int = 9, num_tokens: int = 60) -> list[PromptGroup]:
    """Random prompts with 1 to 3 random completions."""
    rng = random.Random(seed)
    return [
        PromptGroup(
            _some_ids(rng, longest, num_tokens),
            tuple(_some_ids(rng, longest, num_tokens) for _ in range(rng.randint(1, 3))),
        )
        for _ in range(num)
    ]


def _some_ids(rng: random.Random, longest: int, num_tokens: int = NUM_TOKENS) -> tuple[int, ...]:
    return tuple(rng.randrange(3, num_tokens) for _ in range(rng.randint(1, longest)))


def load_plain(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, without any of our code."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def log_probs(model: PreTrainedModel, groups: Sequence[PromptGroup]) -> list[Tensor]:
    """[n, V] of each completion, at the places that predict its n tokens, from rows padded on the right."""
    rows = [[*group.prompt_ids, *ids] for group in groups for ids in group.completions]
    starts = [len(group.prompt_ids) for group in groups for _ in group.completions]
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float()
    return [
        logits[row, start - 1 : len(ids) - 1].log_softmax(-1)
        for row, (start, ids) in enumerate(zip(starts, rows, strict=True))
    ]


def token_logps(model: PreTrainedModel, groups: Sequence[PromptGroup]) -> list[Tensor]:
    """[n] of each completion, in float64."""
    completions = [ids for group in groups for ids in group.completions]
    return [
        values[torch.arange(len(ids)), torch.tensor(ids)].double()
        for values, ids in zip(log_probs(model, groups), completions, strict=True)
    ]


def logps(model: PreTrainedModel, groups: Sequence[PromptGroup]) -> Tensor:
    """[C] summed log-probs of all completions."""
    return torch.stack([values.sum() for values in token_logps(model, groups)])


def pair_logps(model: PreTrainedModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """[B] of the chosen, [B] of the rejected completions."""
    groups = [PromptGroup(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs]
    values = logps(model, groups).view(-1, 2)
    return values[:, 0], values[:, 1]


def dpo_losses(
    policy: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[Pair], *, beta: float
) -> Tensor:
    """[B] losses. Eq. 7 of arXiv:2305.18290."""
    chosen, rejected = pair_logps(policy, pairs)
    with torch.no_grad():
        ref_chosen, ref_rejected = pair_logps(reference, pairs)
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def gradient(model: torch.nn.Module) -> Tensor:
    """All gradients of a model, one after another."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same_gradient(ours: Tensor, theirs: Tensor, *, tolerance: float = 1e-5) -> None:
    """`tolerance`: of the length of the difference, relative to the gradient's own."""
    assert theirs.norm() > 0
    assert (ours - theirs).norm() < tolerance * theirs.norm()
