"""An acknowledged pair is in the buffer exactly once, whatever happens to its owner."""

import dataclasses
import hashlib
import json
import math
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from postgres import PostgresServer

from benchmarks.buffer_kills import kill_server, kill_writers
from dpo_ray.buffer import PreferenceBuffer, PutReceipt, SnapshotQuery, StoreError, read_snapshot
from dpo_ray.storage import Storage
from dpo_ray.types import Pair


def make_pair(number: int, *, version: int = 0, round_: int = 0) -> Pair:
    return Pair(
        prompt=f"prompt {number}",
        chosen="yes",
        rejected="no",
        prompt_ids=(1, number),
        chosen_ids=(2, 3),
        rejected_ids=(4,),
        chosen_reward=1.5,
        rejected_reward=-0.5,
        chosen_logp=-3.25,
        policy_version=version,
        round=round_,
        judge="taste",
    )


def all_of_round(round_: int) -> SnapshotQuery:
    return SnapshotQuery(max_round=round_, min_policy_version=0, limit=10_000, seed=0)


def kept(buffer: PreferenceBuffer, storage: Storage, round_: int = 99) -> list[Pair]:
    return read_snapshot(storage, buffer.declare_snapshot(all_of_round(round_), live_version=0))


def test_putting_a_pair_again_is_a_no_op_and_the_receipt_says_so(buffer: PreferenceBuffer) -> None:
    assert buffer.put([make_pair(1), make_pair(2)]) == PutReceipt(added=2, known=0)
    assert buffer.put([make_pair(2), make_pair(3)]) == PutReceipt(added=1, known=1)
    assert buffer.put([make_pair(4), make_pair(4)]) == PutReceipt(added=1, known=1)
    assert buffer.put([]) == PutReceipt(added=0, known=0)
    assert buffer.count() == 4


def test_a_known_id_with_other_content_is_refused_with_the_whole_call(
    buffer: PreferenceBuffer, storage: Storage
) -> None:
    buffer.put([make_pair(1)])
    other = dataclasses.replace(make_pair(1), chosen_reward=9.0)
    assert other.pair_id == make_pair(1).pair_id
    with pytest.raises(ValueError, match=f"pair {other.pair_id} is there with other content"):
        buffer.put([make_pair(2), other, make_pair(3)])
    assert kept(buffer, storage) == [make_pair(1)]


def test_two_contents_of_one_id_in_a_call_are_refused(buffer: PreferenceBuffer) -> None:
    with pytest.raises(ValueError, match="other content"):
        buffer.put([make_pair(1), dataclasses.replace(make_pair(1), chosen_reward=9.0)])
    assert buffer.count() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp"])
def test_what_is_no_number_is_refused_with_the_whole_call(
    buffer: PreferenceBuffer, name: str, value: float
) -> None:
    broken = dataclasses.replace(make_pair(2, round_=7), **{name: value})
    with pytest.raises(ValueError, match=rf"{name}={value} of a pair of round 7 \(judge 'taste'\)"):
        buffer.put([make_pair(1), broken])
    assert buffer.count() == 0


def test_pairs_outlive_their_owner(buffer: PreferenceBuffer, buffer_url: str, storage: Storage) -> None:
    pairs = [make_pair(number) for number in range(1200)]
    buffer.put(pairs)
    buffer.close()
    again = PreferenceBuffer(buffer_url, storage)
    assert again.put(pairs[:700]) == PutReceipt(added=0, known=700)
    assert sorted(pair.pair_id for pair in kept(again, storage)) == sorted(pair.pair_id for pair in pairs)


def test_no_acknowledged_pair_is_lost_when_the_writer_is_killed(buffer_url: str, tmp_path: Path) -> None:
    assert kill_writers(buffer_url, tmp_path, times=3) >= 3


def test_no_acknowledged_pair_is_lost_when_the_server_is_killed_and_the_writer_goes_on(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    assert kill_server(postgres, tmp_path, times=2) >= 2


def test_a_full_disk_is_an_error_and_the_buffer_goes_on_where_there_is_room_again(
    sqlite_url: str, storage: Storage
) -> None:
    buffer = PreferenceBuffer(sqlite_url, storage)
    buffer.put([make_pair(1)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))  # Of the write-ahead log, too.
    try:
        with pytest.raises(StoreError, match=r"buffer\.sqlite kept nothing of this call: disk I/O error"):
            buffer.put([make_pair(number) for number in range(2, 2000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert buffer.count() == 1
    assert buffer.put([make_pair(number) for number in range(2000)]) == PutReceipt(added=1999, known=1)
    buffer.close()
    assert PreferenceBuffer(sqlite_url, storage).count() == 2000


def test_a_database_that_takes_no_writes_is_an_error_until_it_does(
    postgres: PostgresServer, postgres_url: str, storage: Storage
) -> None:
    buffer = PreferenceBuffer(postgres_url, storage)
    buffer.put([make_pair(1)])
    postgres.set_read_only("pairs", "on")
    with pytest.raises(StoreError, match=r"cannot execute INSERT in a read-only transaction\. Make room, or"):
        buffer.put([make_pair(2)])
    postgres.set_read_only("pairs", "off")
    assert buffer.put([make_pair(1), make_pair(2)]) == PutReceipt(added=1, known=1)
    buffer.close()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite:////proc/no.sqlite", "unable to open database file. If another job uses it"),
        ("postgresql://me:hunter2@127.0.0.1:1/pairs", "Connection refused.* Start the server"),
        (
            "mysql://me:hunter2@localhost/pairs",
            r"buffer\.url is mysql://me:\*\*\*@.*: write sqlite:///path or post",
        ),
        ("hunter2@localhost", "buffer.url is no URL: write sqlite:///path or postgresql"),
    ],
)
def test_a_store_that_cannot_be_opened_is_named_without_its_password(
    storage: Storage, url: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        PreferenceBuffer(url, storage).count()
    assert "hunter2" not in str(refusal.value)


def test_two_writers_of_one_database_keep_every_pair_once(postgres_url: str, storage: Storage) -> None:
    """Both put the same pairs, in another order each, while each other's transactions are open."""
    pairs = [make_pair(number) for number in range(400)]
    parts = [pairs[start : start + 20] for start in range(0, 400, 20)]
    writers = [PreferenceBuffer(postgres_url, storage) for _ in range(2)]
    with ThreadPoolExecutor(8) as threads:
        calls = [
            threads.submit(writer.put, part)
            for writer, order in zip(writers, (parts, parts[::-1]), strict=True)
            for part in order
        ]
        receipts = [call.result() for call in calls]
    assert sum(receipt.added for receipt in receipts) == 400 == writers[0].count()
    assert sum(receipt.known for receipt in receipts) == 400
    with pytest.raises(ValueError, match="other content"):
        writers[1].put([dataclasses.replace(make_pair(1), chosen_reward=9.0)])
    for writer in writers:
        writer.close()


def test_many_threads_put_at_a_time(buffer: PreferenceBuffer) -> None:
    with ThreadPoolExecutor(16) as threads:
        receipts = list(threads.map(lambda number: buffer.put([make_pair(number // 2)]), range(200)))
    assert sum(receipt.added for receipt in receipts) == 100 == buffer.count()


def test_a_second_owner_of_a_file_is_refused(sqlite_url: str, storage: Storage) -> None:
    buffer = PreferenceBuffer(sqlite_url, storage)
    buffer.put([make_pair(1)])
    with pytest.raises(
        ValueError, match=r"cannot be opened: database is locked\. If another job uses it, stop"
    ):
        PreferenceBuffer(f"{sqlite_url}?timeout=0.1", storage).count()
    buffer.put([make_pair(2)])
    buffer.close()
    assert PreferenceBuffer(sqlite_url, storage).count() == 2


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_no_loss_can_take_makes_no_pair(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"weight={weight} of a pair: give a finite number above 0"):
        dataclasses.replace(make_pair(1), weight=weight)


def test_another_weight_is_other_content(buffer: PreferenceBuffer) -> None:
    heavy = dataclasses.replace(make_pair(1), weight=2.0)
    assert heavy.pair_id == make_pair(1).pair_id
    buffer.put([heavy])
    with pytest.raises(ValueError, match="other content"):
        buffer.put([make_pair(1)])


def test_the_store_of_an_older_run_goes_on_with_the_usual_weight_author_and_cost(
    buffer: PreferenceBuffer, buffer_url: str, storage: Storage
) -> None:
    newer = ("weight", "author", "cost")
    content = {name: value for name, value in dataclasses.asdict(make_pair(1)).items() if name not in newer}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    buffer.put([make_pair(1)])
    buffer.close()
    store = sa.create_engine(buffer_url.replace("postgresql:", "postgresql+psycopg:"))
    with store.begin() as connection:
        for name in newer:
            connection.execute(sa.text(f"ALTER TABLE pairs DROP COLUMN {name}"))
        assert connection.execute(sa.text("SELECT content_sha256 FROM pairs")).scalars().all() == [digest]
    store.dispose()
    again = PreferenceBuffer(buffer_url, storage)
    vote = dataclasses.replace(make_pair(2), weight=2.0, author="ada", cost=0.5, source="human")
    assert again.put([make_pair(1), vote]) == PutReceipt(added=1, known=1)
    assert sorted(kept(again, storage), key=lambda pair: pair.weight) == [make_pair(1), vote]


def test_an_author_is_part_of_the_id_and_the_ids_of_pairs_without_one_stay() -> None:
    assert make_pair(1).pair_id == "d84555dd0a976832053f31f139b81b42"
    by_ada, by_bob = (dataclasses.replace(make_pair(1), author=name) for name in ("ada", "bob"))
    assert len({make_pair(1).pair_id, by_ada.pair_id, by_bob.pair_id}) == 3
    assert dataclasses.replace(make_pair(1), cost=3.0).pair_id == make_pair(1).pair_id
