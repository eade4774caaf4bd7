"""What people write as the token ids that the policy would see."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from dpo_ray.comparisons import UnusableError, read_comparison
from dpo_ray.preference_data import PairEncoder
from dpo_ray.records import Row
from dpo_ray.tokenization import tokenize_prompt
from dpo_ray.types import Pair, Text
from serve.refusal import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_REASONS = {
    "empty": "a text of it is empty",
    "equal": "chosen and rejected are the same tokens",
    "no_shared_prompt": "chosen and rejected do not follow the prompt",
    "several_turns": "chosen and rejected must be one answer each",
    "too_long": "it has more tokens than the policy's context",
}
"""By why offline data would leave such a row out."""


class Encoder:
    """The policy's tokenizer, used by one request at a time: it is not safe in several threads."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._encode = PairEncoder(tokenizer, context_length, "drop")
        self._turn = asyncio.Lock()

    async def prompt_ids(self, prompt: Text) -> tuple[int, ...]:
        """Refusal: there is nothing to go on from."""
        ids = await self._run(lambda: tokenize_prompt(prompt, self._tokenizer))
        if not ids:
            raise _unusable(f"prompt: {_REASONS['empty']}")
        return ids

    async def pair(self, prompt: Text, chosen: Text, rejected: Text) -> Pair:
        """Refusal: they make no pair."""
        return await self._run(lambda: self._pair(prompt, chosen, rejected))

    async def text(self, token_ids: list[int]) -> str:
        return await self._run(lambda: str(self._tokenizer.decode(token_ids)))

    def _pair(self, prompt: Text, chosen: Text, rejected: Text) -> Pair:
        row: Row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        (pair,) = self._encode(read_comparison(row, self._tokenizer)).pairs
        return pair

    async def _run(self, work: Callable[[], T]) -> T:
        async with self._turn:
            try:
                return await asyncio.to_thread(work)
            except UnusableError as reason:
                raise _unusable(f"this makes no pair: {_REASONS.get(str(reason), str(reason))}") from None
            except ValueError as error:
                raise _unusable(str(error)) from None


def _unusable(sentence: str) -> Refusal:
    return Refusal(sentence, status=HTTPStatus.UNPROCESSABLE_ENTITY)
