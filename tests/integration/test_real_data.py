"""Prompts and pairs that people have: HH-RLHF and GSM8K, with the tiny architecture."""

import gzip
import json
import math
from pathlib import Path

import pytest

from dpo_ray.starter import make_random_model
from tests.integration.conftest import (
    SHARED_DATA,
    SMALL,
    Head,
    check_run_folder,
    metric_rows,
    run_job,
)

HH = SHARED_DATA / "hh-rlhf-harmless-base-test.jsonl.gz"
GSM8K = SHARED_DATA / "gsm8k-test.jsonl"
needs_data = pytest.mark.skipif(not HH.exists(), reason="the data sets are not beside the checkout")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with a byte-pair tokenizer and a chat template made from HH-RLHF's text."""
    folder = tmp_path_factory.mktemp("model")
    with gzip.open(HH, "rt") as lines:
        texts = [json.loads(line)["chosen"] for line in lines]
    make_random_model(texts, folder)
    return folder


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    "prompts",
    [pytest.param((HH, "prompt"), id="hh-rlhf"), pytest.param((GSM8K, "question"), id="gsm8k")],
)
def test_a_round_on_real_prompts(
    head: Head, text_model: Path, tmp_path: Path, prompts: tuple[Path, str]
) -> None:
    run_dir, (file, column) = tmp_path / "run", prompts
    source = [f"--model={text_model}", f"--prompts={file}", f"--prompts_column={column}"]
    judge = "--judge.function=tests.integration.judges:share_of_vowels"
    job = [f"--run_dir={run_dir}", "--rounds=1", judge, f"--serving.port={head.http_port}", *SMALL]
    run_job("jobs/iterative_dpo.py", [*source, *job], tmp_path / "log", head.environment)
    check_run_folder(run_dir, rounds=1)
    first_step = metric_rows(run_dir, "step")[0]
    assert first_step["rewards/margins"] == pytest.approx(0.0, abs=1e-4)  # The policy is its reference.
    sample = json.loads((run_dir / "rounds/00000/samples.jsonl").read_text().splitlines()[0])
    assert isinstance(sample["completion"]["prompt"]["text"], list if file == HH else str)


@needs_data
def test_offline_dpo_on_hh_rlhf_beats_chance(head: Head, text_model: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    data = [f"--model={text_model}", f"--pairs={HH}", "--max_length=384", "--max_pairs=512"]
    rate = ["--training.learning_rate=1e-3", "--training.cpus_per_worker=0.25"]
    run_job("jobs/offline_dpo.py", [f"--run_dir={run_dir}", *data, *rate], log, head.environment)
    epoch = metric_rows(run_dir, "round")[0]
    first_step = metric_rows(run_dir, "step")[0]
    assert first_step["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert epoch["eval/loss"] < math.log(2)
    assert epoch["eval/rewards/accuracies"] > 0.5
    assert "· rewards/accuracies " in log.read_text()
