"""People who vote over HTTP alone, while the job's rounds go on, steer the policy to their taste."""

import json
import threading
from pathlib import Path

import httpx
import pytest

from dpo_ray.storage import Storage
from serve.tokens import Tokens
from tests.integration.conftest import Head, run_job

ROUNDS = 3
PROMPTS = ("the film", "these songs", "that acting", "the plot is", "those twists", "honestly the music")
WORD = "and"
"""What these people like in a review; the job's judge does not look at it."""
SETTINGS = (
    "--sampling.prompts_per_round=32",
    "--sampling.samples_per_prompt=4",
    "--evaluation.prompts=32",
    "--buffer.pairs_per_round=96",
    '--buffer.mix={"human": 3, "judge": 1}',
    "--training.learning_rate=3e-4",
    "--votes.min_wait_s=0",
)


class Voter(threading.Thread):
    """Compares and votes until the job ends."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__(daemon=True)
        self.num_votes = 0
        self.stop = threading.Event()
        self._client = httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=30)

    def run(self) -> None:
        while not self.stop.is_set():
            for prompt in PROMPTS:
                try:
                    self._vote(prompt)
                except httpx.TransportError:
                    self.stop.wait(0.5)  # The policy is not up yet, or not any more.

    def _vote(self, prompt: str) -> None:
        shown = self._client.post("/v1/comparisons", json={"prompt": prompt})
        if not shown.is_success:
            return
        first, second = (shown.json()[side]["text"].split().count(WORD) for side in ("first", "second"))
        choice = "tie" if first == second else "first" if first > second else "second"
        vote = self._client.post(
            "/v1/preferences", json={"comparison_id": shown.json()["id"], "choice": choice}
        )
        self.num_votes += vote.status_code == 201


def run(head: Head, starter: Path, run_dir: Path, *, voters: int) -> list[Voter]:
    """A whole job, with so many people who vote meanwhile."""
    tokens = Tokens(Storage(str(run_dir)))
    url = f"http://127.0.0.1:{head.http_port}"
    people = [Voter(url, tokens.add(f"voter-{number}", "labeler")) for number in range(voters)]
    for person in people:
        person.start()
    arguments = (f"--run_dir={run_dir}", f"--model={starter}", f"--rounds={ROUNDS}", *SETTINGS)
    serving = f"--serving.port={head.http_port}"
    run_job("jobs/iterative_dpo.py", (*arguments, serving), run_dir.parent / "log", head.environment)
    for person in people:
        person.stop.set()
        person.join()
    return people


def liked(run_dir: Path, version: int) -> float:
    """How often the word comes in a review of a held-out prompt."""
    lines = (run_dir / "evaluation" / f"v{version:05d}.jsonl").read_bytes().splitlines()
    counts = [json.loads(line)["text"].split().count(WORD) for line in lines]
    return sum(counts) / len(counts)


@pytest.mark.slow
def test_people_steer_the_policy_where_the_judge_is_indifferent(
    head: Head, starter: Path, tmp_path: Path
) -> None:
    people = run(head, starter, tmp_path / "voted", voters=4)
    run(head, starter, tmp_path / "judged", voters=0)
    start, voted = liked(tmp_path / "voted", 0), liked(tmp_path / "voted", ROUNDS)
    judged = liked(tmp_path / "judged", ROUNDS)
    assert min(person.num_votes for person in people) > 20
    assert voted > max(start, judged) + 0.4
