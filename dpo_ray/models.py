"""Hugging Face language models: loaded with a clear error, saved with their tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from dpo_ray.batching import pad_rows
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.registry import Canary
from dpo_ray.types import TokenSequence

disable_progress_bar()  # Jobs show their own progress.


def load_model(name: str | Path, *, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The causal language model of a folder or hub name, in fp32, in evaluation mode.

    Evaluation mode is for training too: dropout would make policy and reference differ at step 0.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {name}: no causal language model can be loaded from there: {error}"
        ) from error
    model.config.use_cache = False
    return model.to(torch.device(device)).eval()  # type: ignore[arg-type]


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--model {name} has no tokenizer that can be loaded: save one there with save_pretrained. "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where none is.
        raise ValueError(f"--model {name} has no tokenizer: save one there with save_pretrained")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--model {name}: its tokenizer has no end-of-sequence token: set tokenizer.eos_token"
        )
    return tokenizer


def load_context_length(name: str | Path) -> int:
    """Longest sequence that the model of a folder or hub name takes, in tokens."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: no model can be loaded from there: {error}") from error
    for attribute in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(length := getattr(config, attribute, None), int):
            return length
    raise ValueError(f"--model {name}: its config names no context length (max_position_embeddings)")


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A Hugging Face folder that transformers and vLLM load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def make_canaries(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Canary]:
    """What the model says of fixed sequences of at least 2 tokens."""
    device = next(model.parameters()).device
    rows = pad_rows([TokenSequence(ids[:1], ids[1:]) for ids in sequences]).to(device)
    row_of_token, logps = CompletionScorer(model).token_logps(rows)
    return [
        Canary(token_ids=list(ids), logprobs=logps[row_of_token == row].tolist())
        for row, ids in enumerate(sequences)
    ]
