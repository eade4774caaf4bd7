"""Texts and conversations to token ids: the chat template once, and no special token twice."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from dpo_ray.records import Row
from dpo_ray.types import Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateSettings = Mapping[str, object]
"""What a chat template gets beside the messages: `tools`, say, or `enable_thinking`."""

_NO_SETTINGS: TemplateSettings = {}
_ANSWER = "the content of an answer"
"""Stands for an answer where only what the template writes around it matters."""


def has_chat_template(tokenizer: "PreTrainedTokenizerBase | None") -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def template_settings(row: Row) -> dict[str, object]:
    """The row's `tools` (a list, or its JSON) and `chat_template_kwargs`, as TRL has them."""
    tools, others = row.get("tools"), row.get("chat_template_kwargs")
    tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    if others is not None and not isinstance(others, dict):
        raise ValueError(f"chat_template_kwargs is {type(others).__name__}: make it an object, or remove it")
    given = {"tools": tools or None, **cast(Row, others or {})}
    # A table has every key in every row, empty where the row does not set it.
    return {name: value for name, value in given.items() if value is not None}


def is_blank(text: Text) -> bool:
    """Whether there is nothing to read in `text`."""
    if isinstance(text, str):
        return not text.strip()
    return not any(message["content"].strip() for message in text)


def tokenize_prompt(
    text: Text, tokenizer: "PreTrainedTokenizerBase", settings: TemplateSettings = _NO_SETTINGS
) -> tuple[int, ...]:
    """The ids that a completion of `text` is conditioned on, special tokens included."""
    if isinstance(text, str):
        return tokenize_text(text, tokenizer)
    return tokenize_messages(text, tokenizer, add_generation_prompt=True, settings=settings)


def tokenize_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Ids of `text` as a beginning: with one BOS where the tokenizer adds it, without an added EOS."""
    token_ids = cast(list[int], tokenizer(text).input_ids)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # A text that was formatted by hand may bring the BOS that the tokenizer adds, and the EOS too.
    if bos is not None and token_ids[:2] == [bos, bos]:
        token_ids = token_ids[1:]
    brings_eos = text.endswith(str(tokenizer.eos_token))
    if eos is not None and token_ids[-2 if brings_eos else -1 :] == [eos] * (2 if brings_eos else 1):
        token_ids = token_ids[:-1]
    return tuple(token_ids)


def tokenize_messages(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    add_generation_prompt: bool,
    settings: TemplateSettings = _NO_SETTINGS,
) -> tuple[int, ...]:
    """Ids of the conversation, from one application of the chat template."""
    fixed = {"add_generation_prompt": add_generation_prompt, "tokenize": True, "return_dict": False}
    return tuple(cast(list[int], _apply_template(messages, tokenizer, {**settings, **fixed})))


class CompletionTokenizer:
    """Ids of completions: what the policy should write, through the one token that ends it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._end_of_turn: int | None = None

    def __call__(
        self,
        prompt: Text,
        prompt_ids: tuple[int, ...],
        completion: Text,
        settings: TemplateSettings = _NO_SETTINGS,
    ) -> tuple[int, ...]:
        """[T] ids that follow `prompt_ids`; prompt and completion are both text, or both messages."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._text(prompt, prompt_ids, completion)
        assert not isinstance(prompt, str) and not isinstance(completion, str)
        full_ids = tokenize_messages(
            [*prompt, *completion], self._tokenizer, add_generation_prompt=False, settings=settings
        )
        if full_ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                "the tokenizer's chat template writes the prompt in another way once an answer follows, so "
                "the policy would be trained on tokens that it never sees: take a template that only appends"
            )
        if self._end_of_turn is None:
            self._end_of_turn = self._find_end_of_turn(prompt, settings)
        return _ending_with(self._end_of_turn, full_ids[len(prompt_ids) :])

    def _text(self, prompt: str, prompt_ids: tuple[int, ...], completion: str) -> tuple[int, ...]:
        # A text that was formatted by hand may bring the EOS, and white space after it.
        if completion.rstrip().endswith(str(self._tokenizer.eos_token)):
            completion = completion.rstrip()
        full_ids = tokenize_text(prompt + completion, self._tokenizer)
        token_ids = full_ids[len(prompt_ids) :]
        # Where a token would span the border, the sampler's view counts: the prompt's own tokens stay.
        if full_ids[: len(prompt_ids)] != prompt_ids:
            token_ids = tuple(self._tokenizer(completion, add_special_tokens=False).input_ids)
        return token_ids if token_ids[-1:] == (self._eos,) else (*token_ids, self._eos)

    @cached_property
    def _eos(self) -> int:
        eos = cast(int | None, self._tokenizer.eos_token_id)
        if eos is None:
            raise ValueError(
                "the model's tokenizer has no end-of-sequence token: set eos_token in its config"
            )
        return eos

    def _find_end_of_turn(self, prompt: Sequence[Message], settings: TemplateSettings) -> int:
        """The first special token that the chat template writes after an answer; EOS where it writes none.

        Generation stops there. What the template writes next (a newline, a second token) opens the next
        turn: the policy never writes it.
        """
        conversation: list[Message] = [*prompt, {"role": "assistant", "content": _ANSWER}]
        rendered = str(_apply_template(conversation, self._tokenizer, {**settings, "tokenize": False}))
        _, has_answer, tail = rendered.rpartition(_ANSWER)
        if not has_answer:
            raise ValueError(
                "the tokenizer's chat template leaves out what the assistant says, so there is nothing to "
                "learn from these messages: take another template, or give prompts and completions as text"
            )
        special = _special_ids(self._tokenizer)
        tail_ids = cast(list[int], self._tokenizer(tail, add_special_tokens=False).input_ids)
        ends = [token_id for token_id in tail_ids if token_id in special]
        return ends[0] if ends else self._eos


def _ending_with(end: int, token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """`token_ids` through the last `end`, which is added where there is none."""
    if end not in token_ids:
        return (*token_ids, end)
    return token_ids[: len(token_ids) - token_ids[::-1].index(end)]


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids of the tokens that are no text, but for the one that stands for unknown text (EOS in GPT-2)."""
    added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    text_or_eos = {cast(int, tokenizer.unk_token_id)} - {cast(int, tokenizer.eos_token_id)}
    return (added | set(tokenizer.all_special_ids)) - text_or_eos


def _apply_template(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, object]
) -> object:
    if not has_chat_template(tokenizer):
        raise ValueError(
            "these are messages, and the model's tokenizer has no chat template: take an instruction-tuned "
            "model, set chat_template in its tokenizer_config.json, or write the prompts as text"
        )
    try:
        return tokenizer.apply_chat_template(cast(list[dict[str, str]], list(messages)), **arguments)  # pyright: ignore[reportArgumentType]
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses these messages: {error}") from error
