"""What the judges of a run have used up, and whether there is room for another call."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from dpo_ray.config import BudgetConfig
from dpo_ray.storage import Storage


@dataclass(frozen=True, slots=True)
class Usage:
    """What calls use up."""

    calls: int = 0
    tokens: int = 0
    money: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.calls + other.calls, self.tokens + other.tokens, self.money + other.money)

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(self.calls - other.calls, self.tokens - other.tokens, self.money - other.money)


class BudgetSpentError(Exception):
    """No room for a call."""


class Spending:
    """One judge actor's share of the budget, and what of it is used; threads may share it.

    A call is counted with the most that it can use before it is made, in the run's folder too, and with
    what it did use afterwards: no crash makes room that is not there.
    """

    def __init__(
        self, budget: BudgetConfig, storage: Storage | None = None, *, place: int = 0, actors: int = 1
    ):
        self._is_bounded = budget.is_bounded
        self._share = {
            name: _share(getattr(budget, name), place, actors) for name in ("calls", "tokens", "money")
        }
        self._storage = storage
        self._file = f"judge/used_{place:02d}.json"
        self._calls_in_flight = 0
        self._changed = threading.Condition()
        self.used = self._read()

    @contextmanager
    def call(self, most: Usage) -> Iterator["Call"]:
        """Room for one call that uses at most this; BudgetSpentError where there is none."""
        call = Call(most)
        self._enter(most)
        try:
            yield call
        finally:
            self._leave(most, call.used)

    def _enter(self, most: Usage) -> None:
        with self._changed:
            # Calls in flight may use less than they could.
            self._changed.wait_for(lambda: self._has_room(most) or not self._calls_in_flight)
            if not self._has_room(most):
                raise BudgetSpentError
            self._keep(self.used + most)
            self._calls_in_flight += 1

    def _leave(self, most: Usage, used: Usage) -> None:
        with self._changed:
            self._calls_in_flight -= 1
            self._keep(self.used - most + used)
            self._changed.notify_all()

    def _has_room(self, most: Usage) -> bool:
        after = asdict(self.used + most)
        return all(share is None or after[name] <= share for name, share in self._share.items())

    def _keep(self, used: Usage) -> None:
        self.used = used
        if self._storage is not None and self._is_bounded:
            self._storage.write_text(self._file, json.dumps(asdict(used)))

    def _read(self) -> Usage:
        if self._storage is None or not self._storage.exists(self._file):
            return Usage()
        return Usage(**json.loads(self._storage.read_text(self._file)))


class Call:
    """One call: it used the most that it can, until it is known what it did use."""

    def __init__(self, most: Usage) -> None:
        self.used = most


def _share(bound: float | None, place: int, actors: int) -> float | None:
    """Of whole numbers whole ones: all shares together are the bound."""
    if bound is None:
        return None
    if isinstance(bound, int):
        return bound * (place + 1) // actors - bound * place // actors
    return bound / actors
