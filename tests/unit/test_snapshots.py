"""A snapshot is declared once, chosen by its query alone, and read by tools that do not know us."""

import dataclasses
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import pandas
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from test_buffer import all_of_round, make_pair

from dpo_ray.buffer import (
    PreferenceBuffer,
    SnapshotQuery,
    read_snapshot,
    read_snapshot_manifest,
    snapshot_query,
)
from dpo_ray.config import BufferConfig
from dpo_ray.node_files import sha256_file
from dpo_ray.storage import Storage
from dpo_ray.types import Message, Pair

COLUMNS = [
    *("pair_id", "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"),
    *("chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp"),
    *("policy_version", "round", "source", "judge", "weight", "author", "cost", "created_at"),
]


PRAISED = dataclasses.replace(make_pair(4), rejected="", rejected_ids=())
BLAMED = dataclasses.replace(make_pair(5), chosen="", chosen_ids=())


def versions_of(pairs: list[Pair]) -> set[int]:
    return {pair.policy_version for pair in pairs}


def test_a_declared_snapshot_stays_as_it_is(buffer: PreferenceBuffer, storage: Storage) -> None:
    buffer.put([make_pair(1), make_pair(2)])
    declared = buffer.declare_snapshot(all_of_round(3), live_version=2)
    content = storage.read_bytes("rounds/00003/pairs.parquet")
    buffer.put([make_pair(3)])
    assert buffer.declare_snapshot(all_of_round(3), live_version=5) == declared
    assert storage.read_bytes("rounds/00003/pairs.parquet") == content
    assert read_snapshot_manifest(storage, 3) == declared
    assert read_snapshot_manifest(storage, 4) is None
    assert declared.rows == 2


def test_a_snapshot_brings_the_pairs_back_whole(buffer: PreferenceBuffer, storage: Storage) -> None:
    pairs = [make_pair(number, version=number % 3, round_=number % 2) for number in range(20)]
    pairs[3:6] = [dataclasses.replace(pairs[3], weight=0.25), PRAISED, BLAMED]
    buffer.put(pairs)
    read = read_snapshot(storage, buffer.declare_snapshot(all_of_round(1), live_version=2))
    assert read == sorted(pairs, key=lambda pair: pair.pair_id)


def test_pairs_of_later_rounds_and_older_policies_are_left_out(
    buffer: PreferenceBuffer, storage: Storage
) -> None:
    buffer.put([make_pair(number, version=number, round_=number) for number in range(6)])
    query = SnapshotQuery(max_round=4, min_policy_version=2, limit=100, seed=0)
    manifest = buffer.declare_snapshot(query, live_version=5)
    assert versions_of(read_snapshot(storage, manifest)) == {2, 3, 4}
    assert manifest.age_mean == pytest.approx((3 + 2 + 1) / 3)
    assert manifest.query == query


def test_more_pairs_than_the_limit_are_drawn_from_all_rounds_by_the_seed(tmp_path: Path) -> None:
    def drawn(seed: int, numbers: list[int], folder: str) -> list[Pair]:
        own = Storage(str(tmp_path / folder))
        owner = PreferenceBuffer(f"sqlite:///{tmp_path / folder}.sqlite", own)
        owner.put([make_pair(number, version=number % 4, round_=number % 4) for number in numbers])
        query = SnapshotQuery(max_round=3, min_policy_version=0, limit=30, seed=seed)
        return read_snapshot(own, owner.declare_snapshot(query, live_version=3))

    numbers = list(range(200))
    first = drawn(0, numbers, "first")
    assert len({pair.pair_id for pair in first}) == 30
    assert versions_of(first) == {0, 1, 2, 3}
    assert drawn(0, numbers[::-1], "other order") == first
    assert drawn(1, numbers, "other seed") != first


def test_a_snapshot_keeps_the_bounds_of_the_settings_and_counts_its_sources(
    buffer: PreferenceBuffer, storage: Storage
) -> None:
    votes = [
        dataclasses.replace(make_pair(number), source="human", author="ada" if number < 90 else "bob")
        for number in range(100)
    ]
    judged = [make_pair(number % 10, version=number // 10) for number in range(100)]
    buffer.put([*votes, *judged])
    config = BufferConfig(
        pairs_per_round=60,
        mix={"human": 2, "judge": 1},
        max_author_share=0.5,
        max_pairs_per_prompt=2,
        max_age=4,
    )
    query = snapshot_query(config, round_=0, live_version=9, seed=1)
    assert query.min_policy_version == 5
    everything = query.model_copy(update={"min_policy_version": 0})
    manifest = buffer.declare_snapshot(everything, live_version=9)
    pairs = read_snapshot(storage, manifest)
    # Of 40 places for votes, ada may fill 20 and bob has 10 votes; 10 prompts leave 20 places to the judge.
    assert Counter(pair.author for pair in pairs)["ada"] <= 20
    assert max(Counter(pair.prompt_ids for pair in pairs).values()) <= 2
    assert manifest.sources == Counter(pair.source for pair in pairs)
    assert read_snapshot_manifest(storage, 0) == manifest


def test_pairs_older_than_the_retention_are_deleted_once_the_snapshot_is_there(
    buffer: PreferenceBuffer, storage: Storage
) -> None:
    buffer.put([make_pair(number, round_=number) for number in range(6)])
    manifest = buffer.declare_snapshot(all_of_round(4), live_version=0, retention_rounds=1)
    assert [row["round"] for row in sorted(buffer.rows(), key=lambda row: row["round"])] == [3, 4, 5]
    assert len(read_snapshot(storage, manifest)) == 5
    buffer.put([make_pair(0)])  # As where the job dies in between, and declares again.
    assert buffer.declare_snapshot(all_of_round(4), live_version=0, retention_rounds=1) == manifest
    assert buffer.count() == 3


def test_a_snapshot_of_nothing_has_no_rows(buffer: PreferenceBuffer, storage: Storage) -> None:
    manifest = buffer.declare_snapshot(all_of_round(0), live_version=0)
    assert (manifest.rows, manifest.age_mean) == (0, 0.0)
    assert read_snapshot(storage, manifest) == []


def test_the_manifest_holds_rows_hash_and_query(
    buffer: PreferenceBuffer, storage: Storage, tmp_path: Path
) -> None:
    buffer.put([make_pair(1), make_pair(2)])
    buffer.declare_snapshot(all_of_round(0), live_version=0)
    manifest = json.loads(storage.read_text("rounds/00000/manifest.json"))
    assert manifest["rows"] == 2
    assert manifest["sha256"] == sha256_file(tmp_path / "rounds/00000/pairs.parquet")
    assert SnapshotQuery(**manifest["query"]) == all_of_round(0)


def test_a_changed_file_is_refused(buffer: PreferenceBuffer, storage: Storage) -> None:
    buffer.put([make_pair(1)])
    manifest = buffer.declare_snapshot(all_of_round(0), live_version=0)
    content = bytearray(storage.read_bytes("rounds/00000/pairs.parquet"))
    content[len(content) // 2] ^= 1
    storage.write_bytes("rounds/00000/pairs.parquet", bytes(content))
    with pytest.raises(ValueError, match=r"rounds/00000/pairs\.parquet is not the snapshot"):
        read_snapshot(storage, manifest)


def test_other_tools_read_the_columns_of_the_contract(
    buffer: PreferenceBuffer, storage: Storage, tmp_path: Path
) -> None:
    pair = make_pair(1)
    buffer.put([pair])
    buffer.declare_snapshot(all_of_round(0), live_version=0)
    file = str(tmp_path / "rounds/00000/pairs.parquet")
    assert pq.read_schema(file).names == COLUMNS
    frame = pandas.read_parquet(file)
    dataset = load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    for row in (frame.to_dict("records")[0], dataset[0]):
        assert row["pair_id"] == pair.pair_id
        assert (row["prompt"], row["chosen"], row["rejected"]) == ("prompt 1", "yes", "no")
        assert tuple(row["prompt_ids"]) == (1, 1)
        assert (row["chosen_reward"], row["rejected_reward"], row["chosen_logp"]) == (1.5, -0.5, -3.25)
        assert row["rejected_logp"] is None or row["rejected_logp"] != row["rejected_logp"]


def test_conversations_are_message_lists_and_plain_pairs_among_them_become_such(
    buffer: PreferenceBuffer, storage: Storage
) -> None:
    question: list[Message] = [{"role": "user", "content": "Q"}]
    yes: list[Message] = [{"role": "assistant", "content": "yes"}]
    no: list[Message] = [{"role": "assistant", "content": "no"}]
    talk = dataclasses.replace(make_pair(1), prompt=question, chosen=yes, rejected=no)
    buffer.put([talk, make_pair(2)])
    manifest = buffer.declare_snapshot(all_of_round(0), live_version=0)
    table = pq.read_table(io.BytesIO(storage.read_bytes("rounds/00000/pairs.parquet")))
    prompts = [row["prompt"] for row in table.to_pylist()]
    assert question in prompts
    assert [{"role": "user", "content": "prompt 2"}] in prompts
    assert all(row["chosen"] == yes and row["rejected"] == no for row in table.to_pylist())
    assert {pair.pair_id for pair in read_snapshot(storage, manifest)} == {
        talk.pair_id,
        make_pair(2).pair_id,
    }


def test_conversations_of_which_one_side_is_missing_come_back_whole(
    buffer: PreferenceBuffer, storage: Storage
) -> None:
    question: list[Message] = [{"role": "user", "content": "Q"}]
    yes: list[Message] = [{"role": "assistant", "content": "yes"}]
    praised = dataclasses.replace(PRAISED, prompt=question, chosen=yes)
    blamed = dataclasses.replace(BLAMED, prompt=question, rejected=yes)
    buffer.put([praised, blamed])
    manifest = buffer.declare_snapshot(all_of_round(0), live_version=0)
    assert sorted(read_snapshot(storage, manifest), key=lambda pair: pair.chosen_ids) == [blamed, praised]
    table = pq.read_table(io.BytesIO(storage.read_bytes("rounds/00000/pairs.parquet")))
    assert sorted(table["chosen"].to_pylist(), key=len) == [[], yes]
    buffer.put([dataclasses.replace(praised, policy_version=5)])
    only_praised = SnapshotQuery(max_round=1, min_policy_version=5, limit=9, seed=0)
    buffer.declare_snapshot(only_praised, live_version=5)
    table = pq.read_table(io.BytesIO(storage.read_bytes("rounds/00001/pairs.parquet")))
    assert table["rejected"].to_pylist() == [[]]
    assert table.schema.field("chosen").type == table.schema.field("rejected").type


def test_a_snapshot_without_weights_has_pairs_of_weight_one(
    buffer: PreferenceBuffer, storage: Storage
) -> None:
    buffer.put([dataclasses.replace(make_pair(1), weight=3.0)])
    manifest = buffer.declare_snapshot(all_of_round(0), live_version=0)
    table = pq.read_table(io.BytesIO(storage.read_bytes("rounds/00000/pairs.parquet")))
    without = io.BytesIO()
    pq.write_table(table.drop_columns(["weight"]), without)
    storage.write_bytes("rounds/00000/pairs.parquet", without.getvalue())
    digest = hashlib.sha256(without.getvalue()).hexdigest()
    assert read_snapshot(storage, manifest.model_copy(update={"sha256": digest})) == [make_pair(1)]
