"""Writers that are killed at random moments, and a look at what the buffer then holds."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dpo_ray.buffer import PreferenceBuffer, StoreError
from dpo_ray.storage import Storage
from dpo_ray.types import Pair
from tests.unit.postgres import PostgresServer

THREADS = 8
PER_PUT = 2
_LONGEST_LIFE_S = 0.15


def numbered_pair(number: int) -> Pair:
    return Pair("prompt", "yes", "no", (1,), (2, number), (3,), judge="kills")


def kill_writers(url: str, folder: Path, *, times: int) -> int:
    """Kill -9 a writing process again and again; how many of its pairs were acknowledged, and kept."""
    acknowledged: list[int] = []
    for life in range(times):
        acknowledged += _numbers_of_one_life(url, folder, life)
    assert acknowledged, "no writer lived long enough to write"
    assert_kept(url, folder, acknowledged)
    return PER_PUT * len(acknowledged)


def kill_server(server: PostgresServer, folder: Path, *, times: int) -> int:
    """Kill -9 PostgreSQL under a writer that goes on when it is back; how many of its pairs were kept."""
    url = server.new_database("server_killed")
    buffer = PreferenceBuffer(url, Storage(str(folder)))
    buffer.count()
    acknowledged: list[int] = []
    for life in range(times):
        stopped = threading.Event()
        threads = _start_writers(buffer, life, acknowledged.append, stopped.is_set)
        before = len(acknowledged)
        while len(acknowledged) == before:
            time.sleep(0.001)
        time.sleep(random.Random(life).uniform(0, _LONGEST_LIFE_S))
        server.kill()
        stopped.set()
        for thread in threads:
            thread.join(60)
        server.start()
    buffer.close()
    assert_kept(url, folder, acknowledged)
    return PER_PUT * len(acknowledged)


def assert_kept(url: str, folder: Path, acknowledged: list[int]) -> None:
    """Each acknowledged put is there whole, each other one whole or not at all, and none twice."""
    buffer = PreferenceBuffer(url, Storage(str(folder)))
    kept = [row["chosen_ids"][1] for row in buffer.rows()]
    buffer.close()
    assert len(kept) == len(set(kept)), "a pair is there twice"
    assert set(acknowledged) <= set(kept), "an acknowledged pair is lost"
    assert all(number + (1 if number % 2 == 0 else -1) in set(kept) for number in kept[:2000]), "half a put"


def _numbers_of_one_life(url: str, folder: Path, life: int) -> list[int]:
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_write, args=(url, folder, life, writer))
    process.start()
    os.close(writer)
    with open(reader, "rb") as acknowledgements:
        said = acknowledgements.read(8)  # The first, or nothing.
        time.sleep(random.Random(life).uniform(0, _LONGEST_LIFE_S))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        said += acknowledgements.read()
    process.join()
    return [int.from_bytes(said[at : at + 8]) for at in range(0, len(said), 8)]


def _write(url: str, folder: Path, life: int, writer: int) -> None:
    buffer = PreferenceBuffer(url, Storage(str(folder)))

    def acknowledge(number: int) -> None:
        os.write(writer, number.to_bytes(8))

    for thread in _start_writers(buffer, life, acknowledge, lambda: False):
        thread.join()


def _start_writers(
    buffer: PreferenceBuffer, life: int, acknowledge: Callable[[int], None], is_over: Callable[[], bool]
) -> list[threading.Thread]:
    def write(thread: int) -> None:
        number = (life * THREADS + thread) * 1_000_000
        while not is_over():
            try:
                buffer.put([numbered_pair(number + place) for place in range(PER_PUT)])
            except StoreError:
                return
            acknowledge(number)
            number += PER_PUT

    threads = [threading.Thread(target=write, args=(thread,), daemon=True) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    return threads
