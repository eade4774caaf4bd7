"""Completions of a few prompts without a serving engine, where starting one would take longer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo_ray.models import load_model, load_tokenizer

_SEQUENCES_PER_PASS = 64


@dataclass(frozen=True, slots=True)
class Drawing:
    """How completions are drawn: the same prompts and seed give the same ones."""

    n: int
    """Completions of each prompt."""
    max_new_tokens: int
    seed: int
    temperature: float = 1.0
    """0 is greedy."""


def generate(
    folder: Path | str,
    prompts: Sequence[Sequence[int]],
    drawing: Drawing,
    *,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """`drawing.n` completions in a row of each prompt, through the end-of-sequence token."""
    model, tokenizer = load_model(folder, device=device), load_tokenizer(folder)
    config = _generation_config(model, tokenizer, drawing)
    repeated = [list(prompt) for prompt in prompts for _ in range(drawing.n)]
    completions: list[list[int]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(drawing.seed)
        for start in range(0, len(repeated), _SEQUENCES_PER_PASS):
            ids, mask = _pad_left(repeated[start : start + _SEQUENCES_PER_PASS], device)
            whole: Any = model.generate(ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
            ends: Any = config.eos_token_id
            completions += [_until(ends, new) for new in whole[:, ids.shape[1] :].tolist()]
            on_progress(len(completions), len(repeated))
    return completions


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drawing: Drawing
) -> GenerationConfig:
    ends: Any = model.generation_config.eos_token_id if model.generation_config else None
    drawn = {"temperature": drawing.temperature, "top_k": 0, "top_p": 1.0} if drawing.temperature else {}
    return GenerationConfig(
        do_sample=drawing.temperature > 0,
        max_new_tokens=drawing.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=0,
        use_cache=True,
        **drawn,
    )


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
