"""The commands of the README, and what the default run promises."""

import json
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from transformers import AutoModelForCausalLM

from tests.integration.conftest import ROOT, SMALL, Head, check_run_folder, free_port, metric_rows, wait_for

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


def test_the_report_is_written_anew_as_the_readme_says(demo: tuple[Path, str]) -> None:
    run_dir, _ = demo
    (run_dir / "report.html").unlink()
    (command,) = readme_commands("The report")
    run(command.replace("runs/demo", str(run_dir)))
    assert "<html" in (run_dir / "report.html").read_text()


@contextmanager
def served(run_dir: Path, port: int) -> Iterator[None]:
    """`make serve`, from the moment that it says it answers until Ctrl-C."""
    process = subprocess.Popen(
        ["make", "serve", f"RUN_DIR={run_dir}", f"PORT={port}"],
        cwd=ROOT,
        env=LOCAL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any("answers on" in line for line in lines)
    yield
    os.killpg(process.pid, signal.SIGINT)
    wait_for(lambda: process.poll() is not None, timeout_s=60, what="make serve to stop")


def readme_commands(section: str) -> list[str]:
    """The lines of the bash blocks below a heading of README.md."""
    return bash_lines((ROOT / "README.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0])


def bash_lines(text: str) -> list[str]:
    return [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]


def run(command: str, environment: dict[str, str] = LOCAL) -> str:
    """Standard output of a command that must succeed in the repository's root."""
    ended = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


def test_served_policy_answers_as_the_readme_says(demo: tuple[Path, str]) -> None:
    run_dir, _ = demo
    live, port = (run_dir / "policies/LIVE").read_text().strip(), free_port()
    serve, *asks = readme_commands("Talk to the policy")
    assert serve == "make serve"
    with served(run_dir, port):
        chat, policy, client = (
            run(ask.replace(":8000", f":{port}").replace("client.py", f"client.py --base_url {base(port)}"))
            for ask in asks
        )
        last = ask_at_length(port)
    assert f"x-policy-version: {live}" in chat.lower()
    assert json.loads(policy)["version"] == int(live)
    assert f"version {live}" in client
    assert len(last.result().json()["choices"]) == 64


def ask_at_length(port: int) -> "Future[httpx.Response]":
    """A request that is under way on return."""
    body = {"model": "policy", "prompt": "the film", "n": 64, "max_tokens": 40, "ignore_eos": True}
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(httpx.post, f"{base(port)}/completions", json=body, timeout=60)
        time.sleep(0.1)
        assert not answer.done()
        asking.shutdown(wait=False)
    return answer


def base(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1"


def test_submitting_to_a_head_with_a_token_as_the_readme_says(tmp_path: Path, starter: Path) -> None:
    cache = os.environ.get("DPO_RAY_CACHE", str(Path.home() / ".cache" / "dpo_ray"))
    environment = {**LOCAL, "HOME": str(tmp_path), "DPO_RAY_CACHE": cache}
    token, start, submit = readme_commands("On a cluster")
    smaller = f"{submit} --rounds 1 --model {starter} --serving.port {free_port()} {' '.join(SMALL)}"
    try:
        for command in (token, start, smaller):
            run(command, environment)
    finally:
        stop_all_with_home(tmp_path)
    check_run_folder(tmp_path / "dpo_ray" / "first", rounds=1)


def stop_all_with_home(home: Path) -> None:
    """End the processes of a head that was started with its own home, and of no other."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == str(home):
                process.kill()


def test_own_model_prompts_judge_and_pairs_as_the_readme_says(
    demo: tuple[Path, str], head: Head, tmp_path: Path
) -> None:
    run_dir, _ = demo
    for command in readme_commands("Your model, your prompts, your judge"):
        moved = command.replace("runs/demo", str(run_dir)).replace("runs/", f"{tmp_path}/")
        loop = "iterative_dpo.py --run_dir" in command
        smaller = (
            [*SMALL, f"--serving.port={head.http_port}"]
            if loop
            else ["--max_pairs=256", "--training.workers=1"]
        )
        run(f"{moved} {' '.join(smaller)}" if "--run_dir" in command else moved, head.environment)
    check_run_folder(tmp_path / "mine", rounds=2)
    check_imitation(tmp_path / "sft")
    assert "eval/rewards/accuracies" in metric_rows(tmp_path / "offline", "round")[0]
    check_adapter(tmp_path / "adapter")
    check_sweep(tmp_path / "sweep")


def check_imitation(run_dir: Path) -> None:
    first, epoch = metric_rows(run_dir, "step")[0], metric_rows(run_dir, "round")[0]
    assert epoch["eval/loss"] < first["loss"]
    assert "rewards/accuracies" not in first


def check_adapter(run_dir: Path) -> None:
    first, epoch = metric_rows(run_dir, "step")[0], metric_rows(run_dir, "round")[-1]
    assert abs(first["loss"] - math.log(2)) < 1e-6
    assert first["rewards/accuracies"] == 0.0
    assert epoch["eval/loss"] < math.log(2)
    assert (run_dir / "policies/v00001/adapter/adapter_model.safetensors").exists()
    # A plain model, for any server.
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "policies/v00001")
    assert not any("lora" in name for name, _ in merged.named_parameters())


def check_sweep(run_dir: Path) -> None:
    weak, strong = json.loads((run_dir / "beta_sweep.json").read_text())
    assert (weak["beta"], strong["beta"]) == (0.1, 1)
    assert weak["kl/start"] > strong["kl/start"] > -0.1
    assert min(weak["eval/rewards/accuracies"], strong["eval/rewards/accuracies"]) > 0.5
    assert "<svg" in (run_dir / "beta_sweep.svg").read_text()


def test_readme_has_no_command_that_is_not_tried() -> None:
    sections = ["Two commands", "Talk to the policy", "Your model, your prompts, your judge"]
    sections += ["On a cluster", "The report"]
    tried = [command for section in sections for command in readme_commands(section)]
    assert tried == bash_lines((ROOT / "README.md").read_text())
    assert readme_commands("Two commands") == ["make demo", "make test"]  # The demo above; this very run.
