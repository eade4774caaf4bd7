"""Pairs out of a buffer as a data set that trainers know, and pairs of files into it."""

from typing import TYPE_CHECKING, NamedTuple

from dpo_ray.buffer.snapshots import parquet
from dpo_ray.buffer.store import PreferenceBuffer, PutReceipt
from dpo_ray.preference_data import LongPrompts, load_pairs
from dpo_ray.storage import Storage

if TYPE_CHECKING:
    import sqlalchemy as sa
    from transformers import PreTrainedTokenizerBase

_COLUMNS = [
    *("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "weight"),
    *("pair_id", "policy_version", "round", "source", "judge"),
]
"""Not the token ids, which TRL would take for its own, and not who voted."""


class Exported(NamedTuple):
    pairs: int
    unpaired: int
    """Praised or blamed answers, which have no place in a data set of pairs."""


def export_pairs(buffer: PreferenceBuffer, folder: str, *conditions: "sa.ColumnElement[bool]") -> Exported:
    """Write a folder that `datasets.load_dataset` reads, in TRL's preference format.

    It is conversational where one of the pairs is, and standard otherwise.
    """
    rows = buffer.rows(*conditions)
    paired = [row for row in rows if row["chosen_ids"] and row["rejected_ids"]]
    if not paired:
        raise ValueError(f"none of {len(rows)} rows is a pair to export: take other sources or rounds")
    Storage(folder).write_bytes("train.parquet", parquet(paired, _COLUMNS))
    return Exported(len(paired), len(rows) - len(paired))


class Imported(NamedTuple):
    receipt: PutReceipt
    dropped: dict[str, int]
    """Rows left out, by reason."""


def import_pairs(
    buffer: PreferenceBuffer,
    source: str,
    *,
    split: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    long_prompts: LongPrompts,
) -> Imported:
    """Put the pairs of a file, a folder or a `datasets` name into the buffer, in one transaction."""
    pair_set = load_pairs(
        source, split=split, tokenizer=tokenizer, max_tokens=max_tokens, long_prompts=long_prompts
    )
    return Imported(buffer.put(pair_set.pairs), pair_set.dropped)
