"""An acknowledged pair is in the buffer exactly once, whatever happens to its owner."""

import dataclasses
import hashlib
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from dpo_ray.buffer import PreferenceBuffer, PutReceipt, SnapshotQuery, read_snapshot
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


WRITER = """
import sys
from test_buffer import make_pair
from dpo_ray.buffer import PreferenceBuffer
from dpo_ray.storage import Storage

buffer = PreferenceBuffer(sys.argv[1], Storage("."))
number = 10_000 * int(sys.argv[2])
while True:
    buffer.put([make_pair(number), make_pair(number + 1)])
    print(number, number + 1, flush=True)
    number += 2
"""


def test_no_acknowledged_pair_is_lost_when_the_writer_is_killed(buffer_url: str, storage: Storage) -> None:
    acknowledged: list[int] = []
    for life in range(8):
        command = [sys.executable, "-c", WRITER, buffer_url, str(life)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
        ) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(random.Random(life).uniform(0, 0.02))
            writer.send_signal(signal.SIGKILL)
            lines = [first, *writer.stdout.read().split("\n")]
        # The kill may cut the last acknowledgement short: it then says less, not more.
        acknowledged += [int(number) for line in lines if line.count(" ") for number in line.split()[:1]]
    buffer = PreferenceBuffer(buffer_url, storage)
    ids = [pair.pair_id for pair in kept(buffer, storage)]
    assert len(acknowledged) >= 8
    assert {make_pair(number).pair_id for number in acknowledged} <= set(ids)
    assert len(ids) == len(set(ids)) == buffer.count()
    assert buffer.count() % 2 == 0  # Each call put two pairs or none.


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
