"""Texts to imitate, as one-sided pairs: what supervised fine-tuning trains on."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from dpo_ray.comparisons import UnusableError, has_any, read_demonstration
from dpo_ray.film_reviews import generate_reviews
from dpo_ray.preference_data import LongPrompts, PairEncoder, PairSet, RowPairs, collect_pairs
from dpo_ray.prompts import GENERATED
from dpo_ray.records import Row, read_rows
from dpo_ray.tokenization import CompletionTokenizer, is_blank
from dpo_ray.types import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_GENERATED_TEXTS = 8192


def load_texts(
    source: str,
    *,
    split: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    long_prompts: LongPrompts = "drop",
) -> PairSet:
    """What there is to imitate in `source`: pairs without a rejected side, each within `max_tokens`.

    A row gives its chosen or praised completion, its `completion`, or the last answer of its `messages`,
    given what comes before; else its `text`, given only a token that begins texts. `film_reviews` is the
    corpus of the starting policy. Left out and counted as `load_pairs` does, and `blamed`: a completion
    whose label is false. Truncated are also the texts that became several pairs.
    """
    rows = _generated_rows() if source == GENERATED else read_rows(source, split=split)
    texts = collect_pairs(rows, source, TextReader(tokenizer, max_tokens, long_prompts))
    if not texts.pairs:
        raise ValueError(
            f"no texts in {source} (left out: {texts.dropped}): give completions or texts that are not "
            f"empty, completions with their prompts in at most {max_tokens} tokens"
        )
    return texts


class TextReader:
    """Rows with something to imitate to one-sided pairs, for one tokenizer."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int, long_prompts: LongPrompts
    ) -> None:
        self._tokenizer = tokenizer
        self._encode = PairEncoder(tokenizer, max_tokens, long_prompts)
        self._completion_ids = CompletionTokenizer(tokenizer)
        self._max_tokens = max_tokens

    def __call__(self, row: Row) -> RowPairs:
        """The row's pairs, several of them where a plain text is too long for one."""
        if has_any(row, "chosen", "rejected", "completion", "messages", "conversations"):
            return self._encode(read_demonstration(row, self._tokenizer))
        text = row.get("text")
        if not isinstance(text, str):
            raise ValueError(
                "nothing to imitate: give text, messages, prompt and completion, or chosen and rejected; "
                f"rename the columns, which are {', '.join(map(str, row))}"
            )
        return self._cut_to_blocks(text)

    def _cut_to_blocks(self, text: str) -> RowPairs:
        """As few pairs as hold the text's ids and EOS, of equal length, each after the token of `_start`."""
        if is_blank(text):
            raise UnusableError("empty")
        token_ids = self._completion_ids("", (), text)
        token_ids = token_ids[1:] if token_ids[0] == self._start else token_ids
        num = math.ceil(
            len(token_ids) / (self._max_tokens - 1)
        )  # The first token is predicted from one more.
        ends = [len(token_ids) * block // num for block in range(num + 1)]
        blocks = [token_ids[start:end] for start, end in pairwise(ends)]
        texts = [text] if num == 1 else [self._decode(block) for block in blocks]
        pairs = [
            Pair("", part, "", prompt_ids=(self._start,), chosen_ids=block, rejected_ids=(), source="file")
            for part, block in zip(texts, blocks, strict=True)
        ]
        return RowPairs(tuple(pairs), is_truncated=num > 1)

    @property
    def _start(self) -> int:
        """The token before a text: BOS; without one, the EOS of the text before."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        return cast(int, eos if bos is None else bos)

    def _decode(self, token_ids: tuple[int, ...]) -> str:
        return cast(str, self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _generated_rows() -> list[Row]:
    return [{"text": review} for review in generate_reviews(NUM_GENERATED_TEXTS, seed=0)]
