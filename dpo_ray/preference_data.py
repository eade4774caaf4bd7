"""Offline preference pairs, in the formats people have."""

from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, cast

from dpo_ray.prompts import (
    ANSWER_MARK,
    has_chat_template,
    is_blank,
    shared_transcript,
    tokenize_messages,
    tokenize_prompt,
    tokenize_text,
    transcript_messages,
)
from dpo_ray.records import Row, as_text, naming_row, read_rows
from dpo_ray.types import Message, Pair, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PairSet:
    """The usable pairs of a source, and how many were left out for which reason."""

    pairs: tuple[Pair, ...]
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Comparison:
    """One row, its prompt cut off the completions."""

    prompt: Text
    chosen: Text
    rejected: Text


class _UnusableError(Exception):
    """A row that is left out and counted; its text is the reason."""


def load_pairs(source: str, *, split: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> PairSet:
    """The pairs of `source` in its order, prompt and longer completion within `max_tokens`.

    Columns `chosen` and `rejected`, as text or as messages, and `prompt`; without a prompt, `chosen` and
    `rejected` are whole conversations or HH-RLHF transcripts with a shared beginning. Left out and
    counted: `empty`, `equal`, `too_long`, `no_shared_prompt`, and `several_turns`, where the two part
    before their last answer.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(read_rows(source, split=split), start=1):
        with naming_row(source, number):
            try:
                pairs.append(_pair(_comparison(row, tokenizer), tokenizer, max_tokens))
            except _UnusableError as reason:
                dropped[str(reason)] += 1
    if not pairs:
        raise ValueError(
            f"no pairs in {source} (left out: {dict(dropped)}): give different chosen and rejected "
            f"completions of one prompt, in at most {max_tokens} tokens"
        )
    return PairSet(tuple(pairs), dict(dropped))


def _comparison(row: Row, tokenizer: "PreTrainedTokenizerBase") -> _Comparison:
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        raise ValueError(
            f"no column {' and no column '.join(missing)}: "
            f"rename the columns, which are {', '.join(map(str, row))}"
        )
    chosen, rejected = as_text(row["chosen"]), as_text(row["rejected"])
    prompt = None if row.get("prompt") is None else as_text(row["prompt"])
    if not isinstance(chosen, str) or not isinstance(rejected, str) or isinstance(prompt, list):
        answers = _as_messages(chosen, "assistant"), _as_messages(rejected, "assistant")
        return _conversation(None if prompt is None else _as_messages(prompt, "user"), *answers)
    if prompt is not None:
        return _Comparison(prompt, chosen, rejected)
    if has_chat_template(tokenizer):
        return _conversation(None, transcript_messages(chosen), transcript_messages(rejected))
    return _transcript(chosen, rejected)


def _as_messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _conversation(
    prompt: list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> _Comparison:
    """The prompt is what both share before an answer, where they do not begin with the answer itself."""
    if prompt is None or (_holds_prompt(chosen) and _holds_prompt(rejected)):
        prompt = _shared_messages(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise _UnusableError("no_shared_prompt")
    if is_blank(chosen) or is_blank(rejected):
        raise _UnusableError("empty")
    if len(chosen) > 1 or len(rejected) > 1:
        raise _UnusableError("several_turns")
    return _Comparison(prompt, chosen, rejected)


def _holds_prompt(completion: list[Message]) -> bool:
    return bool(completion) and completion[0]["role"] != "assistant"


def _shared_messages(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The turns before the first answer that differs: the last of them is no answer."""
    turns = takewhile(lambda turn: turn[0] == turn[1], zip(chosen, rejected, strict=False))
    shared = [message for message, _ in turns]
    while shared and shared[-1]["role"] == "assistant":
        shared.pop()
    return shared


def _transcript(chosen: str, rejected: str) -> _Comparison:
    prompt = shared_transcript(chosen, rejected)
    if prompt is None:
        raise _UnusableError("no_shared_prompt")
    comparison = _Comparison(prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))
    if ANSWER_MARK in f"{comparison.chosen}{comparison.rejected}":
        raise _UnusableError("several_turns")
    return comparison


def _pair(comparison: _Comparison, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> Pair:
    prompt, chosen, rejected = comparison.prompt, comparison.chosen, comparison.rejected
    if is_blank(prompt) or is_blank(chosen) or is_blank(rejected):
        raise _UnusableError("empty")
    prompt_ids = tokenize_prompt(prompt, tokenizer)
    chosen_ids = _completion_ids(prompt, prompt_ids, chosen, tokenizer)
    rejected_ids = _completion_ids(prompt, prompt_ids, rejected, tokenizer)
    if chosen_ids == rejected_ids:
        raise _UnusableError("equal")
    if len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) > max_tokens:
        raise _UnusableError("too_long")
    return Pair(prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids, source="file")


def _completion_ids(
    prompt: Text, prompt_ids: tuple[int, ...], completion: Text, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, ...]:
    """[T] ids that follow `prompt_ids`, through the end of the sequence."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return _text_ids(prompt, prompt_ids, completion, tokenizer)
    assert not isinstance(prompt, str) and not isinstance(completion, str)
    full_ids = tokenize_messages(prompt + completion, tokenizer, add_generation_prompt=False)
    if full_ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(
            "the tokenizer's chat template writes the prompt in another way once an answer follows, so the "
            "policy would be trained on tokens that it never sees: take a template that only appends"
        )
    return full_ids[len(prompt_ids) :]


def _text_ids(
    prompt: str, prompt_ids: tuple[int, ...], completion: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, ...]:
    eos = cast(int | None, tokenizer.eos_token_id)
    if eos is None:
        raise ValueError("the model's tokenizer has no end-of-sequence token: set eos_token in its config")
    full_ids = tokenize_text(prompt + completion, tokenizer)
    completion_ids = full_ids[len(prompt_ids) :]
    # Where a token would span the border, the sampler's view counts: the prompt's own tokens stay.
    if full_ids[: len(prompt_ids)] != prompt_ids:
        completion_ids = tuple(tokenizer(completion, add_special_tokens=False).input_ids)
    return completion_ids if completion_ids[-1:] == (eos,) else (*completion_ids, eos)
