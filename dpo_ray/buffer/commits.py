"""Group commit: what many threads write at a time becomes durable in one transaction of one thread."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError

T = TypeVar("T")
_DATABASE_FAILED = (OperationalError, InternalError)
"""No room, no right to write, no connection, a deadlock: the whole transaction may be gone."""


class StoreError(ValueError):
    """The database kept nothing of a call: its disk is full or read-only, or it cannot be reached."""


class Commits:
    """The only user of a store's engine: one connection at a time, and one fsync for all who wait."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._waiting: deque[_Task] = deque()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commits")

    def run(self, work: Callable[[sa.Connection], T]) -> T:
        """What `work` returns, once its effect is durable.

        An error that it raises undoes its own effect alone. Where others spoil the transaction, it is run
        again by itself. StoreError: the database failed; run again what need not have happened.
        """
        task = _Task(work, Future())
        self._waiting.append(task)
        self._writer.submit(self._commit_waiting)
        return task.outcome.result()

    def close(self) -> None:
        """Finish what waits, and let go of the database."""
        self._writer.shutdown()
        self._engine.dispose()

    def _commit_waiting(self) -> None:
        """One of many calls takes all that waits, and the others find nothing."""
        group = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if group:
            self._commit(group)

    def _commit(self, group: list["_Task"]) -> None:
        try:
            with self._engine.begin() as connection:
                settle = [_attempt(task, connection) for task in group]
        except _DATABASE_FAILED as error:
            self._commit_apart(group, error)
        except BaseException as error:
            for task in group:
                task.outcome.set_exception(error)
        else:
            for settle_one in settle:
                settle_one()

    def _commit_apart(self, group: list["_Task"], error: DBAPIError) -> None:
        """A small work may find the room that a large one did not, and does not die of another's deadlock."""
        if len(group) > 1:
            for task in group:
                self._commit([task])
        else:
            group[0].outcome.set_exception(
                StoreError(
                    f"the preference buffer {self._engine.url!r} kept nothing of this call: {error.orig}. "
                    "Make room, or bring the database back, and repeat the call"
                )
            )


class _Task(NamedTuple):
    work: Callable[[sa.Connection], Any]
    outcome: Future


def _attempt(task: _Task, connection: sa.Connection) -> Callable[[], None]:
    """Do the work within the transaction; the call that tells its caller how that went, after the commit."""
    try:
        with connection.begin_nested():
            returned = task.work(connection)
    except _DATABASE_FAILED:
        raise
    except Exception as error:
        return partial(task.outcome.set_exception, error)
    return partial(task.outcome.set_result, returned)
