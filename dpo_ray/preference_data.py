"""Offline preference data as pairs of token ids."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from dpo_ray.comparisons import Comparison, UnusableError, read_comparison
from dpo_ray.film_reviews import generate_pairs
from dpo_ray.prompts import GENERATED
from dpo_ray.records import Row, naming_row, read_rows
from dpo_ray.tokenization import CompletionTokenizer, is_blank, tokenize_prompt
from dpo_ray.types import Pair, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_GENERATED_PAIRS = 2048
LongPrompts = Literal["drop", "cut_start"]
"""What becomes of a pair with too many tokens: it is left out, or its prompt loses tokens at the start."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PairSet:
    """The usable pairs of a source, and what was left out of it."""

    pairs: tuple[Pair, ...]
    dropped: dict[str, int]
    """Rows left out, by reason."""
    truncated: int = 0
    """Rows that lost tokens to fit."""
    dropped_rows: tuple[tuple[int, str], ...] = ()
    """Number of each row left out (the first row is 1), and the reason."""


class RowPairs(NamedTuple):
    """What becomes of one row."""

    pairs: tuple[Pair, ...]
    is_truncated: bool


def load_pairs(
    source: str,
    *,
    split: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    long_prompts: LongPrompts = "drop",
    unpaired_allowed: bool = False,
) -> PairSet:
    """The pairs of `source` in its order, prompt and longer completion within `max_tokens`.

    `read_comparison` says which columns a row may have; `film_reviews` generates its own. Left out and
    counted: `empty`, `equal`, `too_long`, `no_shared_prompt`, `several_turns`, where two conversations
    part before their last answer, and `tool_calls`. ValueError: a row with one completion only, where
    these are not allowed.
    """
    reader = PairReader(tokenizer, max_tokens, long_prompts, unpaired_allowed=unpaired_allowed)
    rows = _generated_rows() if source == GENERATED else read_rows(source, split=split)
    pair_set = collect_pairs(rows, source, reader)
    if not pair_set.pairs:
        raise no_pairs(source, pair_set.dropped, max_tokens)
    return pair_set


def no_pairs(source: str, dropped: dict[str, int], max_tokens: int) -> ValueError:
    return ValueError(
        f"no pairs in {source} (left out: {dropped}): give different chosen and rejected "
        f"completions of one prompt, in at most {max_tokens} tokens"
    )


def collect_pairs(
    rows: Iterable[Row], source: str, read: Callable[[Row], RowPairs], *, first_row: int = 1
) -> PairSet:
    """The pairs of all rows in their order; `source` is what errors and the log name."""
    pairs: list[Pair] = []
    dropped_rows: list[tuple[int, str]] = []
    truncated = 0
    for number, row in enumerate(rows, start=first_row):
        try:
            with naming_row(source, number):
                made = read(row)
        except UnusableError as reason:
            dropped_rows.append((number, str(reason)))
            _log.info("%s, row %d: left out, %s", source, number, reason)
            continue
        pairs.extend(made.pairs)
        truncated += made.is_truncated
    dropped = Counter(reason for _, reason in dropped_rows)
    return PairSet(tuple(pairs), dict(dropped), truncated, tuple(dropped_rows))


class PairReader:
    """Rows of preference data to pairs, for one tokenizer."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_tokens: int,
        long_prompts: LongPrompts,
        *,
        unpaired_allowed: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._encode = PairEncoder(tokenizer, max_tokens, long_prompts)
        self._unpaired_allowed = unpaired_allowed

    def __call__(self, row: Row) -> RowPairs:
        """The row's one pair. UnusableError: it has none. ValueError: the row is not what it should be."""
        comparison = read_comparison(row, self._tokenizer)
        if comparison.is_unpaired and not self._unpaired_allowed:
            raise ValueError(
                "one completion with a label, and the loss compares two: set --training.loss.type to kto or "
                "bco, or give chosen and rejected"
            )
        return self._encode(comparison)


class PairEncoder:
    """Comparisons to pairs of token ids that fit."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int, long_prompts: LongPrompts
    ) -> None:
        self._tokenizer = tokenizer
        self._completion_ids = CompletionTokenizer(tokenizer)
        self._max_tokens = max_tokens
        self._long_prompts: LongPrompts = long_prompts

    def __call__(self, comparison: Comparison) -> RowPairs:
        texts = (comparison.prompt, comparison.chosen, comparison.rejected)
        if any(text is not None and is_blank(text) for text in texts):
            raise UnusableError("empty")
        prompt_ids = tokenize_prompt(comparison.prompt, self._tokenizer, comparison.settings)
        if not prompt_ids:
            raise UnusableError("empty")
        chosen_ids = self._side(comparison, prompt_ids, comparison.chosen)
        rejected_ids = self._side(comparison, prompt_ids, comparison.rejected)
        if chosen_ids == rejected_ids:
            raise UnusableError("equal")
        fitting_ids = self._fit(prompt_ids, max(len(chosen_ids), len(rejected_ids)))
        pair = Pair(
            prompt=comparison.prompt,
            chosen=comparison.chosen or "",
            rejected=comparison.rejected or "",
            prompt_ids=fitting_ids,
            chosen_ids=chosen_ids,
            rejected_ids=rejected_ids,
            chosen_reward=comparison.chosen_reward,
            rejected_reward=comparison.rejected_reward,
            source="file",
            weight=comparison.weight,
        )
        return RowPairs((pair,), is_truncated=len(fitting_ids) < len(prompt_ids))

    def _side(
        self, comparison: Comparison, prompt_ids: tuple[int, ...], completion: Text | None
    ) -> tuple[int, ...]:
        if completion is None:
            return ()
        return self._completion_ids(comparison.prompt, prompt_ids, completion, comparison.settings)

    def _fit(self, prompt_ids: tuple[int, ...], completion_length: int) -> tuple[int, ...]:
        """The prompt as far as it fits before a completion: its BOS, where it has one, and its end."""
        excess = len(prompt_ids) + completion_length - self._max_tokens
        if excess <= 0:
            return prompt_ids
        first = int(prompt_ids[0] == self._tokenizer.bos_token_id)
        if self._long_prompts == "drop" or excess >= len(prompt_ids) - first:
            raise UnusableError("too_long")
        return prompt_ids[:first] + prompt_ids[first + excess :]


def _generated_rows() -> list[Row]:
    return [dict(pair._asdict()) for pair in generate_pairs(NUM_GENERATED_PAIRS, seed=0)]
