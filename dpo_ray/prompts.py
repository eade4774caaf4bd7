"""Prompts, from the files and data sets people have."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_ray.records import Row, as_text, naming_row, read_rows
from dpo_ray.tokenization import has_chat_template, is_blank, template_settings, tokenize_prompt
from dpo_ray.types import Message, Prompt, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATED = "film_reviews"
"""The source that is generated here instead of read."""
NUM_GENERATED = 4096

ANSWER_MARK = "\n\nAssistant:"
"""What comes before each answer in an HH-RLHF transcript (arXiv:2204.05862)."""
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable prompts of a source, and how many were left out."""

    prompts: tuple[Prompt, ...]
    dropped_too_long: int
    dropped_empty: int


def load_prompts(
    source: str, *, split: str, column: str, tokenizer: "PreTrainedTokenizerBase | None", max_tokens: int
) -> PromptSet:
    """The prompts of `source` with at most `max_tokens` tokens, in its order.

    Without a tokenizer, the bytes of its text stand for a prompt's tokens.
    Where rows have no `column` but `chosen` and `rejected` HH-RLHF transcripts, the prompt is what
    these share, up to the last answer: messages for a tokenizer with a chat template, else text.
    """
    prompts: list[Prompt] = []
    rows = _generated_rows(column) if source == GENERATED else read_rows(source, split=split)
    for number, row in enumerate(rows, start=1):
        with naming_row(source, number):
            text = _prompt_text(row, column, tokenizer)
            token_ids = () if is_blank(text) else prompt_ids(text, tokenizer, row)
            prompts.append(Prompt(text, token_ids, _other_fields(row, column)))
    return _usable(prompts, source, max_tokens)


def prompt_ids(text: Text, tokenizer: "PreTrainedTokenizerBase | None", row: Row) -> tuple[int, ...]:
    """The tokens of a prompt, by what its row says to the chat template."""
    if tokenizer is None:
        return tuple(json.dumps(text).encode())
    return tokenize_prompt(text, tokenizer, template_settings(row) if isinstance(text, list) else {})


def split_prompts(
    prompts: Sequence[Prompt], *, held_out: int, seed: int
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Prompts to train on and `held_out` others, of which none has the tokens of another.

    Of fewer than 2 * `held_out` distinct prompts, half are held out.
    """
    distinct: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        distinct.setdefault(prompt.token_ids, prompt)
    if held_out and len(distinct) < 2:
        raise ValueError(f"{len(distinct)} distinct prompts cannot be divided: add prompts, at least 2")
    num_held_out = min(held_out, len(distinct) // 2)
    drawn = set(random.Random(seed).sample(sorted(distinct), num_held_out))
    train = tuple(prompt for token_ids, prompt in distinct.items() if token_ids not in drawn)
    return train, tuple(prompt for token_ids, prompt in distinct.items() if token_ids in drawn)


def round_prompts(prompts: Sequence[Prompt], *, round_: int, num: int, seed: int) -> list[Prompt]:
    """The `num` prompts of a round: rounds walk through one seeded permutation after another.

    With the same `num` and `seed`, rounds share no prompt until all were used.
    """
    orders: dict[int, list[int]] = {}
    drawn: list[Prompt] = []
    for position in range(round_ * num, (round_ + 1) * num):
        epoch, place = divmod(position, len(prompts))
        if epoch not in orders:
            orders[epoch] = _permutation(len(prompts), f"{seed} {epoch}")
        drawn.append(prompts[orders[epoch][place]])
    return drawn


def shared_transcript(chosen: str, rejected: str) -> str | None:
    """What two HH-RLHF transcripts share, through the last "\\n\\nAssistant:"; None without one."""
    beginnings = [chosen[: mark.end()] for mark in re.finditer(ANSWER_MARK, chosen)]
    shared = [beginning for beginning in beginnings if rejected.startswith(beginning)]
    return shared[-1] if shared else None


def transcript_messages(transcript: str) -> list[Message]:
    """The turns of an HH-RLHF transcript; a mark at its very end opens no turn."""
    _, *parts = _TURN.split(transcript.removesuffix(ANSWER_MARK))
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _ROLES[speaker], "content": content.strip()} for speaker, content in turns]


def _generated_rows(column: str) -> list[Row]:
    from dpo_ray.film_reviews import generate_prompts

    return [{column: text} for text in generate_prompts(NUM_GENERATED, seed=0)]


def _prompt_text(row: Row, column: str, tokenizer: "PreTrainedTokenizerBase | None") -> Text:
    if column in row:
        return as_text(row[column])
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = shared_transcript(chosen, rejected)
        if shared is not None:
            return transcript_messages(shared) if has_chat_template(tokenizer) else shared
    raise ValueError(f"no column {column!r}: set --prompts_column to one of {', '.join(map(str, row))}")


def _usable(prompts: Sequence[Prompt], source: str, max_tokens: int) -> PromptSet:
    filled = [prompt for prompt in prompts if prompt.token_ids]
    if not filled:
        raise ValueError(
            f"no prompts in {source}: it has {len(prompts)} rows, none with a prompt to continue"
        )
    fitting = tuple(prompt for prompt in filled if len(prompt.token_ids) <= max_tokens)
    if not fitting:
        longest = max(len(prompt.token_ids) for prompt in filled)
        raise ValueError(
            f"no prompts left of {source}: {len(filled)} dropped as longer than {max_tokens} tokens, the "
            f"longest has {longest}; raise --max_prompt_tokens or take a model with a longer context"
        )
    return PromptSet(
        fitting, dropped_too_long=len(filled) - len(fitting), dropped_empty=len(prompts) - len(filled)
    )


def _other_fields(row: Row, column: str) -> dict[str, object]:
    """JSON values of the other columns; what JSON does not know (a date, say) becomes text."""
    others = {name: value for name, value in row.items() if name != column}
    return json.loads(json.dumps(others, default=str))


def _permutation(length: int, seed: str) -> list[int]:
    order = list(range(length))
    random.Random(seed).shuffle(order)
    return order
