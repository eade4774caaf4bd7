"""The two commands that a new user types, and what the default run promises."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.integration.conftest import ROOT, check_run_folder, free_port, metric_rows, wait_for

LOCAL = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder and the output of `make demo`."""
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    command = ["make", "demo", f"RUN_DIR={run_dir}", f"PORT={free_port()}"]
    ended = subprocess.run(
        command, cwd=ROOT, env=LOCAL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    return run_dir, ended.stdout


def test_demo_makes_the_policy_better_and_keeps_it_fluent(demo: tuple[Path, str]) -> None:
    run_dir, _ = demo
    start, last = metric_rows(run_dir, "start")[0], metric_rows(run_dir, "round")[-1]
    assert 0.4 < start["eval/reward_mean"] < 0.6
    assert last["eval/reward_mean"] >= 0.9
    assert last["eval/grammatical"] >= 0.9 * start["eval/grammatical"]
    assert last["win_rate/vs_start"] >= 0.85
    assert last["kl/start"] > 0
    assert len(metric_rows(run_dir, "round")) >= 4


def test_demo_shows_every_round_and_the_report(demo: tuple[Path, str]) -> None:
    run_dir, output = demo
    rounds = len(metric_rows(run_dir, "round"))
    check_run_folder(run_dir, rounds=rounds)
    for round_ in range(rounds):
        assert f"round {round_} · version {round_ + 1} · reward " in output
    assert f"report: {run_dir}/report.html" in output


def test_make_serve_answers_with_the_live_version(demo: tuple[Path, str]) -> None:
    run_dir, _ = demo
    port = free_port()
    served = subprocess.Popen(
        ["make", "serve", f"RUN_DIR={run_dir}", f"PORT={port}"],
        cwd=ROOT,
        env=LOCAL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert served.stdout is not None
    lines = iter(served.stdout.readline, "")
    assert any("answers on" in line for line in lines)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    raw = client.completions.with_raw_response.create(model="policy", prompt="the film", max_tokens=24)
    assert raw.headers["x-policy-version"] == (run_dir / "policies/LIVE").read_text().strip()
    example = [sys.executable, "examples/client.py", "--base_url", f"http://127.0.0.1:{port}/v1"]
    assert "version" in subprocess.run(example, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    os.killpg(served.pid, signal.SIGINT)
    wait_for(lambda: served.poll() is not None, timeout_s=60, what="make serve to stop")
