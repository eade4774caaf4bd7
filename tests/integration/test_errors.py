"""What a user gets wrong ends early, with one sentence and without a hang."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, SMALL, Head


def failing_job(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and standard error of a job that is expected to end by itself, soon."""
    command = [sys.executable, "jobs/iterative_dpo.py", *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    return ended.returncode, ended.stderr


def assert_one_sentence(errors: str, *fragments: str) -> None:
    """Standard error holds one message, no traceback, and the message says these things."""
    assert "Traceback" not in errors
    message = errors[errors.rindex("error: ") :]
    for fragment in fragments:
        assert fragment in message


@pytest.fixture
def offline(starter: Path, tmp_path: Path) -> list[str]:
    """Arguments of a job that is right in everything that a test does not change."""
    return [f"--run_dir={tmp_path}/run", f"--model={starter}", *SMALL]


@pytest.fixture
def no_ray() -> dict[str, str]:
    """An environment in which reaching for Ray would fail loudly."""
    return {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}


@pytest.mark.parametrize(
    ("wrong", "fragments"),
    [
        (["--rounds=0"], ["rounds", "greater than or equal to 1", "'0'"]),
        (["--no.such_setting=1"], ["--no.such_setting"]),
        (["--config=nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--prompts=nowhere.jsonl", "--judge.function=builtins:len"], ["nowhere.jsonl"]),
        (["--judge.function=tests.integration.judges:nobody"], ["nobody"]),
        (["--sampling.max_new_tokens=4096"], ["max_new_tokens=4096", "lower it"]),
        (["--model=/nowhere/model"], ["/nowhere/model"]),
    ],
    ids=["value", "name", "config", "prompts", "judge", "context", "model"],
)
def test_wrong_setting_ends_with_code_2(
    offline: list[str], no_ray: dict[str, str], wrong: list[str], fragments: list[str]
) -> None:
    code, errors = failing_job([*offline, *wrong], no_ray)
    assert code == 2
    assert_one_sentence(errors, *fragments)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [("", ["no prompts"]), (json.dumps({"prompt": "the film " * 400}), ["max_prompt_tokens", "800"])],
    ids=["empty", "too-long"],
)
def test_useless_prompt_file_is_named(
    offline: list[str], no_ray: dict[str, str], tmp_path: Path, content: str, fragments: list[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(content)
    judge = "--judge.function=tests.integration.judges:share_of_vowels"
    code, errors = failing_job([*offline, f"--prompts={prompts}", judge], no_ray)
    assert code == 2
    assert_one_sentence(errors, *fragments)


def test_model_without_tokenizer_is_named(
    offline: list[str], no_ray: dict[str, str], starter: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(starter, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    code, errors = failing_job([*offline, f"--model={bare}"], no_ray)
    assert code == 2
    assert_one_sentence(errors, str(bare), "tokenizer")


def test_busy_port_is_named(offline: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        code, errors = failing_job(
            [*offline, f"--serving.port={port}"], {**environment, "RAY_ADDRESS": "local"}
        )
    assert code == 2
    assert_one_sentence(errors, str(port), "--serving.port")


@pytest.mark.parametrize(
    ("wrong", "lacks"), [("--training.workers=99", "CPU 99"), ("--training.gpus_per_worker=1", "GPU 1 of 0")]
)
def test_too_small_a_cluster_is_said_so(head: Head, offline: list[str], wrong: str, lacks: str) -> None:
    code, errors = failing_job([*offline, wrong, "--training.cpus_per_worker=1"], head.environment)
    assert code == 2
    assert_one_sentence(errors, lacks, "add nodes")


@pytest.mark.slow
def test_judge_that_answers_nonsense_ends_the_job(head: Head, offline: list[str]) -> None:
    function = "tests.integration.judges:not_a_number"
    code, errors = failing_job(
        [*offline, f"--judge.function={function}", f"--serving.port={head.http_port}"], head.environment
    )
    assert code == 1
    assert_one_sentence(errors, function, "nan")
