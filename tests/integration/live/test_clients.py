"""Clients as people have them, against two replicas of which one holds a candidate."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml

from dpo_ray.models import load_model, load_tokenizer
from examples.harness.film_tasks import praise
from tests.integration.conftest import ROOT, wait_for
from tests.integration.live.conftest import Service

PROMPT = "the film was"


@dataclass(frozen=True)
class Served:
    """A run that is served: version 1 is live, and 2 a candidate that answers nothing of its own accord."""

    url: str
    run_dir: Path
    user: str
    admin: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.user, max_retries=0)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={"authorization": f"Bearer {self.user}"}, timeout=60)

    def post(self, path: str, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.admin}"}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=120)

    def loaded(self) -> list[int]:
        return sorted(state["version"] for state in self.get("/v1/policy").json()["replicas"])


@pytest.fixture(scope="module")
def served(service: Service) -> Iterator[Served]:
    service.registry.promote(1)
    service.registry.offer(2, share=0.0)
    made = Served(service.base_url, service.run_dir, service.user, service.admin)
    wait_for(lambda: made.loaded() == [1, 2], what="both replicas")
    yield made
    assert made.post("/v1/policy/promote", version=0).is_success


def ask(client: openai.OpenAI, model: str = "policy", **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": PROMPT}]
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": 8, **options})


def test_the_models_are_what_is_loaded(served: Served) -> None:
    wait_for_models(served, "policy@v1", "policy@v2")


def wait_for_models(served: Served, *pinned: str) -> None:
    """What a replica says of the others is a second old at most."""
    expected = ["policy", "policy@live", *pinned]
    wait_for(lambda: [model.id for model in served.client.models.list()] == expected, timeout_s=10)


def test_options_of_the_openai_client_mean_what_they_mean(served: Served) -> None:
    answer = ask(served.client, n=3, seed=7, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 3
    assert all(len(choice.logprobs.content[0].top_logprobs) == 2 for choice in answer.choices)
    again = ask(served.client, n=3, seed=7)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    (word, *_) = again.choices[0].message.content.split()
    stopped = ask(served.client, seed=7, n=3, stop=[word])
    assert stopped.choices[0].finish_reason == "stop"
    assert word not in (stopped.choices[0].message.content or "")


def test_the_live_version_answers_and_says_so_in_all_places(served: Served) -> None:
    for model in ("policy", "policy@live", "policy@v1"):
        messages: Any = [{"role": "user", "content": PROMPT}]
        raw = served.client.chat.completions.with_raw_response.create(
            model=model, messages=messages, max_tokens=4, n=2
        )
        answer: Any = raw.parse()
        assert raw.headers["x-policy-version"] == "1"
        assert answer.system_fingerprint == "policy-v00001"
        assert answer.policy_version == 1
        assert all(choice.policy_version_spans[0]["version"] == 1 for choice in answer.choices)


def test_a_pinned_version_answers_with_its_own_weights_whichever_replica_is_asked(served: Served) -> None:
    def greedy(model: str) -> set[str]:
        # A connection each: the proxy gives them to both replicas.
        answers = [ask(served.client, model, temperature=0.0, max_tokens=20) for _ in range(6)]
        assert {f"policy@v{answer.policy_version}" for answer in answers} == {model}
        return {answer.choices[0].message.content for answer in answers}

    live, candidate = greedy("policy@v1"), greedy("policy@v2")
    assert len(live) == len(candidate) == 1
    assert live != candidate


def test_a_version_that_is_not_loaded_is_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as failure:
        ask(served.client, "policy@v0")
    assert "policy@v0 is not loaded: loaded are v1 (live), v2 (candidate)" in str(failure.value)


def test_many_streams_at_once_end_with_versions_and_usage(served: Served) -> None:
    async def stream(client: openai.AsyncOpenAI, model: str) -> list[Any]:
        chunks = await client.completions.create(
            model=model, prompt=PROMPT, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in chunks]

    async def scenario() -> list[list[Any]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=served.user) as client:
            return await asyncio.gather(*(stream(client, f"policy@v{1 + i % 2}") for i in range(16)))

    for i, chunks in enumerate(asyncio.run(scenario())):
        *_, ended, usage = chunks
        assert ended.policy_version == usage.policy_version == 1 + i % 2
        assert ended.choices[0].policy_version_spans[-1]["end"] == usage.usage.completion_tokens


def test_a_grammar_is_refused_with_a_sentence(served: Served) -> None:
    schema = {"name": "review", "schema": {"type": "object"}}
    with pytest.raises(openai.BadRequestError, match="response_format"):
        ask(served.client, response_format={"type": "json_schema", "json_schema": schema})
    assert ask(served.client, response_format={"type": "text"}).choices


def test_curl_gets_a_stream(served: Served) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 4, "stream": True})
    headers = ["-H", "content-type: application/json", "-H", f"authorization: Bearer {served.user}"]
    command = ["curl", "-sS", "-N", "-i", *headers, "-d", body, f"{served.url}/v1/completions"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "x-policy-version: 1" in text.lower()
    assert '"policy_version":1' in text
    assert text.rstrip().endswith("data: [DONE]")


def test_without_a_token_nobody_is_answered(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0))


def test_one_scrape_has_both_replicas_and_the_engine_of_each(served: Served) -> None:
    lines = served.get("/metrics").text.splitlines()
    for name in ("dpo_ray_replica_version{", "vllm:generation_tokens_total{"):
        replicas = {line.partition('replica="')[2] for line in lines if line.startswith(name)}
        assert len(replicas) == 2


def test_the_example_runs(served: Served) -> None:
    options = [
        f"--base_url={served.url}/v1",
        f"--api_key={served.user}",
        "--model=policy@v2",
        "--max_tokens=4",
    ]
    command = [sys.executable, "examples/client.py", *options]
    printed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert printed.count("version 2") == 2


TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: answer
"""
WRITING = """
task: writing
output_type: generate_until
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
ROWS = [
    {"prompt": prompt, "choices": ["lovely", "clumsy", "the"], "answer": 0}
    for prompt in ("the film was", "this music felt", "the story was", "the ending felt", "those jokes were")
]


def lm_eval(served: Served, folder: Path, task: str, *options: str) -> dict[str, Any]:
    """The metrics of a task that the lm-eval command measures on the served policy."""
    pytest.importorskip("lm_eval")
    name = yaml.safe_load(task)["task"]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (folder / f"{name}.yaml").write_text(task + TASK.replace("rows", f"{folder}/rows"))
    arguments = [f"--tasks={name}", f"--include_path={folder}", f"--output_path={folder}/out", *options]
    ended = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments],
        env={**os.environ, "OPENAI_API_KEY": served.user, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    (results,) = (folder / "out").rglob("results*.json")
    return json.loads(results.read_text())["results"][name]


@pytest.mark.parametrize(
    ("kind", "path", "options"),
    [
        ("completions", "completions", ()),
        ("chat-completions", "chat/completions", ("--apply_chat_template",)),
    ],
)
def test_lm_eval_has_the_policy_write(
    served: Served, tmp_path: Path, kind: str, path: str, options: tuple[str, ...]
) -> None:
    model = f"--model_args=model=policy,base_url={served.url}/v1/{path},tokenizer_backend=None"
    metrics = lm_eval(served, tmp_path, WRITING, f"--model=local-{kind}", model, *options)
    assert metrics["sample_len"] == len(ROWS)


def test_the_harness_job_has_a_pinned_version_choose_as_its_weights_do(served: Served) -> None:
    pytest.importorskip("lm_eval")
    where = [f"--run_dir={served.run_dir}", f"--url={served.url}/v1", "--api_key_variable=MY_TOKEN"]
    what = ["--versions", "2", "--tasks", "film_praise", "--limit=6"]
    ended = subprocess.run(
        [sys.executable, "jobs/harness.py", *where, *what],
        cwd=ROOT,
        env={**os.environ, "MY_TOKEN": served.user, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "film_praise acc" in ended.stdout
    found = json.loads((served.run_dir / "evaluation/harness/v00002.json").read_text())
    rows: list[Any] = list(praise()["test"])[:6]
    picks = picks_first(served.run_dir / "policies" / "v00002")
    assert found["scores"]["film_praise acc"][0] == pytest.approx(sum(map(picks, rows)) / 6)


def picks_first(folder: Path) -> Callable[[dict[str, Any]], bool]:
    """Whether the first choice of a row is the likeliest word after its prompt, by transformers."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)

    def picks(row: dict[str, Any]) -> bool:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(row["prompt"])["input_ids"]])).logits[0, -1]
        words = [tokenizer.convert_tokens_to_ids(word) for word in row["choices"]]
        return int(logits[words].argmax()) == 0

    return picks


def test_a_promotion_is_answered_when_both_replicas_have_proven_it_and_a_rollback_undoes_it(
    served: Served,
) -> None:
    assert served.get("/v1/policy").json()["candidate"] == {"version": 2, "share": 0.0}
    refused = httpx.post(f"{served.url}/v1/policy/promote", json={"version": 2})
    assert refused.status_code == 401
    promoted = served.post("/v1/policy/promote", version=2, reason="better")
    assert promoted.status_code == 200, promoted.text
    assert [state["version"] for state in promoted.json()["replicas"]] == [2, 2]
    assert ask(served.client).policy_version == 2
    wait_for_models(served, "policy@v2")
    back = served.post("/v1/policy/rollback")
    assert back.json()["version"] == 1, back.text
    assert {ask(served.client).policy_version for _ in range(4)} == {1}
    event = served.get("/v1/policy").json()["events"][-1]
    assert (event["kind"], event["version"], event["previous"], event["by"]) == ("rollback", 1, 2, "ada")
