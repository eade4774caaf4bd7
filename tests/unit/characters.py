"""Tokenizers whose ids can be worked out by hand, and pairs loaded with them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dpo_ray.preference_data import PairSet, load_pairs
from dpo_ray.types import Message, Pair

HH_RLHF = Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf-harmless-base-test.jsonl.gz"

# An ASCII character's id is its code; "ab" is one token.
BOS, EOS, USER, ASSISTANT, AB = 128, 129, 130, 131, 132
TURNS = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
CHAT_TEMPLATE = f"{{{{ bos_token }}}}{TURNS}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"


def make_tokenizer(layout: str = "$A", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character, special tokens where `layout` puts them."""
    specials = {"<bos>": BOS, "<eos>": EOS, "<user>": USER, "<assistant>": ASSISTANT}
    characters = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(BPE({**characters, **specials, "ab": AB}, [("a", "b")], unk_token="?"))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.post_processor = TemplateProcessing(single=layout, special_tokens=list(specials.items()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=chat_template
    )


PLAIN = make_tokenizer()
CHAT = make_tokenizer(chat_template=CHAT_TEMPLATE)


def codes(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def load(source: object, tokenizer: Any = PLAIN, *, max_tokens: int = 1000, **options: Any) -> PairSet:
    return load_pairs(str(source), split="train", tokenizer=tokenizer, max_tokens=max_tokens, **options)


def load_row(folder: Path, tokenizer: Any = PLAIN, **row: object) -> Pair:
    source = write_jsonl(folder / "pairs.jsonl", row)
    (pair,) = load(source, tokenizer, unpaired_allowed=True).pairs
    return pair


FINE = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
