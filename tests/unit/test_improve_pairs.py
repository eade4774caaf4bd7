"""A round tells what became of its completions, and ends the job where no pair is left."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_improve import rows, run_job

from dpo_ray.config import PairingConfig
from dpo_ray.learner import TrainingError
from dpo_ray.pairing import PairYield


def samples(folder: Path) -> list[bytes]:
    return (folder / "rounds/00000/samples.jsonl").read_bytes().splitlines()


def test_a_round_counts_what_became_of_its_completions(tmp_path: Path) -> None:
    run_job(tmp_path, rounds=3)
    first, _, last = (PairYield.from_metrics(row) for row in rows(tmp_path) if row["kind"] == "round")
    assert first == PairYield(completions=12, matched=4, made=4, kept=4)
    trained_on = pq.read_table(tmp_path / "rounds/00002/pairs.parquet")["round"].to_pylist()
    kept = trained_on.count(2)
    assert last == PairYield(completions=12, matched=4, made=4, not_drawn=4 - kept, kept=kept)
    assert 0 < kept < 4


def test_a_round_without_a_pair_ends_the_job_and_says_why(tmp_path: Path) -> None:
    reason = (
        r"round 0 has no pair to train on: of 12 completions 12 could be paired; of 4 matches 0 became pairs "
        r"\(4 tie\)\. To get some, sample more completions .*lower pairing.min_margin"
    )
    for _ in range(2):  # Started again, it ends the same way.
        with pytest.raises(TrainingError, match=reason):
            run_job(tmp_path, rounds=1, pairing=PairingConfig(min_margin=1e6))


def test_a_round_with_few_pairs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(tmp_path / "usual", rounds=1)
    assert "few pairs" not in capsys.readouterr().out
    sums = [sum(json.loads(line)["completion"]["token_ids"]) for line in samples(tmp_path / "usual")]
    margins = sorted(max(each) - min(each) for each in zip(*[iter(sums)] * 3, strict=True))
    run_job(tmp_path / "few", rounds=1, pairing=PairingConfig(rule="all_pairs", min_margin=margins[-2]))
    assert "few pairs: of 12 completions 12 could be paired; of 12 matches 1 " in capsys.readouterr().out
