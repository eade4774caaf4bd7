"""Completions of the live policy, and the push of a new one: the job's side of the deployment."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from dpo_ray.types import Completion, Prompt

_CHUNKS_PER_REPLICA = 4
_RETRY_S = 1.0
_MOST_DEATHS = 5
"""A call that so many replicas have died of is not sent to a further one."""
_DEAD_ENGINE = ("EngineDeadError", "EngineGenerateError")
"""What vLLM raises in a replica whose engine is gone, by name: the library does not import vLLM."""
_GIVE_UP_S = 900.0
"""How long calls may fail before the sampler is given up: a replica needs time to come back."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion, as it travels from a replica."""

    text: str
    token_ids: tuple[int, ...]
    logp: float
    policy_version: int
    finish_reason: str


class SamplerError(RuntimeError):
    """The live policy does not answer, or its weights are not the pushed ones."""


class Sampler:
    """Samples many prompts over all replicas, and outlives the death of any of them."""

    def __init__(self, handle: DeploymentHandle, *, replicas: int) -> None:
        self._handle = handle
        self._replicas = replicas

    def sample(
        self,
        prompts: Sequence[Prompt],
        params: dict[str, Any],
        *,
        seed: str,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Completion]:
        """`params["n"]` completions per prompt, in order. `params` are vLLM's; seeds differ by prompt."""
        chunks = list(_chunks(prompts, _CHUNKS_PER_REPLICA * self._replicas))
        pending = [self._send(start, chunk, params, seed) for start, chunk in chunks]
        completions: list[Completion] = []
        for (start, chunk), response in zip(chunks, pending, strict=True):
            answers = self._receive(
                response, lambda start=start, chunk=chunk: self._send(start, chunk, params, seed)
            )
            for prompt, several in zip(chunk, answers, strict=True):
                completions.extend(_completion(prompt, answer) for answer in several)
            on_progress(start + len(chunk), len(prompts))
        return completions

    def push(self, version: int) -> None:
        """Return when every running replica has proven that it holds `version`, which is live.

        Replicas that are starting load it before they take traffic.
        """
        versions = self._receive(None, lambda: self._handle.broadcast("converge"))
        assert set(versions) == {version}, f"replicas hold {versions} after a push of {version}"

    def _send(self, start: int, chunk: Sequence[Prompt], params: dict[str, Any], seed: str) -> Any:
        seeds = [_seed(f"{seed} {index}") for index in range(start, start + len(chunk))]
        return self._handle.generate.remote([list(prompt.token_ids) for prompt in chunk], seeds, params)

    def _receive(self, response: Any, resend: Callable[[], Any]) -> Any:
        """The result; what a dying replica lost is asked for again.

        SamplerError: replicas die of this very call, or none came back in time.
        """
        deadline, deaths = time.monotonic() + _GIVE_UP_S, 0
        while True:
            try:
                response = response or resend()
                results = response.results() if hasattr(response, "results") else response.result()
                if results:
                    return results
                error: Exception = RuntimeError("no replica is running")
            except (RayActorError, RayServeException, RayTaskError) as lost:
                error = lost
                deaths += isinstance(error, RayActorError | RayTaskError)
            if not _passes(error) or deaths >= _MOST_DEATHS or time.monotonic() > deadline:
                reason = getattr(error, "cause", None) or error
                raise SamplerError(f"the sampler failed ({deaths} replicas died): {reason}") from error
            response = None
            time.sleep(_RETRY_S)


def _passes(error: Exception) -> bool:
    """Whether the call may succeed when a replica that died is back."""
    if isinstance(error, RayTaskError):
        return type(error.cause).__name__ in _DEAD_ENGINE
    return True


def _completion(prompt: Prompt, answer: Answer) -> Completion:
    return Completion(
        prompt=prompt,
        text=answer.text,
        token_ids=answer.token_ids,
        logp=answer.logp,
        policy_version=answer.policy_version,
        finish_reason=answer.finish_reason,
    )


def _chunks(prompts: Sequence[Prompt], num: int) -> Iterator[tuple[int, Sequence[Prompt]]]:
    size = max(1, -(-len(prompts) // num))
    return ((start, prompts[start : start + size]) for start in range(0, len(prompts), size))


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
