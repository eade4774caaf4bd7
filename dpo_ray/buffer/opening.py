"""When a store's database is open: while a job holds it, and otherwise only during calls."""

from collections.abc import Callable
from threading import Lock
from typing import TypeVar

import sqlalchemy as sa

from dpo_ray.buffer.commits import Commits
from dpo_ray.buffer.database import open_database

T = TypeVar("T")


class Opening:
    """Whoever else wants to look into an SQLite file can do so while no job runs and nobody votes."""

    def __init__(self, url: str, *, is_held: bool) -> None:
        self._url = url
        self._is_held = is_held
        self._num_calls = 0
        self._commits: Commits | None = None
        self._lock = Lock()

    def run(self, work: Callable[[sa.Connection], T]) -> T:
        """As `Commits.run`. ValueError: the database cannot be opened."""
        with self._lock:
            if self._commits is None:
                self._commits = Commits(open_database(self._url))
            self._num_calls += 1
            commits = self._commits
        try:
            return commits.run(work)
        finally:
            with self._lock:
                self._num_calls -= 1
                self._close_unless_needed()

    def hold(self) -> None:
        """Leave it open from the next call on."""
        self._is_held = True

    def close(self) -> None:
        """Close it, when the calls under way have come to their end."""
        with self._lock:
            self._is_held = False
            self._close_unless_needed()

    def _close_unless_needed(self) -> None:
        if self._commits is not None and not self._is_held and not self._num_calls:
            self._commits.close()
            self._commits = None
