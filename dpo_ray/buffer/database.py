"""The database of a run's preferences: its tables, and how it is opened by its one owner."""

from collections.abc import Iterable
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.schema import CreateColumn

from dpo_ray.storage import Storage

METADATA = sa.MetaData()
PAIR_ID_LENGTH = 32
_CHUNK = 500
_REMEDY = {
    "sqlite": "If another job uses it, stop that job or set another run_dir or buffer.url",
    "postgresql": "Start the server, or set another buffer.url; a password may be in PGPASSWORD or ~/.pgpass",
}
PAIRS = sa.Table(
    "pairs",
    METADATA,
    sa.Column("pair_id", sa.String(PAIR_ID_LENGTH), primary_key=True),
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
    """The store at a URL, with all tables and columns; ValueError where it cannot be opened."""
    engine = _engine(_known_url(url))
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                # Of several that open it at once, one makes the tables.
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('dpo_ray tables'))"))
            METADATA.create_all(connection)
            _add_missing_columns(connection)
    except DBAPIError as error:
        engine.dispose()
        raise ValueError(
            f"the preference buffer {engine.url!r} cannot be opened: {' '.join(str(error.orig).split())}. "
            f"{_REMEDY[engine.dialect.name]}."
        ) from None
    return engine


def _known_url(url: str) -> sa.URL:
    """As people write it, to the driver that is installed."""
    try:
        parsed = sa.make_url(url)
    except ArgumentError:  # Its text may hold a password.
        raise ValueError(
            "buffer.url is no URL: write sqlite:///path or postgresql://user@host/name"
        ) from None
    if parsed.get_backend_name() in ("postgres", "postgresql"):
        query = dict(parsed.query)
        password = query.pop("password", parsed.password)
        return sa.URL.create(
            "postgresql+psycopg",
            username=parsed.username,
            # A run's folder has *** in its place: libpq then looks into PGPASSWORD and ~/.pgpass.
            password=None if password == "***" else str(password or "") or None,
            host=parsed.host,
            port=parsed.port,
            database=parsed.database,
            query=query,
        )
    if parsed.get_backend_name() != "sqlite":
        raise ValueError(f"buffer.url is {parsed!r}: write sqlite:///path or postgresql://user@host/name")
    return parsed


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    # One connection for the life of the owner; the timeout waits for a dying owner to let go.
    wait = {} if "timeout" in url.query else {"timeout": 20}
    engine = sa.create_engine(
        url,
        poolclass=sa.StaticPool,
        connect_args={**wait, "check_same_thread": False, "isolation_level": None},
    )
    event.listen(engine, "connect", _configure_sqlite)
    # Python's driver begins transactions late, and savepoints never.
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def _configure_sqlite(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    # An exclusive lock refuses a second owner, and lets WAL work without shared memory.
    # What is deleted is overwritten: it may be a person's.
    for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _add_missing_columns(connection: sa.Connection) -> None:
    """Give the tables of an older run the columns that came later, with their defaults."""
    inspector = sa.inspect(connection)
    for table in METADATA.sorted_tables:
        present = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in present:
                definition = CreateColumn(column).compile(dialect=connection.dialect)
                connection.execute(sa.text(f"ALTER TABLE {table.name} ADD COLUMN {definition}"))


def chunks(ids: list[str]) -> Iterable[list[str]]:
    """Parts that fit one SQL statement."""
    return (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))


def now() -> str:
    """UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
