"""The demonstration's tiny starting policy: made once by supervised fine-tuning, then cached."""

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
)

from dpo_ray.film_reviews import VOCABULARY, generate_review, generate_reviews
from dpo_ray.storage import cache_folder

OnProgress = Callable[[int, int, float], None]
"""Called after each step with the step from 1, the number of steps, and the loss in nats."""

HIDDEN_SIZE = 128
NUM_LAYERS = 4
MAX_REVIEW_TOKENS = 128

PLAIN_CHAT_TEMPLATE = (
    "{{ (messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list)[-1] }}"
)
"""The last user message, bare: the policy goes on with the review that the user began."""

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the starter is fine-tuned on generated reviews."""

    steps: int = 900
    batch_size: int = 32
    learning_rate: float = 4e-3
    """Peak of the cosine."""
    adam_beta2: float = 0.95
    """Below the usual 0.999: a run this short cannot wait for a memory of 1,000 steps."""
    warmup_steps: int = 50
    max_grad_norm: float = 1.0
    hidden_size: int = HIDDEN_SIZE
    num_layers: int = NUM_LAYERS


def make_starter(seed: int, on_progress: OnProgress, *, recipe: Recipe = Recipe()) -> Path:
    """Folder of the starter made by `recipe` and `seed`, trained now unless it is cached.

    The cache is $DPO_RAY_CACHE, or ~/.cache/dpo_ray. A folder appears there complete or not
    at all, so a killed call leaves nothing that a later one would take for a model.
    """
    cache = cache_folder()
    tokenizer = make_review_tokenizer()
    config = _starter_config(tokenizer, recipe)
    folder = cache / f"starter-{_fingerprint(config, seed, recipe)}"
    if folder.exists():
        return folder
    model = _random_model(config, seed)
    _fine_tune(model, tokenizer, seed, recipe, on_progress)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".starter-", dir=cache) as aside:
        made = Path(aside) / "model"
        _save(model, tokenizer, made)
        _rename_unless_there(made, folder)
    return folder


def _starter_config(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Qwen3Config:
    return tiny_config(
        tokenizer,
        max_tokens=MAX_REVIEW_TOKENS,
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
    )


def _fingerprint(config: Qwen3Config, seed: int, recipe: Recipe) -> str:
    """Hash of everything that decides the weights; sample reviews stand for the grammar."""
    grammar = [VOCABULARY, generate_reviews(32, seed=0)]
    identity = [config.to_dict(), seed, asdict(recipe), grammar]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _rename_unless_there(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        # Another process has just made the same model: theirs is as good as ours.
        if not folder.exists():
            raise


def _fine_tune(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    recipe: Recipe,
    on_progress: OnProgress,
) -> None:
    """Train `model` in place on reviews that it sees once each."""
    # Two threads on two busy cores wait for each other far longer than they compute.
    torch.set_num_threads(1)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, recipe.adam_beta2),
        weight_decay=0.0,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    model.train()
    for step in range(1, recipe.steps + 1):
        token_ids, labels = _make_batch(tokenizer, rng, recipe.batch_size)
        loss = model(input_ids=token_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_progress(step, recipe.steps, loss.item())
    model.eval()


def _make_batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, num_reviews: int
) -> tuple[Tensor, Tensor]:
    """[B, T] ids of fresh reviews, each closed by EOS and padded right, and their labels."""
    reviews = [f"{generate_review(rng)}{tokenizer.eos_token}" for _ in range(num_reviews)]
    token_ids = tokenizer(reviews, padding=True, return_tensors="pt")["input_ids"]
    # Attention is causal and padding comes last: no token that counts ever sees it.
    return token_ids, token_ids.masked_fill(token_ids == tokenizer.pad_token_id, -100)


def make_review_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the grammar; adds no special token by itself."""
    specials = ["<pad>", "<unk>", "<eos>"]
    vocabulary = {word: index for index, word in enumerate([*specials, *VOCABULARY])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=MAX_REVIEW_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=PLAIN_CHAT_TEMPLATE,
    )


def tiny_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_tokens: int,
    hidden_size: int = HIDDEN_SIZE,
    num_layers: int = NUM_LAYERS,
) -> Qwen3Config:
    """The starter's architecture for the vocabulary of `tokenizer`: Qwen3 with a tied head."""
    head_dim = 32  # The smallest that vLLM's attention takes on CPU.
    num_heads = hidden_size // head_dim
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=head_dim,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
        dtype="float32",
    )


def make_random_model(
    texts: Iterable[str],
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int = 1024,
    max_tokens: int = 2048,
) -> None:
    """Save a model of the starter's architecture, with random weights, that can read any text.

    Its tokenizer is a byte-level BPE trained on `texts`, with a ChatML chat template.
    """
    tokenizer = _train_bpe_tokenizer(texts, vocab_size, max_tokens)
    _save(_random_model(tiny_config(tokenizer, max_tokens=max_tokens), seed), tokenizer, folder)


def _train_bpe_tokenizer(texts: Iterable[str], vocab_size: int, max_tokens: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
        chat_template=CHATML_TEMPLATE,
    )


def _random_model(config: Qwen3Config, seed: int) -> Qwen3ForCausalLM:
    """The same weights for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def _save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights in safetensors, configuration, tokenizer and generation defaults."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
