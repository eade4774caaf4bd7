"""The preference buffer: a durable table of pairs, and the snapshots that rounds train on."""

import hashlib
import io
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from dpo_ray.storage import Storage
from dpo_ray.types import Message, Pair, Text

_METADATA = sa.MetaData()
_PAIRS = sa.Table(
    "pairs",
    _METADATA,
    sa.Column("pair_id", sa.String(32), primary_key=True),
    sa.Column("content_sha256", sa.String(64), nullable=False),
    *(sa.Column(name, sa.JSON, nullable=False) for name in ("prompt", "chosen", "rejected")),
    *(sa.Column(name, sa.JSON, nullable=False) for name in ("prompt_ids", "chosen_ids", "rejected_ids")),
    *(
        sa.Column(name, sa.Double)
        for name in ("chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")
    ),
    sa.Column("policy_version", sa.Integer, nullable=False),
    sa.Column("round", sa.Integer, nullable=False, index=True),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("judge", sa.String, nullable=False),
    sa.Column("weight", sa.Double, nullable=False, server_default="1"),
    sa.Column("created_at", sa.String, nullable=False),
)
_PAIR_COLUMNS = [c.name for c in _PAIRS.columns if c.name not in ("pair_id", "content_sha256", "created_at")]
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class PutReceipt:
    """The pairs of one call that are now durable."""

    added: int
    known: int
    """Pairs that were in the buffer already."""


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


class PreferenceBuffer:
    """The only owner of the pairs. The commit of `put` is its acknowledgement."""

    def __init__(self, url: str, storage: Storage) -> None:
        self._storage = storage
        self._url = url

    def put(self, pairs: Sequence[Pair]) -> PutReceipt:
        """Add pairs in one transaction: all are durable on return, or none.

        Putting a pair again is a no-op. ValueError: a non-finite number, or a known id with other content.
        """
        rows: dict[str, dict] = {}
        for row in map(_row, pairs):
            _refuse_other_content(row, rows.setdefault(row["pair_id"], row)["content_sha256"])
        with self._engine.begin() as connection:
            known = _known(connection, list(rows))
            for pair_id, content in known.items():
                _refuse_other_content(rows[pair_id], content)
            new = [row for pair_id, row in rows.items() if pair_id not in known]
            if new:
                connection.execute(_PAIRS.insert(), new)
        return PutReceipt(added=len(new), known=len(pairs) - len(new))

    def count(self) -> int:
        with self._engine.connect() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(_PAIRS)).scalar_one()

    def declare_snapshot(self, query: SnapshotQuery, *, live_version: int) -> SnapshotManifest:
        """Write the immutable snapshot of round `query.max_round`; a declared one is returned as it is."""
        declared = read_snapshot_manifest(self._storage, query.max_round)
        if declared is not None:
            return declared
        rows = self._select(query)
        content = _parquet(rows)
        ages = [live_version - row["policy_version"] for row in rows]
        manifest = SnapshotManifest(
            round=query.max_round,
            rows=len(rows),
            sha256=hashlib.sha256(content).hexdigest(),
            age_mean=sum(ages) / max(1, len(ages)),
            query=query,
            created_at=_now(),
        )
        self._storage.write_bytes(_snapshot_file(query.max_round), content)
        self._storage.write_text(_manifest_file(query.max_round), manifest.model_dump_json(indent=2))
        return manifest

    def close(self) -> None:
        self._engine.dispose()

    @cached_property
    def _engine(self) -> sa.Engine:
        """Opened by the first call: an actor cannot say clearly why its constructor failed."""
        return _open(self._url)

    def _select(self, query: SnapshotQuery) -> list[dict]:
        chosen = sa.select(_PAIRS.c.pair_id).where(
            _PAIRS.c.round <= query.max_round, _PAIRS.c.policy_version >= query.min_policy_version
        )
        with self._engine.connect() as connection:
            ids = sorted(connection.execute(chosen).scalars())
            if len(ids) > query.limit:
                ids = random.Random(f"{query.seed} {query.max_round}").sample(ids, query.limit)
            rows: list[dict] = []
            for some in _chunks(ids):
                found = connection.execute(sa.select(_PAIRS).where(_PAIRS.c.pair_id.in_(some)))
                rows.extend(dict(row) for row in found.mappings())
        return sorted(rows, key=lambda row: row["pair_id"])


def default_url(storage: Storage) -> str:
    """buffer.sqlite in the run's folder; ValueError where that is no local folder."""
    if storage.local_root is None:
        raise ValueError(
            f"the run's folder {storage.root} is a URL, and SQLite needs a path: "
            "set --buffer.url to a database that the job reaches (postgresql://…)"
        )
    return f"sqlite:///{storage.local_root}/buffer.sqlite"


def read_snapshot_manifest(storage: Storage, round_: int) -> SnapshotManifest | None:
    """What round `round_` trains on; None before it is declared."""
    if not storage.exists(_manifest_file(round_)):
        return None
    return SnapshotManifest.model_validate_json(storage.read_text(_manifest_file(round_)))


def read_snapshot(storage: Storage, manifest: SnapshotManifest) -> list[Pair]:
    """The pairs of a declared snapshot; ValueError where the file is not the declared one."""
    content = storage.read_bytes(_snapshot_file(manifest.round))
    if hashlib.sha256(content).hexdigest() != manifest.sha256:
        raise ValueError(f"{_snapshot_file(manifest.round)} is not the snapshot that its manifest declares")
    rows = pq.read_table(io.BytesIO(content)).to_pylist()
    return [_pair(row) for row in rows]


def _open(url: str) -> sa.Engine:
    if not url.startswith("sqlite"):
        engine = sa.create_engine(url)
    else:
        # One connection for the life of the owner; the timeout waits for a dying owner to let go.
        wait = {} if "timeout" in sa.make_url(url).query else {"timeout": 20}
        engine = sa.create_engine(
            url, poolclass=sa.StaticPool, connect_args={**wait, "check_same_thread": False}
        )
        event.listen(engine, "connect", _configure_sqlite)
    try:
        _METADATA.create_all(engine)
        _add_weight_column(engine)
    except OperationalError as error:
        raise ValueError(
            f"the preference buffer {engine.url!r} cannot be opened: {error.orig}. "
            "If another job uses it, stop that job or set another run_dir or buffer.url."
        ) from None
    return engine


def _add_weight_column(engine: sa.Engine) -> None:
    """Give a table of a run that knew no weights the column, with every pair's weight 1."""
    with engine.begin() as connection:
        if "weight" not in {column["name"] for column in sa.inspect(connection).get_columns("pairs")}:
            column = "weight DOUBLE PRECISION DEFAULT 1 NOT NULL"
            connection.execute(sa.text(f"ALTER TABLE pairs ADD COLUMN {column}"))


def _configure_sqlite(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    # An exclusive lock refuses a second owner, and lets WAL work without shared memory.
    for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _refuse_other_content(row: dict, content: str) -> None:
    if row["content_sha256"] != content:
        raise ValueError(f"pair {row['pair_id']} is there with other content: nothing of this call was kept")


def _known(connection: sa.Connection, ids: list[str]) -> dict[str, str]:
    known: dict[str, str] = {}
    for some in _chunks(ids):
        query = sa.select(_PAIRS.c.pair_id, _PAIRS.c.content_sha256).where(_PAIRS.c.pair_id.in_(some))
        known.update((row.pair_id, row.content_sha256) for row in connection.execute(query))
    return known


def _row(pair: Pair) -> dict:
    values = {name: getattr(pair, name) for name in _PAIR_COLUMNS}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{name}={value} of a pair of round {pair.round} (judge {pair.judge!r}) is not finite"
            )
    # The usual weight is no content: a pair that was kept without one is the same pair.
    hashed = {name: value for name, value in values.items() if (name, value) != ("weight", 1.0)}
    content = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    return {"pair_id": pair.pair_id, "content_sha256": content, "created_at": _now(), **values}


def _pair(row: dict) -> Pair:
    """The pair of a snapshot's row; a snapshot without weights has pairs of weight 1."""
    values = {name: row[name] for name in _PAIR_COLUMNS if name in row or name != "weight"}
    texts = {name: row[name] if row[f"{name}_ids"] else "" for name in ("chosen", "rejected")}
    ids = {name: tuple(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return Pair(**{**values, **texts, **ids})


def _parquet(rows: list[dict]) -> bytes:
    """The columns of the public contract, zstd-compressed; equal rows give equal bytes."""
    names = ["pair_id", *_PAIR_COLUMNS, "created_at"]
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


def _chunks(ids: list[str]) -> Iterable[list[str]]:
    return (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))


def _snapshot_file(round_: int) -> str:
    return f"rounds/{round_:05d}/pairs.parquet"


def _manifest_file(round_: int) -> str:
    return f"rounds/{round_:05d}/manifest.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
