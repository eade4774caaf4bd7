"""Samples of policies that answer over HTTP."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai

from dpo_ray.config import EndpointConfig
from dpo_ray.evaluating.policies import EndpointModel
from dpo_ray.evaluating.samples import Sample
from dpo_ray.generation import Drawing
from dpo_ray.judges.llm import status_error
from dpo_ray.terminal import OnProgress
from dpo_ray.types import Completion, Prompt

_NO_ANSWER = (AttributeError, TypeError, ValueError)
"""What an answer of another form gives: the client checks none."""
_MOST_PROMPTS = 1_000_000
_FEWEST_TRIES = 16
"""Where as many requests failed in a row from the first on, no more are made."""


class EndpointError(Exception):
    """An endpoint answered nothing."""


def sample_endpoint(
    policy: EndpointModel,
    prompts: Sequence[Prompt],
    drawing: Drawing,
    config: EndpointConfig,
    *,
    on_progress: OnProgress,
) -> list[Sample]:
    """`drawing.n` samples in a row of each prompt, each a request; one that fails says so and is no text."""
    key = api_key(config.api_key_variable)
    client = openai.OpenAI(
        base_url=policy.url, api_key=key or "none", timeout=config.timeout_s, max_retries=config.retries
    )
    endpoint = _Endpoint(client, policy.model, drawing, key)
    places = [(place, number) for place in range(len(prompts)) for number in range(drawing.n)]
    samples: list[Sample] = []
    with client, ThreadPoolExecutor(config.concurrency) as pool:
        for sample in pool.map(lambda place: endpoint.ask(prompts[place[0]], *place), places):
            samples.append(sample)
            on_progress(len(samples), len(places))
            if len(samples) == _FEWEST_TRIES and _is_silent(samples):
                pool.shutdown(wait=False, cancel_futures=True)
                break
    if _is_silent(samples):
        [(error, count)] = Counter(sample.error for sample in samples).most_common(1)
        raise EndpointError(
            f"{policy.name} gave none of {len(samples)} completions: {error} ({count} times). "
            "Check its URL, the model's name and endpoint.api_key_variable"
        )
    return samples


def api_key(variable: str) -> str:
    """From the environment; "" where no variable is named."""
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise ValueError(f"api_key_variable: ${variable} is not set: put the API key there")
    return key


def _is_silent(samples: Sequence[Sample]) -> bool:
    return all(sample.completion is None for sample in samples)


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """One model, asked in one way."""

    client: openai.OpenAI
    model: str
    drawing: Drawing
    key: str

    def ask(self, prompt: Prompt, place: int, number: int) -> Sample:
        # No two requests have one seed.
        seed = (self.drawing.seed * _MOST_PROMPTS + place) * self.drawing.n + number
        try:
            return Sample(place, number, *_read(self._answer(prompt, seed), prompt))
        except openai.APIStatusError as error:
            reason = str(status_error(error.status_code, error.message, self.key))
        except (openai.OpenAIError, *_NO_ANSWER) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
        return Sample(place, number, None, error=reason)

    def _answer(self, prompt: Prompt, seed: int) -> Any:
        """Text is continued, messages are answered."""
        options: Any = {"model": self.model, "temperature": self.drawing.temperature, "seed": seed}
        longest = self.drawing.max_new_tokens
        if isinstance(prompt.text, str):
            return self.client.completions.create(prompt=prompt.text, max_tokens=longest, **options)
        messages: Any = prompt.text
        return self.client.chat.completions.create(
            messages=messages, max_completion_tokens=longest, **options
        )


def _read(answer: Any, prompt: Prompt) -> tuple[Completion, int | None]:
    """The completion, and how many tokens it has where the endpoint counts them."""
    [choice] = answer.choices
    text = choice.message.content if hasattr(choice, "message") else choice.text
    version = (answer.model_extra or {}).get("policy_version")
    completion = Completion(
        prompt=prompt,
        text=text or "",
        token_ids=(),
        logp=float("nan"),
        policy_version=version if isinstance(version, int) else 0,
        finish_reason=choice.finish_reason or "stop",
    )
    return completion, answer.usage.completion_tokens if answer.usage else None
