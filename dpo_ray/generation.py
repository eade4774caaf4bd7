"""Completions of a few prompts without a serving engine, where starting one would take longer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from dpo_ray.models import load_model, load_tokenizer

_SEQUENCES_PER_PASS = 64


def generate(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    device: torch.device,
) -> list[list[int]]:
    """`n` completions in a row of each prompt at temperature 1, through the end-of-sequence token."""
    model, tokenizer = load_model(folder, device=device), load_tokenizer(folder)
    ends: Any = model.generation_config.eos_token_id if model.generation_config else None
    ends = tokenizer.eos_token_id if ends is None else ends
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=0,
    )
    repeated = [list(prompt) for prompt in prompts for _ in range(n)]
    completions: list[list[int]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(repeated), _SEQUENCES_PER_PASS):
            ids, mask = _pad_left(repeated[start : start + _SEQUENCES_PER_PASS], device)
            whole: Any = model.generate(  # type: ignore[operator]
                ids, attention_mask=mask, generation_config=config, use_cache=True
            )
            completions += [_until(ends, new) for new in whole[:, ids.shape[1] :].tolist()]
    return completions


def _pad_left(prompts: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _until(ends: int | list[int], token_ids: list[int]) -> list[int]:
    """Through the first of the end tokens."""
    stops = {ends} if isinstance(ends, int) else set(ends)
    for place, token in enumerate(token_ids):
        if token in stops:
            return token_ids[: place + 1]
    return token_ids
