"""What the training workers are to do next, kept in a place that outlives them."""

import asyncio
from dataclasses import dataclass
from typing import Any

from dpo_ray.types import Pair, Prompt, Stream, TokenSequence

_POLL_S = 10.0
"""Idle workers hear from rank 0 at least this often, so that no collective times out."""


@dataclass(frozen=True, slots=True)
class TrainRound:
    """Train `parent` on the declared snapshot of `round`, and publish the candidate."""

    round: int
    parent: int
    candidate: int
    seed: int
    canaries: tuple[tuple[int, ...], ...]
    rounds: int = 1
    """Of the whole run: the learning-rate schedule ends with the last."""
    held_out: tuple[Pair, ...] = ()
    """Looked at during the round."""


@dataclass(frozen=True, slots=True)
class ScoreWithStart:
    """Log-probs of completions under version 0."""

    sequences: tuple[TokenSequence, ...]


@dataclass(frozen=True, slots=True)
class EvaluatePairs:
    """Metrics of held-out pairs under a published version."""

    version: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class SamplePolicy:
    """Completions of a published version, and their log-probs under version 0."""

    version: int
    prompts: tuple[Prompt, ...]
    samples_per_prompt: int
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class SendVersion:
    """A published version's files, to the replicas that wait for them; the value says what went wrong."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is over; workers return."""


Work = TrainRound | ScoreWithStart | EvaluatePairs | SamplePolicy | SendVersion
Assignment = Work | Finished


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an assignment: a value, or why it can never succeed."""

    value: Any = None
    error: str | None = None


class TrainerDesk:
    """Holds the one open assignment; workers that were replaced find it here again."""

    def __init__(self) -> None:
        self._open: Assignment | None = None
        self._number = 0
        self._done = asyncio.Event()
        self._changed = asyncio.Event()
        self._outcome = Outcome()
        self._progress = (0, 1)

    async def submit(self, assignment: Assignment) -> Outcome:
        """Wait for the outcome."""
        self._open, self._progress = assignment, (0, 1)
        self._number += 1
        self._done.clear()
        self._changed.set()
        await self._done.wait()
        return self._outcome

    async def take(self) -> tuple[int, Assignment] | None:
        """The open assignment and its number, or None when there was none for a while."""
        try:
            await asyncio.wait_for(self._changed.wait(), _POLL_S)
        except TimeoutError:
            return None
        assert self._open is not None
        return self._number, self._open

    async def finish(self, number: int, outcome: Outcome) -> None:
        """Close an assignment; what a replaced worker says of an earlier one is not heard."""
        if number != self._number:
            return
        self._outcome = outcome
        self._changed.clear()
        self._done.set()

    async def report(self, step: int, num_steps: int) -> None:
        self._progress = (step, num_steps)

    async def progress(self) -> tuple[int, int]:
        """(steps done, steps in all) of the open assignment."""
        return self._progress
