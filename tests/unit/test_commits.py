"""Works of many threads share a transaction, and none suffers from another."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

from dpo_ray.buffer.commits import Commits, StoreError
from dpo_ray.buffer.database import open_database

WORDS = sa.Table("words", sa.MetaData(), sa.Column("word", sa.String, primary_key=True))


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    engine = open_database(f"sqlite:///{tmp_path}/words.sqlite")
    WORDS.create(engine)
    return engine


@pytest.fixture
def commits(engine: sa.Engine) -> Iterator[Commits]:
    commits = Commits(engine)
    yield commits
    commits.close()


def keep(connection: sa.Connection, word: str) -> str:
    connection.execute(WORDS.insert().values(word=word))
    return word.upper()


def words(commits: Commits) -> list[str]:
    return sorted(commits.run(lambda connection: connection.execute(sa.select(WORDS.c.word)).scalars().all()))


class Held:
    """Works that wait in the queue behind one that does not end before it is told to."""

    def __init__(self, commits: Commits, waiting: int) -> None:
        self.threads = ThreadPoolExecutor(waiting + 1)
        self._go_on, began = threading.Event(), threading.Event()

        def work(connection: sa.Connection) -> None:
            began.set()
            self._go_on.wait(20)

        self.threads.submit(commits.run, work)
        began.wait(20)
        self._waiting = lambda: len(commits._waiting) == waiting

    def let_go(self) -> None:
        while not self._waiting():
            pass
        self._go_on.set()


def test_works_that_wait_are_committed_together_and_each_gets_its_own_return(
    commits: Commits, engine: sa.Engine
) -> None:
    transactions: list[object] = []
    held = Held(commits, waiting=30)
    event.listen(engine, "commit", transactions.append)
    returned = [held.threads.submit(commits.run, lambda c, n=n: keep(c, f"w{n}")) for n in range(30)]
    held.let_go()
    assert [future.result() for future in returned] == [f"W{number}" for number in range(30)]
    assert len(transactions) == 2
    assert len(words(commits)) == 30


def test_one_that_raises_undoes_itself_alone(commits: Commits) -> None:
    def keep_and_fail(connection: sa.Connection) -> None:
        keep(connection, "bad")
        raise KeyError("no")

    held = Held(commits, waiting=4)
    good = [held.threads.submit(commits.run, lambda c, w=w: keep(c, w)) for w in ("a", "b")]
    bad = held.threads.submit(commits.run, keep_and_fail)
    twice = held.threads.submit(commits.run, lambda c: [keep(c, "same"), keep(c, "same")])
    held.let_go()
    assert [future.result() for future in good] == ["A", "B"]
    with pytest.raises(KeyError, match="no"):
        bad.result()
    with pytest.raises(IntegrityError):
        twice.result()
    assert words(commits) == ["a", "b"]


def test_what_the_database_refuses_does_not_spoil_what_was_committed_with_it(commits: Commits) -> None:
    def ask_for_what_is_not_there(connection: sa.Connection) -> None:
        keep(connection, "bad")
        connection.exec_driver_sql("SELECT * FROM nowhere")

    held = Held(commits, waiting=3)
    good = [held.threads.submit(commits.run, lambda c, w=w: keep(c, w)) for w in ("a", "b")]
    bad = held.threads.submit(commits.run, ask_for_what_is_not_there)
    held.let_go()
    with pytest.raises(StoreError, match=r"kept nothing of this call: no such table: nowhere\. Make room"):
        bad.result()
    assert [future.result() for future in good] == ["A", "B"]
    assert words(commits) == ["a", "b"]


def test_what_waits_is_finished_by_closing_and_nothing_is_taken_afterwards(
    commits: Commits, engine: sa.Engine
) -> None:
    held = Held(commits, waiting=1)
    last = held.threads.submit(commits.run, lambda c: keep(c, "last"))
    held.let_go()
    commits.close()
    assert last.result() == "LAST"
    with pytest.raises(RuntimeError, match="shutdown"):
        commits.run(lambda c: keep(c, "too late"))
    assert words(Commits(engine)) == ["last"]
