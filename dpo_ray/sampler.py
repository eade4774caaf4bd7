"""Completions of the live policy, and the push of a new one: the job's side of the deployment."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from dpo_ray.types import Completion, Prompt, Stream

_CHUNKS_PER_REPLICA = 4
_RETRY_S = 1.0
_MOST_DEATHS = 5
"""A call that so many replicas have died of is not sent to a further one."""
_DEAD_ENGINE = ("EngineDeadError", "EngineGenerateError")
"""What vLLM raises in a replica whose engine is gone, by name: the library does not import vLLM."""
_REFUSAL = "StaleWeightsError"
"""What a replica raises that cannot prove the version that it should hold."""
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
    """The live policy does not answer."""


class RefusedError(SamplerError):
    """The replicas do not take a version, or it was taken back before it was evaluated."""


class Sampler:
    """Samples many prompts over all replicas, and outlives the death of any of them."""

    def __init__(self, handle: DeploymentHandle, *, replicas: int) -> None:
        self._handle = handle
        self._replicas = replicas
        self._waiting = ThreadPoolExecutor(1)

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
            completions.extend(_completion(*pair) for pair in _with_prompts(chunk, answers))
            on_progress(start + len(chunk), len(prompts))
        return completions

    def sample_as(
        self,
        version: int,
        prompts: Sequence[Prompt],
        params: dict[str, Any],
        *,
        seed: str,
        is_on_offer: Callable[[], bool],
    ) -> list[Completion]:
        """The same of a version that is not live, by the replica that holds it; while none does, wait for it.

        RefusedError: it is not on offer any more.
        """
        seeds = _seeds(seed, 0, prompts)
        token_ids = [list(prompt.token_ids) for prompt in prompts]

        def ask() -> Any:
            if not is_on_offer():
                raise RefusedError(f"version {version} was withdrawn before it was evaluated")
            return self._handle.broadcast("sample_as", version, token_ids, seeds, params)

        answers = self._receive(None, ask, accept=_first)
        return [_completion(*pair) for pair in _with_prompts(prompts, answers)]

    def converge(self) -> set[int]:
        """The versions that all running replicas hold, proven, now that each has looked what it should hold.

        Replicas that are starting look for themselves. RefusedError: one cannot prove what it should hold.
        """
        states = self._receive(None, lambda: self._handle.broadcast("converge"))
        return {state.version for state in states}

    def receivers(self) -> list[str]:
        """One replica of each node."""
        states = self._receive(None, lambda: self._handle.broadcast("describe"))
        return sorted({state.node: state.replica for state in states}.values())

    def receive(self, stream: Stream) -> "Future[list[Any]]":
        """Have them take what is being sent; for each replica an error, what went wrong, or nothing."""
        response = self._handle.broadcast("receive", stream)
        # The call goes out when its results are asked for, and the sender waits for it.
        return self._waiting.submit(lambda: response.results(return_exceptions=True))

    def push(self, version: int) -> None:
        """Return when every running replica has proven that it holds `version`, which is live."""
        held = self.converge()
        if held != {version}:
            raise RefusedError(
                f"replicas hold {sorted(held)} after a push of {version}: LIVE has moved again"
            )

    def _send(self, start: int, chunk: Sequence[Prompt], params: dict[str, Any], seed: str) -> Any:
        token_ids = [list(prompt.token_ids) for prompt in chunk]
        return self._handle.generate.remote(token_ids, _seeds(seed, start, chunk), params)

    def _receive(
        self,
        response: Any,
        resend: Callable[[], Any],
        *,
        accept: Callable[[Any], Any] = lambda answers: answers,
    ) -> Any:
        """What `accept` takes of the answers; what a dying replica lost is asked for again.

        RefusedError, SamplerError: replicas refuse or die of this very call, or none came back in time.
        """
        deadline, deaths = time.monotonic() + _GIVE_UP_S, 0
        while True:
            try:
                response = response or resend()
                results = response.results() if hasattr(response, "results") else response.result()
                if accepted := accept(results):
                    return accepted
                error: Exception = RuntimeError("no replica that could answer is running")
            except (RayActorError, RayServeException, RayTaskError) as lost:
                error = lost
                deaths += isinstance(error, RayActorError | RayTaskError)
            if not _passes(error) or deaths >= _MOST_DEATHS or time.monotonic() > deadline:
                raise _failure(error, deaths) from error
            response = None
            time.sleep(_RETRY_S)


def _failure(error: Exception, deaths: int) -> SamplerError:
    reason = getattr(error, "cause", None) or error
    if type(reason).__name__ == _REFUSAL:
        return RefusedError(str(reason))
    return SamplerError(f"the sampler failed ({deaths} replicas died): {reason}")


def _first(answers: Sequence[Any]) -> Any:
    """That of a replica which holds the version; the others answer None."""
    return next((answer for answer in answers if answer is not None), None)


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


def _with_prompts(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]
) -> Iterator[tuple[Prompt, Answer]]:
    """Each answer with its prompt, those to one prompt in a row."""
    for prompt, several in zip(prompts, answers, strict=True):
        yield from ((prompt, answer) for answer in several)


def _seeds(seed: str, start: int, prompts: Sequence[Prompt]) -> list[int]:
    """By place among all prompts of a call, of which these are the part that begins at `start`."""
    texts = [f"{seed} {index}" for index in range(start, start + len(prompts))]
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts]
