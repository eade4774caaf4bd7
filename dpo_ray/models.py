"""Hugging Face language models: loaded with a clear error, adapted, saved with their tokenizer."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from dpo_ray.batching import PromptGroup
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.registry import Canary

_log = logging.getLogger(__name__)
_PROBE = [PromptGroup((1, 2, 3), ((4, 5, 6, 7), (8, 9))), PromptGroup((3, 1), ((2,), (5, 1, 2)))]
"""Two prompts with two completions each: all that can go wrong in a flat row goes wrong here."""

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
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # The default one leaves the cap out.
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


def make_scorer(
    name: str | Path, *, device: torch.device | str = "cpu", flat: bool = True
) -> CompletionScorer:
    """The model of a folder or hub name, on flat rows where it can; else a message says why not."""
    model = load_model(name, device=device)
    if flat and (reason := flat_rows_refused(model)):
        _log.warning("%s is trained on padded rows: %s", name, reason)
        flat = False
    return CompletionScorer(model, flat=flat)


@torch.no_grad()
def flat_rows_refused(model: PreTrainedModel) -> str | None:
    """Why flat rows do not give the log-probs of padded ones; None where they do."""
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} brings its own attention"
    own = model.config._attn_implementation or "eager"
    refused = _compare(model)
    if refused is not None:
        model.set_attn_implementation(own)
    return refused


def _compare(model: PreTrainedModel) -> str | None:
    padded = CompletionScorer(model, flat=False)(_PROBE)[1].logp
    try:
        flat = CompletionScorer(model, flat=True)(_PROBE)[1].logp
    except Exception as error:  # Whatever a model's own code makes of arguments that it does not know.
        return f"{type(model).__name__} cannot run on flat rows ({type(error).__name__}: {error})"
    if not torch.allclose(flat, padded, atol=5e-4, rtol=1e-5):
        return (
            f"{type(model).__name__} gives other log-probs on flat rows ({flat.tolist()}, {padded.tolist()})"
        )
    return None


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Each layer keeps its input only, and runs again in the backward pass."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """A Hugging Face folder that transformers and vLLM load; `state`: the weights, where not the model's."""
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def make_canaries(scorer: CompletionScorer, sequences: Sequence[Sequence[int]]) -> list[Canary]:
    """What the model says of fixed sequences of at least 2 tokens."""
    return [
        Canary(token_ids=list(ids), logprobs=scorer.token_logps(PromptGroup(ids[:1], (ids[1:],))).tolist())
        for ids in sequences
    ]
