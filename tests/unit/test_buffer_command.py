"""What a person can ask of a run's preferences, and that a person can be forgotten."""

import dataclasses
import json
import re
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from safetensors.torch import save_file
from test_buffer import all_of_round, make_pair

from dpo_ray.buffer import PreferenceBuffer, SnapshotQuery
from dpo_ray.buffer.__main__ import main
from dpo_ray.buffer.lineage import pairs_of_version, versions_that_saw
from dpo_ray.config import BufferConfig
from dpo_ray.registry import PolicyManifest, PolicyRegistry, SnapshotRef
from dpo_ray.storage import Storage
from dpo_ray.types import Message

VOTE = dataclasses.replace(make_pair(5, round_=1), source="human", author="ada", judge="", cost=0.25)
PRAISE = dataclasses.replace(
    make_pair(6, round_=1), source="human", author="bob", rejected="", rejected_ids=()
)


def publish(storage: Storage, version: int, parent: int | None, snapshot: SnapshotRef | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file({"weights": torch.zeros(1)}, Path(folder) / "model.safetensors")
        manifest = PolicyManifest(version=version, parent=parent, snapshot=snapshot)
        PolicyRegistry(storage).publish(Path(folder), manifest)


@pytest.fixture
def run(storage: Storage, tmp_path: Path) -> Storage:
    """Versions 1 of round 0, 2 of round 1, and 3 of round 2 but from version 1: version 2 was refused."""
    storage.write_text("config.yaml", "buffer: {url: null}\n")
    buffer = PreferenceBuffer(f"sqlite:///{tmp_path}/buffer.sqlite", storage)
    publish(storage, 0, None, None)
    for round_, pairs in enumerate([[make_pair(1), make_pair(2)], [VOTE, PRAISE], [make_pair(9, round_=2)]]):
        buffer.put(pairs)
        declared = buffer.declare_snapshot(all_of_round(round_), live_version=0)
        reference = SnapshotRef(round=round_, rows=declared.rows, sha256=declared.sha256)
        publish(storage, round_ + 1, {1: 0, 2: 1, 3: 1}[round_ + 1], reference)
    PolicyRegistry(storage).promote(3)
    buffer.close()
    return storage


def said(*arguments: str, run: Storage) -> str:
    text = StringIO()
    main([*arguments, "--run_dir", run.root], Console(file=text, width=80, highlight=False))
    assert all(len(line) <= 80 for line in text.getvalue().splitlines() if "/" not in line)
    return text.getvalue()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, run: Storage) -> str:
    with pytest.raises(SystemExit, match="2"):
        said(*arguments, run=run)
    return capsys.readouterr().err


def exported(folder: str, tmp_path: Path) -> list[dict[str, Any]]:
    rows = load_dataset(folder, split="train", cache_dir=str(tmp_path / "cache"))
    return cast(Dataset, rows).to_list()


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_a_versions_pairs_are_those_of_the_snapshots_of_its_line(run: Storage) -> None:
    first, second = {make_pair(1).pair_id, make_pair(2).pair_id}, {VOTE.pair_id, PRAISE.pair_id}
    assert pairs_of_version(run, 0) == {}
    assert pairs_of_version(run, 2) == {0: first, 1: first | second}
    assert pairs_of_version(run, 3) == {0: first, 2: first | second | {make_pair(9, round_=2).pair_id}}
    assert cells(said("trace", "3", run=run))[4:8:3] == [["0", "2", "2"], ["all", "5"]]
    assert said("trace", "1", "--ids", run=run).split() == sorted(first)


def test_versions_saw_a_pair_in_their_own_round_or_by_their_line(run: Storage) -> None:
    pair_id = make_pair(1).pair_id
    uses = versions_that_saw(run, [pair_id])
    assert [(use.version, len(use.own), len(use.inherited)) for use in uses] == [
        (1, 1, 0),
        (2, 1, 1),
        (3, 1, 1),
    ]
    by_votes = [(use.version, len(use.own)) for use in versions_that_saw(run, [VOTE.pair_id, PRAISE.pair_id])]
    assert by_votes == [(2, 2), (3, 2)]
    assert ["3", "1", "1", "live"] in cells(said("versions", pair_id[:12], run=run))
    assert "No version was trained" in said("versions", "0" * 32, run=run)


def test_a_grandchild_has_seen_what_its_parent_was_not_trained_on(storage: Storage, tmp_path: Path) -> None:
    publish(storage, 0, None, None)
    with PreferenceBufferOf(tmp_path) as buffer:
        for round_ in range(3):
            buffer.put([make_pair(round_, version=round_, round_=round_)])
            newest = SnapshotQuery(max_round=round_, min_policy_version=round_, limit=9, seed=0)
            declared = buffer.declare_snapshot(newest, live_version=round_)
            reference = SnapshotRef(round=round_, rows=declared.rows, sha256=declared.sha256)
            publish(storage, round_ + 1, round_, reference)
    uses = versions_that_saw(storage, [make_pair(0).pair_id])
    assert [(use.version, len(use.own), len(use.inherited)) for use in uses] == [
        (1, 1, 0),
        (2, 0, 1),
        (3, 0, 1),
    ]


def test_a_snapshot_that_was_changed_says_nothing_of_lineage(run: Storage) -> None:
    run.write_bytes("rounds/00001/pairs.parquet", run.read_bytes("rounds/00000/pairs.parquet"))
    with pytest.raises(ValueError, match=r"rounds/00001/pairs\.parquet .* is missing or not what was"):
        pairs_of_version(run, 2)
    assert len(pairs_of_version(run, 1)) == 1


def test_a_forgotten_person_is_gone_for_good_and_the_report_can_be_repeated(
    run: Storage, tmp_path: Path
) -> None:
    for _ in range(2):
        report = said("forget", "--author", "ada", run=run)
        assert "1 pairs of ada are deleted" in report
        assert [row[:2] for row in cells(report) if row and row[0].isdigit()][-2:] == [["2", "1"], ["3", "1"]]
    with PreferenceBufferOf(tmp_path) as buffer:
        assert buffer.put([VOTE, PRAISE]).added == 0
        assert {row["author"] for row in buffer.rows()} == {"", "bob"}
    content = b"".join(file.read_bytes() for file in tmp_path.glob("buffer.sqlite*"))
    assert b"ada" not in content and VOTE.pair_id.encode() in content
    assert "0 pairs of eve are deleted" in said("forget", "--author", "eve", run=run)


class PreferenceBufferOf:
    """The run's buffer, let go of at the end."""

    def __init__(self, folder: Path) -> None:
        self._buffer = PreferenceBuffer(f"sqlite:///{folder}/buffer.sqlite", Storage(str(folder)))

    def __enter__(self) -> PreferenceBuffer:
        return self._buffer

    def __exit__(self, *_: object) -> None:
        self._buffer.close()


def test_stats_count_pairs_people_and_money_of_each_source(run: Storage) -> None:
    lines = [row[:5] for row in cells(said("stats", run=run)) if row]
    assert lines[2:4] == [["human", "2", "2", "1", "0"], ["judge", "3", "0", "0–2", "0"]]
    assert lines[-1] == ["all", "5", "0.25"]


def test_show_tells_all_of_a_pair(run: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    shown = cells(said("show", VOTE.pair_id, run=run))
    assert ["author", "ada"] in shown and ["chosen_ids", "2", "tokens"] in shown
    assert "5 pairs have an id that begins with ''" in refused(capsys, "show", "", run=run)


def test_an_export_is_a_data_set_in_trls_columns(run: Storage, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert "3 pairs in" in said("export", out, "--source", "judge", run=run)
    assert "4 pairs in" in said("export", out, run=run)
    rows = exported(out, tmp_path)
    assert {"prompt", "chosen", "rejected"} <= set(rows[0])
    assert not {"prompt_ids", "chosen_ids", "rejected_ids", "author"} & set(rows[0])
    assert {row["prompt"] for row in rows} == {f"prompt {number}" for number in (1, 2, 5, 9)}
    assert {(row["chosen"], row["rejected"]) for row in rows} == {("yes", "no")}


def test_conversations_are_exported_as_message_lists(run: Storage, tmp_path: Path) -> None:
    question: list[Message] = [{"role": "user", "content": "Q"}]
    yes: list[Message] = [{"role": "assistant", "content": "yes"}]
    no: list[Message] = [{"role": "assistant", "content": "no"}]
    with PreferenceBufferOf(tmp_path) as buffer:
        buffer.put([dataclasses.replace(make_pair(7), prompt=question, chosen=yes, rejected=no)])
    out = str(tmp_path / "out")
    said("export", out, run=run)
    rows = exported(out, tmp_path)
    prompts = [row["prompt"] for row in rows]
    assert question in prompts and [{"role": "user", "content": "prompt 1"}] in prompts
    assert all(row["chosen"] == yes and row["rejected"] == no for row in rows)


def test_rows_of_a_file_and_of_an_export_are_added_once(
    tmp_path: Path, storage: Storage, tiny_model: Path
) -> None:
    PolicyRegistry(storage).publish(tiny_model, PolicyManifest(version=0))
    storage.write_text("config.yaml", "buffer: {url: null}\n")
    with PreferenceBufferOf(tmp_path) as buffer:
        buffer.count()
    row = {"prompt": "the film", "chosen": " is great .", "rejected": " is lazy ."}
    rows = [row, row, {**row, "chosen": " "}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    file = str(tmp_path / "rows.jsonl")
    assert said("import", file, run=storage) == "1 pairs added, 1 known; dropped: 1 empty\n"
    assert said("import", file, run=storage) == "0 pairs added, 2 known; dropped: 1 empty\n"
    said("export", str(tmp_path / "out"), run=storage)
    assert said("import", str(tmp_path / "out"), run=storage) == "0 pairs added, 1 known; dropped: none\n"
    with PreferenceBufferOf(tmp_path) as buffer:
        assert [(found["source"], found["prompt"]) for found in buffer.rows()] == [("file", "the film")]


def test_rounds_and_single_answers_are_left_out_of_an_export(
    run: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert "1 pairs" in (text := said("export", out, "--first_round", "1", "--last_round", "1", run=run))
    assert "left out: 1 single answers" in text
    assert "none of 0 rows is a pair" in refused(capsys, "export", out, "--source", "rule", run=run)


def test_a_running_job_is_named_where_it_holds_the_file(
    run: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with PreferenceBufferOf(tmp_path) as buffer:
        buffer.count()
        message = refused(capsys, "stats", run=run)
        assert re.search(r"cannot be opened: database is locked\. If another job uses it, stop", message)
        assert "What made version 3" in said("trace", "3", run=run)  # Files alone say it.


def test_no_buffer_is_made_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = Storage(str(tmp_path / "nowhere"))
    assert "nowhere holds no run" in refused(capsys, "stats", run=empty)
    empty.write_text("config.yaml", json.dumps({"buffer": {"url": None}}))
    assert "there is no buffer" in refused(capsys, "stats", run=empty)
    assert not (tmp_path / "nowhere/buffer.sqlite").exists()


def test_the_runs_own_database_is_asked_and_its_password_is_in_no_file(
    postgres_url: str, storage: Storage
) -> None:
    written = BufferConfig(url=postgres_url.replace("postgres@", "postgres:hunter2@")).model_dump(mode="json")
    assert "hunter2" not in str(written) and "postgres:***@" in written["url"]
    storage.write_text("config.yaml", json.dumps({"buffer": written}))
    buffer = PreferenceBuffer(postgres_url, storage)
    buffer.put([make_pair(1)])
    assert ["judge", "1", "0", "0", "0"] in [row[:5] for row in cells(said("stats", run=storage))]
    buffer.close()
