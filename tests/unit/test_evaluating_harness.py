"""What the harness is asked of each version, what is kept of it, and the copy that answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.config import HarnessConfig, parse_config
from dpo_ray.evaluating.harness import (
    HarnessError,
    Score,
    check_loaded,
    find_versions,
    gain,
    keep,
    kept,
    read_scores,
    run_tasks,
    scores_table,
)
from dpo_ray.evaluating.served_copy import copy_run
from dpo_ray.models import load_model, load_tokenizer, save_policy
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage
from jobs.harness import main

FAKE_HARNESS = """
import json, os, pathlib, sys
arguments = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:] if "=" in argument)
if arguments["tasks"] == "broken":
    sys.exit("no task is called broken")
out = pathlib.Path(arguments["output_path"]) / "model"
out.mkdir()
version = int(arguments["model_args"].split("policy@v")[1].split(",")[0])
metrics = {"alias": "praise", "acc,none": 0.25 * version, "acc_stderr,none": 0.01}
(out / "results_now.json").write_text(json.dumps({"results": {arguments["tasks"]: metrics}}))
pathlib.Path(os.environ["ASKED"]).write_text(json.dumps([arguments, os.environ["OPENAI_API_KEY"]]))
"""


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Storage:
    """Versions 0 to 2, of which 2 is live."""
    storage = Storage(str(tmp_path / "run"))
    for version in range(3):
        save_policy(load_model(tiny_model), load_tokenizer(tiny_model), tmp_path / "made")
        PolicyRegistry(storage).publish(tmp_path / "made", PolicyManifest(version=version))
    PolicyRegistry(storage).promote(2)
    storage.write_text("config.yaml", yaml.safe_dump({"sampling": {"replicas": 4, "dtype": "float32"}}))
    return storage


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a stand-in for the harness notes what it was asked."""
    (tmp_path / "fake" / "lm_eval").mkdir(parents=True)
    (tmp_path / "fake" / "lm_eval" / "__main__.py").write_text(FAKE_HARNESS)
    (tmp_path / "fake" / "lm_eval" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return tmp_path / "asked"


def config(**settings: Any) -> HarnessConfig:
    return HarnessConfig(**{"tasks": ("film_praise",), **settings})


def test_the_harness_asks_one_version_by_its_name(run: Storage, asked: Path) -> None:
    folder = PolicyRegistry(run).fetch(2)
    scores = run_tasks(config(limit=5), 2, "http://host/v1", folder)
    assert scores == {"film_praise acc": Score(0.5, 0.01)}
    arguments, key = json.loads(asked.read_text())
    assert arguments["model_args"] == (
        "model=policy@v2,base_url=http://host/v1/completions,tokenizer_backend=huggingface,"
        f"tokenizer={folder},max_length=64,num_concurrent=8"
    )
    assert (arguments["limit"], arguments["include_path"], key) == ("5", "examples/harness", "none")
    assert "num_fewshot" not in arguments


def test_a_harness_that_fails_says_why(run: Storage, asked: Path) -> None:
    with pytest.raises(HarnessError, match="lm_eval failed on version 0:\nno task is called broken"):
        run_tasks(config(tasks=("broken",)), 0, "http://host/v1", PolicyRegistry(run).fetch(0))


def test_every_metric_of_every_filter_is_a_score() -> None:
    results = {
        "gsm": {
            "alias": "gsm",
            "exact_match,strict": 0.5,
            "exact_match_stderr,strict": "N/A",
            "exact_match,loose": 0.75,
        },
        "choice": {"acc,none": 1.0, "acc_stderr,none": 0.0, "sample_len": 7},
    }
    assert read_scores(results) == {
        "choice acc": Score(1.0, 0.0),
        "gsm exact_match (strict)": Score(0.5, None),
        "gsm exact_match (loose)": Score(0.75, None),
    }


def test_a_gain_is_noise_within_two_standard_errors_of_both() -> None:
    # 1.96 * sqrt(0.03^2 + 0.04^2) = 0.098.
    assert gain(Score(0.5, 0.03), Score(0.59, 0.04)) == "+0.090 ± 0.098 (noise)"
    assert gain(Score(0.5, 0.03), Score(0.4, 0.04)) == "-0.100 ± 0.098"
    assert gain(Score(0.5, None), Score(0.4, 0.04)) == "-0.100"


def test_scores_are_kept_for_the_same_questions_alone(run: Storage, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text("task: mine\n")
    same = config(task_folder=str(tasks))
    keep(run, same, 1, {"mine acc": Score(0.5, None)})
    assert kept(run, same, 1) == {"mine acc": Score(0.5, None)}
    assert kept(run, same, 2) is None
    assert kept(run, config(task_folder=str(tasks), limit=3), 1) is None
    (tasks / "mine.yaml").write_text("task: mine\nnum_fewshot: 2\n")
    assert kept(run, same, 1) is None


def test_kept_scores_are_shown_side_by_side_and_nothing_is_started(
    run: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = parse_config(HarnessConfig, ["--run_dir", run.root, "--versions", "0", "live"])
    for version, value in ((0, 0.5), (2, 0.75)):
        keep(run, settings, version, {"film_praise acc": Score(value, 0.01)})
    main(settings)
    printed = capsys.readouterr().out
    assert printed.split()[:3] == ["v0", "v2", "gain"]
    assert "+0.250 ± 0.028" in printed
    assert scores_table({0: {}}).columns[-1].header == "v0"


def test_versions_are_numbers_or_live(run: Storage) -> None:
    def found(*names: str) -> list[int]:
        return find_versions(config(run_dir=run.root, versions=names))

    assert found("0", "live", "2") == [0, 2]
    for name in ("best", "7"):
        with pytest.raises(ValueError, match=rf"versions: {name}: .* has \[0, 1, 2\]: give some of these"):
            found(name)


def test_in_a_copy_another_version_is_live_and_the_run_stays_as_it_is(run: Storage, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy_run(run, [1, 2], copy)
    there = PolicyRegistry(Storage(str(copy)))
    assert (there.live(), there.versions()) == (1, [0, 1, 2])
    there.promote(2)
    here = PolicyRegistry(run)
    assert (here.live(), len(here.events())) == (2, 1)
    assert there.fetch(2).resolve() == here.fetch(2).resolve()
    sampling = yaml.safe_load((copy / "config.yaml").read_text())["sampling"]
    assert sampling == {"replicas": 1, "max_replicas": None, "dtype": "float32"}


def test_where_nobody_answers_is_said() -> None:
    with pytest.raises(ValueError, match=r"url=http://127.0.0.1:9/v1: nobody answers there"):
        check_loaded(config(url="http://127.0.0.1:9/v1"), [0])


def test_a_task_folder_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(HarnessConfig, ["--task_folder=nowhere"])
    assert "task_folder=nowhere: there is no such folder" in capsys.readouterr().err
