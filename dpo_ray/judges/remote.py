"""A judge behind HTTP: completions are posted as JSON, rewards come back.

POST url
{"completions": [{"prompt": text or messages, "fields": {…}, "completion": text, "policy_version": 3}, …]}

200
{"rewards": [0.5, null, …]}      one for each completion, in order; null where the judge cannot say
"""

import json
import math
from collections.abc import Sequence

import httpx

from dpo_ray.config import JudgeTerm
from dpo_ray.judges.asking import CallError, LateCallError, Reply
from dpo_ray.judges.budget import Usage
from dpo_ray.judges.function import Question
from dpo_ray.judges.llm import api_key, status_error


class RemoteService:
    """Asks for the rewards of `batch_size` completions at a time."""

    def __init__(self, term: JudgeTerm) -> None:
        """ValueError: the API key is not there."""
        self._term = term
        self._key = api_key(term)
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(timeout=term.timeout_s, headers=headers)
        self.batch_size = term.batch_size
        self.identity = f"http {term.url}"

    def most(self, questions: Sequence[Question]) -> Usage:
        return Usage(calls=1)

    def call(self, questions: Sequence[Question]) -> Reply:
        body = {"completions": [_described(question) for question in questions]}
        try:
            response = self._client.post(self._term.url, json=body)
        except httpx.TimeoutException:
            raise LateCallError(f"no answer within {self._term.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise CallError(f"{type(error).__name__}: {error}") from None
        if response.status_code != httpx.codes.OK:
            raise status_error(response.status_code, response.text, self._key)
        return Reply(response.text, Usage(calls=1))

    def rewards(self, text: str, questions: Sequence[Question]) -> list[float | None]:
        answer = json.loads(text)
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(questions):
            raise ValueError(f"no list of {len(questions)} rewards in {text[:60]!r}")
        return [_reward(value) for value in rewards]


def _described(question: Question) -> dict[str, object]:
    [completion] = question
    return {
        "prompt": completion.prompt.text,
        "fields": completion.prompt.fields,
        "completion": completion.text,
        "policy_version": completion.policy_version,
    }


def _reward(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)
