"""One row of preference data, whatever its columns: a prompt, and the completions that follow it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, SupportsFloat, cast

from dpo_ray.prompts import ANSWER_MARK, shared_transcript, transcript_messages
from dpo_ray.records import Row, as_text
from dpo_ray.tokenization import TemplateSettings, has_chat_template, template_settings
from dpo_ray.types import Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_SPACELESS = "\u2e80"
"""Scripts from here on (Chinese, Japanese) put no space between words."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row, its prompt cut off the completions."""

    prompt: Text
    chosen: Text | None
    """None in a row that only blames."""
    rejected: Text | None
    """None in a row that only praises."""
    settings: TemplateSettings = field(default_factory=dict)
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    weight: float = 1.0

    @property
    def is_unpaired(self) -> bool:
        return self.chosen is None or self.rejected is None


class UnusableError(Exception):
    """A row that is left out and counted; its text is the reason."""


def read_comparison(row: Row, tokenizer: "PreTrainedTokenizerBase | None") -> Comparison:
    """The comparison of a row, or its praised or blamed completion.

    Paired: `chosen` and `rejected`, with `prompt`, or with a shared beginning: of turns, of HH-RLHF
    transcripts, of words. Unpaired: `completion` and `label`, with `prompt`, or as one conversation in
    `completion`, `messages` or `conversations`. A snapshot's row is unpaired where a side has no ids.
    Optional: `weight`, `chosen_reward`, `rejected_reward`, and for the chat template `tools` and
    `chat_template_kwargs`. Without a tokenizer, transcripts stay text.
    """
    chosen, rejected = _sides(row)
    prompt = None if row.get("prompt") is None else _text(row["prompt"])
    texts = [_text(side) for side in (chosen, rejected) if side is not None]
    prompt, completions = _divide(prompt, texts, tokenizer)
    weight = _number(row, "weight")
    return Comparison(
        prompt,
        None if chosen is None else completions[0],
        None if rejected is None else completions[-1],
        settings=template_settings(row) if isinstance(prompt, list) else {},
        chosen_reward=_number(row, "chosen_reward"),
        rejected_reward=_number(row, "rejected_reward"),
        weight=1.0 if weight is None else weight,
    )


def read_demonstration(row: Row, tokenizer: "PreTrainedTokenizerBase") -> Comparison:
    """What there is to imitate in a row: its chosen or praised completion, without a rejected one.

    A completion or conversation without a label counts as praised.
    """
    label = row["label"] if has_any(row, "label") else True
    comparison = read_comparison({**row, "label": label}, tokenizer)
    if comparison.chosen is None:
        raise UnusableError("blamed")
    return replace(comparison, rejected=None, rejected_reward=None)


def has_any(row: Row, *names: str) -> bool:
    return any(row.get(name) is not None for name in names)


def _sides(row: Row) -> tuple[object, object]:
    """What is chosen and what is rejected, None for a side that the row does not have."""
    if has_any(row, "chosen", "rejected"):
        _need(row, "chosen", "rejected")
        without_ids = [side for side in ("chosen", "rejected") if row.get(f"{side}_ids") == []]
        chosen, rejected = (None if without_ids == [side] else row[side] for side in ("chosen", "rejected"))
        return chosen, rejected
    names = [name for name in ("completion", "messages", "conversations") if has_any(row, name)]
    _need(row, *(("label",) if names else ("chosen", "rejected")))
    completion, label = row[names[0]], _LABELS.get(str(row["label"]).strip().lower())
    if label is None:
        raise ValueError(f"label is {row['label']!r}: write true for a good completion, false for a bad one")
    return (completion, None) if label else (None, completion)


def _need(row: Row, *names: str) -> None:
    missing = [name for name in names if not has_any(row, name)]
    if missing:
        raise ValueError(
            f"no column {' and no column '.join(missing)}: give chosen and rejected, or completion "
            f"and label; rename the columns, which are {', '.join(map(str, row))}"
        )


def _text(value: object) -> Text:
    if isinstance(value, list) and any(isinstance(turn, dict) and turn.get("tool_calls") for turn in value):
        raise UnusableError("tool_calls")
    return as_text(value)


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    try:
        number = float(cast(SupportsFloat | str, value))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}: write a finite number, or rename the column")
    return number


def _divide(
    prompt: Text | None, texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[Text, Sequence[Text]]:
    """The prompt, and what of each text follows it."""
    plain = [text for text in texts if isinstance(text, str)]
    if isinstance(prompt, list) or len(plain) < len(texts):
        turns = [_as_messages(text, "assistant") for text in texts]
        return _divide_conversations(None if prompt is None else _as_messages(prompt, "user"), turns)
    if prompt is not None:
        return prompt, plain
    if any(ANSWER_MARK in text for text in plain):
        if has_chat_template(tokenizer):
            return _divide_conversations(None, [transcript_messages(text) for text in plain])
        return _divide_transcripts(plain)
    return _divide_words(plain)


def _as_messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _divide_conversations(
    prompt: list[Message] | None, answers: Sequence[list[Message]]
) -> tuple[list[Message], Sequence[list[Message]]]:
    """The prompt is what all share before an answer, where they do not begin with the answer itself."""
    if prompt is None or all(_holds_prompt(answer) for answer in answers):
        prompt = _shared_turns(answers)
        last = len(prompt) + 1 if len(answers) == 1 else None
        answers = [answer[len(prompt) : last] for answer in answers]
    if not prompt:
        raise UnusableError("no_shared_prompt")
    if any(len(answer) > 1 or _holds_prompt(answer) for answer in answers):
        raise UnusableError("several_turns" if all(answers) else "empty")
    return prompt, answers


def _holds_prompt(completion: list[Message]) -> bool:
    return bool(completion) and completion[0]["role"] != "assistant"


def _shared_turns(conversations: Sequence[list[Message]]) -> list[Message]:
    """The turns before the first answer that differs, or before the last answer of a single conversation."""
    if len(conversations) == 1:
        answers = [number for number, turn in enumerate(conversations[0]) if turn["role"] == "assistant"]
        return conversations[0][: max(answers, default=0)]
    turns = takewhile(lambda turn: turn[0] == turn[1], zip(*conversations, strict=False))
    shared = [turn[0] for turn in turns]
    while shared and shared[-1]["role"] == "assistant":
        shared.pop()
    return shared


def _divide_transcripts(transcripts: Sequence[str]) -> tuple[str, Sequence[str]]:
    prompt = shared_transcript(transcripts[0], transcripts[-1])
    if prompt is None:
        raise UnusableError("no_shared_prompt")
    answers = [transcript.removeprefix(prompt) for transcript in transcripts]
    if any(ANSWER_MARK in answer for answer in answers):
        raise UnusableError("several_turns")
    return prompt, answers


def _divide_words(texts: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The prompt is the whole words that two texts share, as long as each has a word left."""
    if len(texts) > 1:
        first, other = texts
        for end in range(_num_shared(first, other), 0, -1):
            rests = first[end:], other[end:]
            if all(rests) and _is_word_end(first[end - 1], *(rest[0] for rest in rests)):
                return first[:end], rests
    raise UnusableError("no_shared_prompt")


def _num_shared(first: str, other: str) -> int:
    """Characters before the first that differs."""
    pairs = enumerate(zip(first, other, strict=False))
    return next((at for at, (one, two) in pairs if one != two), min(len(first), len(other)))


def _is_word_end(last: str, *following: str) -> bool:
    """Whether a word ends with the character `last`, whichever of the others follows."""
    goes_on = any(last.isalnum() and after.isalnum() and max(last, after) < _SPACELESS for after in following)
    return not last.isspace() and not goes_on
