"""The database of a run's preferences: its tables, and how it is opened by its one owner."""

from collections.abc import Iterable
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from dpo_ray.storage import Storage

METADATA = sa.MetaData()
_CHUNK = 500
PAIRS = sa.Table(
    "pairs",
    METADATA,
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
    sa.Column("author", sa.String, nullable=False, server_default=""),
    sa.Column("cost", sa.Double, nullable=False, server_default="0"),
    sa.Column("created_at", sa.String, nullable=False),
)
PAIR_COLUMNS = [c.name for c in PAIRS.columns if c.name not in ("pair_id", "content_sha256", "created_at")]


def default_url(storage: Storage) -> str:
    """buffer.sqlite in the run's folder; ValueError where that is no local folder."""
    if storage.local_root is None:
        raise ValueError(
            f"the run's folder {storage.root} is a URL, and SQLite needs a path: "
            "set --buffer.url to a database that the job reaches (postgresql://…)"
        )
    return f"sqlite:///{storage.local_root}/buffer.sqlite"


def open_database(url: str) -> sa.Engine:
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
        METADATA.create_all(engine)
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


def chunks(ids: list[str]) -> Iterable[list[str]]:
    """Parts that fit one SQL statement."""
    return (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))


def now() -> str:
    """UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
