"""The answer that a prompt's row brings along, with the tokens that the policy would write."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dpo_ray.comparisons import UnusableError, read_demonstration
from dpo_ray.preference_data import PairEncoder
from dpo_ray.prompts import ANSWER_MARK
from dpo_ray.types import Prompt, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answer(NamedTuple):
    """A completion that no policy of ours wrote."""

    text: Text
    token_ids: tuple[int, ...]
    """Through the token that ends it."""


class AnswerReader:
    """Answers in one column of the prompts' rows, read as offline data are."""

    def __init__(self, column: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> None:
        self._column = column
        self._tokenizer = tokenizer
        self._encode = PairEncoder(tokenizer, max_tokens, "drop")

    def __call__(self, prompt: Prompt) -> Answer | None:
        """None where the row has none, or one that is blank, too long, or the answer to another prompt."""
        answer = prompt.fields.get(self._column)
        if answer is None:
            return None
        row = {name: prompt.fields.get(name) for name in ("tools", "chat_template_kwargs")}
        has_prompt = isinstance(answer, str) and ANSWER_MARK in answer
        row |= {"completion": answer, "prompt": None if has_prompt else prompt.text}
        try:
            (pair,) = self._encode(read_demonstration(row, self._tokenizer)).pairs
        except UnusableError:
            return None
        return Answer(pair.chosen, pair.chosen_ids) if pair.prompt_ids == prompt.token_ids else None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ValueError where no prompt's row has the column, or the first answer cannot be read."""
        having = [prompt for prompt in prompts if prompt.fields.get(self._column) is not None]
        if not having:
            columns = sorted({name for prompt in prompts for name in prompt.fields})
            raise ValueError(
                f"pairing.answer_column {self._column!r} is in no prompt's row: "
                f"give one of {', '.join(columns) or 'none, the rows have prompts only'}"
            )
        self(having[0])
