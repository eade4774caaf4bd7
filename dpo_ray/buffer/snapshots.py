"""What a round trains on: pairs drawn by a recorded query into an immutable Parquet file."""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict

from dpo_ray.buffer.database import PAIR_COLUMNS, PAIRS, chunks, now
from dpo_ray.buffer.opening import Opening
from dpo_ray.buffer.sampling import Candidate, SnapshotQuery, draw
from dpo_ray.config import BufferConfig
from dpo_ray.storage import Storage
from dpo_ray.types import Message, Pair, Text

_COLUMNS = ["pair_id", *PAIR_COLUMNS, "created_at"]
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), pa.list_(pa.int32())),
    **dict.fromkeys(("chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp"), pa.float64()),
    **dict.fromkeys(("policy_version", "round"), pa.int64()),
    **dict.fromkeys(("weight", "cost"), pa.float64()),
}
"""Where the values do not say it: a column may be empty."""


class SnapshotManifest(BaseModel):
    """The declaration of what a round trains on."""

    model_config = ConfigDict(frozen=True)

    round: int
    rows: int
    sha256: str
    age_mean: float
    """Mean of live version minus the pair's version."""
    sources: dict[str, int] = {}
    """Pairs of each source."""
    query: SnapshotQuery
    created_at: str


def snapshot_query(config: BufferConfig, *, round_: int, live_version: int, seed: int) -> SnapshotQuery:
    """What round `round_` trains on, of all rounds' pairs that are young enough."""
    return SnapshotQuery(
        max_round=round_,
        min_policy_version=0 if config.max_age is None else max(0, live_version - config.max_age),
        limit=config.pairs_per_round,
        seed=seed,
        mix=config.mix,
        freshness_half_life=config.freshness_half_life,
        max_pairs_per_prompt=config.max_pairs_per_prompt,
        max_author_share=config.max_author_share,
    )


def declare_snapshot(
    store: Opening, storage: Storage, query: SnapshotQuery, *, live_version: int
) -> SnapshotManifest:
    """Write the immutable snapshot of round `query.max_round`; a declared one is returned as it is."""
    declared = read_snapshot_manifest(storage, query.max_round)
    if declared is not None:
        return declared
    rows = store.run(lambda connection: _select(connection, query))
    content = parquet(rows, _COLUMNS)
    ages = [live_version - row["policy_version"] for row in rows]
    manifest = SnapshotManifest(
        round=query.max_round,
        rows=len(rows),
        sha256=hashlib.sha256(content).hexdigest(),
        age_mean=sum(ages) / max(1, len(ages)),
        sources=dict(Counter(row["source"] for row in rows)),
        query=query,
        created_at=now(),
    )
    storage.write_bytes(snapshot_file(query.max_round), content)
    storage.write_text(_manifest_file(query.max_round), manifest.model_dump_json(indent=2))
    return manifest


def read_snapshot_manifest(storage: Storage, round_: int) -> SnapshotManifest | None:
    """What round `round_` trains on; None before it is declared."""
    if not storage.exists(_manifest_file(round_)):
        return None
    return SnapshotManifest.model_validate_json(storage.read_text(_manifest_file(round_)))


def read_snapshot(storage: Storage, manifest: SnapshotManifest) -> list[Pair]:
    """The pairs of a declared snapshot; ValueError where the file is not the declared one."""
    rows = pq.read_table(_declared(storage, manifest)).to_pylist()
    return [_pair(row) for row in rows]


def read_pair_ids(storage: Storage, manifest: SnapshotManifest) -> set[str]:
    """Which pairs are in a declared snapshot; ValueError where the file is not the declared one."""
    return set(pq.read_table(_declared(storage, manifest), columns=["pair_id"])["pair_id"].to_pylist())


def _declared(storage: Storage, manifest: SnapshotManifest) -> io.BytesIO:
    content = storage.read_bytes(snapshot_file(manifest.round))
    if hashlib.sha256(content).hexdigest() != manifest.sha256:
        raise ValueError(f"{snapshot_file(manifest.round)} is not the snapshot that its manifest declares")
    return io.BytesIO(content)


def _select(connection: sa.Connection, query: SnapshotQuery) -> list[dict]:
    candidates = sa.select(
        *(PAIRS.c[name] for name in ("pair_id", "policy_version", "source", "author")),
        sa.literal("") if query.max_pairs_per_prompt is None else sa.cast(PAIRS.c.prompt_ids, sa.Text),
    ).where(PAIRS.c.round <= query.max_round, PAIRS.c.policy_version >= query.min_policy_version)
    ids = draw([Candidate(*row) for row in connection.execute(candidates)], query)
    rows: list[dict] = []
    for some in chunks(ids):
        found = connection.execute(sa.select(PAIRS).where(PAIRS.c.pair_id.in_(some)))
        rows.extend(dict(row) for row in found.mappings())
    return sorted(rows, key=lambda row: row["pair_id"])


def _pair(row: dict) -> Pair:
    """The pair of a snapshot's row; a snapshot of an older run has not all columns."""
    values = {name: row[name] for name in PAIR_COLUMNS if name in row}
    texts = {name: row[name] if row[f"{name}_ids"] else "" for name in ("chosen", "rejected")}
    ids = {name: tuple(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return Pair(**{**values, **texts, **ids})


def parquet(rows: Sequence[dict], names: Sequence[str]) -> bytes:
    """Columns of the public contract, zstd-compressed; equal rows give equal bytes."""
    columns = {name: [row[name] for row in rows] for name in names}
    types = dict(_TYPES)
    if any(isinstance(row["prompt"], list) for row in rows):
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            columns[name] = [_as_messages(row[name], row[f"{name}_ids"], role) for row in rows]
            types[name] = _MESSAGES
    table = pa.table({name: pa.array(columns[name], type=types.get(name)) for name in names})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _as_messages(text: Text, token_ids: Sequence[int], role: str) -> list[Message]:
    """Text as one turn, and a completion that is not there as none."""
    if isinstance(text, str):
        return [Message(role=role, content=text)] if token_ids else []
    return text


def snapshot_file(round_: int) -> str:
    return f"rounds/{round_:05d}/pairs.parquet"


def _manifest_file(round_: int) -> str:
    return f"rounds/{round_:05d}/manifest.json"
