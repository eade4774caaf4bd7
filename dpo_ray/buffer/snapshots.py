"""What a round trains on: pairs drawn by a recorded query into an immutable Parquet file."""

import hashlib
import io
import random
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict

from dpo_ray.buffer.database import PAIR_COLUMNS, PAIRS, chunks, now
from dpo_ray.storage import Storage
from dpo_ray.types import Message, Pair, Text

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class SnapshotQuery(BaseModel):
    """Which pairs a snapshot holds: run again on the same pairs, it chooses the same."""

    model_config = ConfigDict(frozen=True)

    max_round: int
    min_policy_version: int
    limit: int
    seed: int


class SnapshotManifest(BaseModel):
    """The declaration of what a round trains on."""

    model_config = ConfigDict(frozen=True)

    round: int
    rows: int
    sha256: str
    age_mean: float
    """Mean of live version minus the pair's version."""
    query: SnapshotQuery
    created_at: str


def declare_snapshot(
    engine: sa.Engine, storage: Storage, query: SnapshotQuery, *, live_version: int
) -> SnapshotManifest:
    """Write the immutable snapshot of round `query.max_round`; a declared one is returned as it is."""
    declared = read_snapshot_manifest(storage, query.max_round)
    if declared is not None:
        return declared
    rows = _select(engine, query)
    content = _parquet(rows)
    ages = [live_version - row["policy_version"] for row in rows]
    manifest = SnapshotManifest(
        round=query.max_round,
        rows=len(rows),
        sha256=hashlib.sha256(content).hexdigest(),
        age_mean=sum(ages) / max(1, len(ages)),
        query=query,
        created_at=now(),
    )
    storage.write_bytes(_snapshot_file(query.max_round), content)
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
    content = storage.read_bytes(_snapshot_file(manifest.round))
    if hashlib.sha256(content).hexdigest() != manifest.sha256:
        raise ValueError(f"{_snapshot_file(manifest.round)} is not the snapshot that its manifest declares")
    return io.BytesIO(content)


def _select(engine: sa.Engine, query: SnapshotQuery) -> list[dict]:
    chosen = sa.select(PAIRS.c.pair_id).where(
        PAIRS.c.round <= query.max_round, PAIRS.c.policy_version >= query.min_policy_version
    )
    with engine.connect() as connection:
        ids = sorted(connection.execute(chosen).scalars())
        if len(ids) > query.limit:
            ids = random.Random(f"{query.seed} {query.max_round}").sample(ids, query.limit)
        rows: list[dict] = []
        for some in chunks(ids):
            found = connection.execute(sa.select(PAIRS).where(PAIRS.c.pair_id.in_(some)))
            rows.extend(dict(row) for row in found.mappings())
    return sorted(rows, key=lambda row: row["pair_id"])


def _pair(row: dict) -> Pair:
    """The pair of a snapshot's row; a snapshot without weights has pairs of weight 1."""
    values = {name: row[name] for name in PAIR_COLUMNS if name in row or name != "weight"}
    texts = {name: row[name] if row[f"{name}_ids"] else "" for name in ("chosen", "rejected")}
    ids = {name: tuple(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return Pair(**{**values, **texts, **ids})


def _parquet(rows: list[dict]) -> bytes:
    """The columns of the public contract, zstd-compressed; equal rows give equal bytes."""
    names = ["pair_id", *PAIR_COLUMNS, "created_at"]
    columns = {name: [row[name] for row in rows] for name in names}
    types: dict[str, pa.DataType] = {}
    if any(isinstance(text, list) for text in columns["prompt"]):
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            ids = columns[f"{name}_ids"]
            columns[name] = [_as_messages(*turn, role) for turn in zip(columns[name], ids, strict=True)]
            types[name] = _MESSAGES
    types |= {
        **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), pa.list_(pa.int32())),
        **dict.fromkeys(("chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp"), pa.float64()),
        **dict.fromkeys(("policy_version", "round"), pa.int64()),
        "weight": pa.float64(),
    }
    table = pa.table({name: pa.array(columns[name], type=types.get(name)) for name in names})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _as_messages(text: Text, token_ids: Sequence[int], role: str) -> list[Message]:
    """Text as one turn, and a completion that is not there as none."""
    if isinstance(text, str):
        return [Message(role=role, content=text)] if token_ids else []
    return text


def _snapshot_file(round_: int) -> str:
    return f"rounds/{round_:05d}/pairs.parquet"


def _manifest_file(round_: int) -> str:
    return f"rounds/{round_:05d}/manifest.json"
