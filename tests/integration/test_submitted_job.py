"""`ray job submit`, and HTTP clients of the live policy while the job runs and after it."""

import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest

from tests.integration.conftest import ROOT, SMALL, Head, check_run_folder, metric_rows, wait_for


class Client(threading.Thread):
    """Asks the live policy over and over, and remembers which versions answered."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.openai = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        self.versions: list[int] = []
        self.errors: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.1):
            try:
                self.versions.append(self.ask())
            except openai.OpenAIError as error:
                self.errors.append(repr(error))

    def ask(self) -> int:
        """The version that one chat completion names, in its header and its body alike."""
        raw = self.openai.chat.completions.with_raw_response.create(
            model="policy", messages=[{"role": "user", "content": "the film"}], max_tokens=24
        )
        answer = raw.parse()
        assert raw.headers["x-policy-version"] == str(answer.policy_version)  # type: ignore[attr-defined]
        assert answer.choices[0].message.content
        return int(raw.headers["x-policy-version"])


@pytest.fixture(scope="module")
def submitted(
    head: Head, starter: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Client, str]:
    """The folder, the client and the log of a job that was submitted and has succeeded."""
    run_dir, port = tmp_path_factory.mktemp("submitted") / "run", head.http_port
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard]
    job = ["python", "jobs/iterative_dpo.py", f"--run_dir={run_dir}", f"--model={starter}", "--rounds=2"]
    command = [*ray, "--working-dir", ".", "--", *job, f"--serving.port={port}", *SMALL]
    process = subprocess.Popen(
        command, cwd=ROOT, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: metric_rows(run_dir, "start") or process.poll() is not None, what="the first evaluation")
    client = Client(port)
    client.start()
    log, _ = process.communicate(timeout=600)
    client.stop.set()
    client.join()
    assert process.returncode == 0, log[-6000:]
    return run_dir, client, log


def test_submitted_job_leaves_a_whole_run(submitted: tuple[Path, Client, str]) -> None:
    run_dir, _, log = submitted
    check_run_folder(run_dir, rounds=2)
    assert f"report: {run_dir}/report.html" in log
    assert list((run_dir / "tensorboard").iterdir())


def test_clients_see_every_answer_and_versions_that_only_grow(submitted: tuple[Path, Client, str]) -> None:
    _, client, _ = submitted
    assert client.errors == []
    assert client.versions == sorted(client.versions)
    assert len(set(client.versions)) > 1


def test_policy_answers_after_the_job(submitted: tuple[Path, Client, str]) -> None:
    _, client, _ = submitted
    assert client.ask() == 2
    completion = client.openai.completions.create(model="policy", prompt="the film", max_tokens=24, n=2)
    assert len(completion.choices) == 2


def test_stream_names_its_version_in_header_and_last_chunk(submitted: tuple[Path, Client, str]) -> None:
    _, client, _ = submitted
    raw = client.openai.chat.completions.with_raw_response.create(
        model="policy", messages=[{"role": "user", "content": "the film"}], max_tokens=24, stream=True
    )
    chunks = list(raw.parse())
    assert raw.headers["x-policy-version"] == "2"
    assert chunks[-1].choices[0].finish_reason is not None
    assert chunks[-1].policy_version == 2  # type: ignore[attr-defined]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_too_long_a_prompt_is_a_client_error_with_a_reason(submitted: tuple[Path, Client, str]) -> None:
    _, client, _ = submitted
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.openai.completions.create(model="policy", prompt="the film " * 500)
