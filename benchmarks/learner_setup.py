"""What both sides train: a random Qwen3, pairs as long as real ones, and the least work that they need."""

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dpo_ray.models import save_policy
from dpo_ray.types import Pair

MAX_TOKENS = 1024
_EOS = 1
_FIRST_WORD = 3
_WORD_PIECE = re.compile(r"\w{1,6}|[^\w\s]")
_ANSWER = "\n\nAssistant:"


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of a model; the share of its LM head in the work is that of a Qwen3 of one or two billion."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


SIZES = {
    "tiny": Size(vocab=512, hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate=128),
    "5M": Size(vocab=4096, hidden=256, layers=5, heads=4, kv_heads=2, head_dim=64, intermediate=768),
    "16M": Size(vocab=8192, hidden=384, layers=8, heads=6, kv_heads=2, head_dim=64, intermediate=1024),
    "1B": Size(vocab=65536, hidden=2048, layers=16, heads=16, kv_heads=8, head_dim=128, intermediate=6144),
    "4B": Size(vocab=151936, hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728),
}


def make_model(folder: Path, size: Size, *, noise: float = 0.0) -> Path:
    """Folder of a random model and a tokenizer, the same at every call; `noise` moves its matrices away.

    With noise it is a policy and without it is its reference: their log-probs differ by some nats.
    """
    if folder.exists():
        return folder
    config = Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=2 * MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=_EOS,
        pad_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if noise and weight.dim() == 2:
                weight += noise * weight.std() * torch.randn_like(weight)
    save_policy(model, _tokenizer(size.vocab), folder)
    return folder


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>"])}
    words |= {f"w{index}": index for index in range(_FIRST_WORD, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_pairs(count: int, vocab: int, dialogues: str | None) -> list[Pair]:
    """Pairs of `dialogues` (JSON lines with `chosen` and `rejected`, as HH-RLHF has them) in a fixed order.

    Without a file, random tokens with the lengths of HH-RLHF's harmless-base: log-normal, means of
    about 120 (prompt), 45 and 55 tokens.
    """
    found = _random_ids() if dialogues is None else _dialogue_ids(Path(dialogues))
    pairs = []
    for prompt, chosen, rejected in found:
        if min(map(len, (prompt, chosen, rejected))) and len(prompt + chosen + rejected) < MAX_TOKENS:
            ids = [
                tuple(_FIRST_WORD + token % (vocab - _FIRST_WORD) for token in part)
                for part in (prompt, chosen, rejected)
            ]
            pairs.append(Pair("", "", "", ids[0], (*ids[1], _EOS), (*ids[2], _EOS)))
        if len(pairs) == count:
            return pairs
    raise SystemExit(f"--dialogues {dialogues} has only {len(pairs)} usable pairs of {count}")


def _random_ids() -> Iterator[list[list[int]]]:
    generator = random.Random(0)
    lengths = ((4.34, 1.05), (3.36, 0.92), (3.55, 0.97))
    while True:
        yield [
            [generator.randrange(1 << 30) for _ in range(round(generator.lognormvariate(*length)))]
            for length in lengths
        ]


def _dialogue_ids(path: Path) -> Iterator[list[list[int]]]:
    """Word pieces, hashed: equal words are equal tokens."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        rows = list(map(json.loads, lines))
    random.Random(0).shuffle(rows)
    for row in rows:
        prompts, answers = zip(*(_split(row[name]) for name in ("chosen", "rejected")), strict=True)
        if prompts[0] == prompts[1]:
            texts = (prompts[0], *answers)
            yield [[zlib.crc32(word.encode()) for word in _WORD_PIECE.findall(text)] for text in texts]


def _split(dialogue: str) -> tuple[str, str]:
    """Everything up to the last answer, and that answer."""
    prompt, marker, answer = dialogue.rpartition(_ANSWER)
    return prompt + marker, answer


def batches_of(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    return [list(pairs[start : start + size]) for start in range(0, len(pairs), size)]


def grouped_by_length(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Batches of pairs whose longer sequences are about as long, in a fixed random order: least padding."""
    by_length = sorted(
        pairs, key=lambda pair: len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
    )
    return random.Random(0).sample(batches := batches_of(by_length, size), len(batches))


def useful_flops(size: Size, pairs: Sequence[Pair]) -> int:
    """The least that forward and backward of these pairs take: 6 N (P + C + R - 2) + 6 H V (C + R) each.

    N: weights of the layers' matrices. P, C and R: tokens of prompt and completions, whose last tokens
    need no forward. And attention: 12 FLOPs per layer, query channel, and visible pair of query and key.
    """
    channels = size.heads * size.head_dim
    attention_weights = 2 * size.hidden * (channels + size.kv_heads * size.head_dim)
    weights = size.layers * (attention_weights + 3 * size.hidden * size.intermediate)
    total = 0
    for pair in pairs:
        prompt, chosen, rejected = (len(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        first, second = prompt + chosen - 1, rejected - 1
        seen = first * (first + 1) // 2 + second * prompt + second * (second + 1) // 2
        total += 6 * weights * (first + second)
        total += 6 * size.hidden * size.vocab * (chosen + rejected)
        total += 12 * size.layers * channels * seen
    return total
