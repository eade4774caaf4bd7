"""How fast the preference buffer keeps pairs, and that it keeps them when it is killed.

`python benchmarks/buffer.py speed` prints a table; `python benchmarks/buffer.py kill --times 100` kills.
"""

import argparse
import json
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.buffer_kills import kill_server, kill_writers
from dpo_ray.buffer import PreferenceBuffer
from dpo_ray.storage import Storage
from dpo_ray.types import Pair
from tests.unit.postgres import PostgresServer

BATCH = 256
THREADS = 64
Measured = dict[str, list[float]]
"""Rates of all repetitions, by what was measured."""


def realistic_pair(number: int) -> Pair:
    """60 token ids and 300 characters on each side."""
    drawn = random.Random(number)

    def ids() -> tuple[int, ...]:
        return tuple(drawn.randrange(150_000) for _ in range(60))

    def text() -> str:
        return "".join(drawn.choices("abcdefgh ", k=300))

    return Pair(
        prompt=text(),
        chosen=text(),
        rejected=text(),
        prompt_ids=ids(),
        chosen_ids=ids(),
        rejected_ids=ids(),
        chosen_reward=drawn.random(),
        rejected_reward=-drawn.random(),
        chosen_logp=-100 * drawn.random(),
        rejected_logp=-100 * drawn.random(),
        judge="benchmark",
    )


def batches(buffer: PreferenceBuffer, pairs: list[Pair]) -> float:
    """Pairs per second, put by one caller, BATCH at a time."""
    began = time.perf_counter()
    for start in range(0, len(pairs), BATCH):
        buffer.put(pairs[start : start + BATCH])
    return len(pairs) / (time.perf_counter() - began)


def singles(buffer: PreferenceBuffer, pairs: list[Pair]) -> float:
    """Acknowledged puts per second, one pair each, of THREADS callers."""
    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as callers:
        list(callers.map(lambda pair: buffer.put([pair]), pairs))
    return len(pairs) / (time.perf_counter() - began)


def syncs(folder: Path, *, times: int = 100) -> float:
    """fsyncs per second of 4 KiB appended to a file: what one commit cannot beat."""
    with open(folder / "synced", "wb", buffering=0) as file:
        began = time.perf_counter()
        for _ in range(times):
            file.write(bytes(4096))
            os.fsync(file.fileno())
        return times / (time.perf_counter() - began)


def bare_rows(folder: Path, pairs: list[Pair]) -> float:
    """Rows per second of SQLite itself, BATCH in a durable transaction: text that is JSON already."""
    rows = [
        (str(n), json.dumps([p.prompt, *p.prompt_ids, p.chosen, p.rejected])) for n, p in enumerate(pairs)
    ]
    store = sqlite3.connect(folder / f"bare{time.monotonic_ns()}.sqlite", isolation_level=None)
    store.execute("PRAGMA journal_mode=WAL")
    store.execute("PRAGMA synchronous=FULL")
    store.execute("CREATE TABLE pairs (pair_id TEXT PRIMARY KEY, content TEXT)")
    began = time.perf_counter()
    for start in range(0, len(rows), BATCH):
        store.execute("BEGIN")
        store.executemany("INSERT INTO pairs VALUES (?, ?)", rows[start : start + BATCH])
        store.execute("COMMIT")
    elapsed = time.perf_counter() - began
    store.close()
    return len(rows) / elapsed


def speed(server: PostgresServer, folder: Path, *, repetitions: int) -> Measured:
    """All measurements in turn, so that a busy moment of the machine falls on each of them."""
    pairs = [realistic_pair(number) for number in range(4096)]
    measured: Measured = {}

    def note(name: str, rate: Callable[[], float]) -> None:
        measured.setdefault(name, []).append(rate())

    for repetition in range(repetitions):
        note("fsync of 4 KiB", lambda: syncs(folder))
        note(f"SQLite's own executemany, {BATCH} rows a transaction", lambda: bare_rows(folder, pairs))
        sqlite_url = f"sqlite:///{folder}/speed{repetition}.sqlite"
        postgres_url = server.new_database(f"speed{repetition}")
        for name, url in (("SQLite", sqlite_url), ("PostgreSQL", postgres_url)):
            with opened(url, folder) as buffer:
                note(f"{name}: pairs, {BATCH} a put", lambda: batches(buffer, pairs[:3072]))
                note(f"{name}: single puts of {THREADS} threads", lambda: singles(buffer, pairs[3072:]))
    return measured


@contextmanager
def opened(url: str, folder: Path) -> Iterator[PreferenceBuffer]:
    buffer = PreferenceBuffer(url, Storage(str(folder)))
    buffer.count()
    try:
        yield buffer
    finally:
        buffer.close()


def as_markdown(measured: Measured) -> str:
    lines = ["| what | per second, median | lowest | highest |", "|---|--:|--:|--:|"]
    for name, rates in measured.items():
        numbers = (statistics.median(rates), min(rates), max(rates))
        lines.append(f"| {name} | " + " | ".join(f"{number:,.0f}" for number in numbers) + " |")
    return "\n".join(lines)


def kill(server: PostgresServer, folder: Path, *, times: int) -> str:
    """Kill writers of both databases, and one server a few times; AssertionError where a pair is lost."""
    sqlite_url, postgres_url = f"sqlite:///{folder}/killed.sqlite", server.new_database("killed")
    lines = ["| killed | times | pairs acknowledged | lost | twice |", "|---|--:|--:|--:|--:|"]
    for name, url in (("writer of SQLite", sqlite_url), ("writer of PostgreSQL", postgres_url)):
        lines.append(f"| {name} | {times} | {kill_writers(url, folder, times=times)} | 0 | 0 |")
    times = max(1, times // 10)
    lines.append(f"| PostgreSQL's server | {times} | {kill_server(server, folder, times=times)} | 0 | 0 |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("speed", "kill"))
    parser.add_argument(
        "--times", type=int, default=5, help="Repetitions, or kills of each database's writer."
    )
    parser.add_argument("--folder", type=Path, help="On the disk that is measured; unset: a temporary one.")
    parsed = parser.parse_args(arguments)
    server = PostgresServer()
    try:
        with tempfile.TemporaryDirectory(dir=parsed.folder) as name:
            if parsed.what == "speed":
                print(as_markdown(speed(server, Path(name), repetitions=parsed.times)))
            else:
                print(kill(server, Path(name), times=parsed.times))
    finally:
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
