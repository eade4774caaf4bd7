"""Rows of a source go into the buffer, a fixed part of them held out."""

from pathlib import Path
from typing import Any

import pytest

from dpo_ray.buffer import read_snapshot, read_snapshot_manifest
from dpo_ray.config import OfflineDPOConfig
from dpo_ray.offline import keep_rows
from dpo_ray.preference_data import PairSet
from dpo_ray.run_folder import RunFolder
from dpo_ray.types import Pair


def pair(number: int, **changes: Any) -> Pair:
    return Pair("p", "a", "b", (1, number), (2, number), (3, number), source="file", **changes)


def config(tmp_path: Path, **changes: Any) -> OfflineDPOConfig:
    given = {"model": "m", "pairs": "p", "run_dir": str(tmp_path / "run"), "held_out_pairs": 5, **changes}
    return OfflineDPOConfig.model_validate(given)


def kept(settings: OfflineDPOConfig, *sets: PairSet) -> tuple[set[str], set[str]]:
    """Ids of the rows held out, and of those in the first epoch's snapshot."""
    folder = RunFolder(settings)
    rows = keep_rows(sets, settings, folder, lambda done, total: None)
    manifest = read_snapshot_manifest(folder.storage, 0)
    assert manifest is not None
    training = read_snapshot(folder.storage, manifest)
    assert rows.num_training == len(training)
    return {row.pair_id for row in rows.held_out}, {row.pair_id for row in training}


def test_every_row_is_either_trained_on_or_held_out(tmp_path: Path) -> None:
    pairs = tuple(pair(number) for number in range(20))
    held_out, training = kept(config(tmp_path), PairSet(pairs, {}))
    assert len(held_out) == 5
    assert held_out | training == {row.pair_id for row in pairs}
    assert not held_out & training


def test_order_parts_and_repetitions_do_not_change_what_is_held_out(tmp_path: Path) -> None:
    pairs = tuple(pair(number) for number in range(20))
    parts = [PairSet(pairs[7::-1], {}), PairSet(pairs[5:], {}), PairSet(pairs[:9], {})]
    in_parts = kept(config(tmp_path / "parts"), *parts)
    assert in_parts == kept(config(tmp_path / "whole"), PairSet(pairs, {}))


def test_another_seed_holds_out_others(tmp_path: Path) -> None:
    pairs = tuple(pair(number) for number in range(20))
    first, _ = kept(config(tmp_path / "0"), PairSet(pairs, {}))
    second, _ = kept(config(tmp_path / "1", seed=1), PairSet(pairs, {}))
    assert first != second


def test_max_pairs_draws_from_all_training_rows(tmp_path: Path) -> None:
    pairs = tuple(pair(number) for number in range(20))
    held_out, training = kept(config(tmp_path, max_pairs=3), PairSet(pairs, {}))
    assert len(training) == 3
    assert not held_out & training


def test_counts_of_all_parts_are_reported(tmp_path: Path) -> None:
    settings = config(tmp_path)
    first = PairSet(tuple(map(pair, range(8))), {"equal": 2}, truncated=1)
    second = PairSet(tuple(map(pair, range(8, 10))), {"equal": 1, "empty": 4}, truncated=2)
    rows = keep_rows([first, second], settings, RunFolder(settings), lambda done, total: None)
    expected = "5 rows to train on, 5 held out; dropped: 3 equal, 4 empty; cut at the start: 3"
    assert rows.sentence() == expected


def test_dropped_rows_are_named_in_the_runs_folder(tmp_path: Path) -> None:
    settings = config(tmp_path)
    rows = PairSet(tuple(map(pair, range(8))), {"equal": 2}, dropped_rows=((3, "equal"), (9, "equal")))
    sentence = keep_rows([rows], settings, RunFolder(settings), lambda done, total: None).sentence()
    assert sentence.endswith("dropped: 2 equal (named in dropped_rows.csv)")
    assert (tmp_path / "run/dropped_rows.csv").read_text() == "row,reason\n3,equal\n9,equal\n"


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="5 usable rows are too few to hold 5 out"):
        kept(config(tmp_path), PairSet(tuple(map(pair, range(5))), {}))


def test_weights_that_a_loss_cannot_keep_apart_are_refused(tmp_path: Path) -> None:
    pairs = (*map(pair, range(9)), pair(9, weight=0.5))
    settings = config(tmp_path, training={"loss": {"type": "aot"}})
    with pytest.raises(
        ValueError, match=r"1 rows have weights, the first 0\.5, which training\.loss\.type=aot"
    ):
        kept(settings, PairSet(pairs, {}))
