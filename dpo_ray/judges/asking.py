"""Questions to a service that may be slow, fail, answer nonsense, and cost money."""

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from dpo_ray.config import JudgeTerm
from dpo_ray.judges.answers import AnswerCache, question_key
from dpo_ray.judges.budget import BudgetSpentError, Call, Spending, Usage
from dpo_ray.judges.function import Question
from dpo_ray.types import Judgement

BUDGET = "budget"
"""Why a completion has no reward where the budget is spent."""
_LONGEST_WAIT_S = 60.0


class CallError(Exception):
    """A call failed and cost nothing; another may not fail."""


class LateCallError(CallError):
    """No answer in time: it may have been made, and cost, nevertheless."""


class HopelessCallError(CallError):
    """A call failed, as would any that repeats it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a service said."""

    text: str
    used: Usage


class Service(Protocol):
    """A judge at the other end of a network."""

    identity: str
    """Whatever decides its answers, but for the questions."""
    batch_size: int
    """Questions per call."""

    def most(self, questions: Sequence[Question]) -> Usage:
        """The most that a call can use."""
        ...

    def call(self, questions: Sequence[Question]) -> Reply:
        """CallError: there was no reply."""
        ...

    def rewards(self, text: str, questions: Sequence[Question]) -> list[float | None]:
        """One for each question, in order. ValueError: the reply is nonsense."""
        ...


class Asker:
    """Asks each question once, several at a time, again where that fails, and not beyond the budget."""

    def __init__(self, service: Service, term: JudgeTerm, spending: Spending) -> None:
        self._service = service
        self._term = term
        self._spending = spending
        self._cache = AnswerCache() if term.keep_answers else None

    def __call__(self, questions: Sequence[Question]) -> list[Judgement]:
        """A judgement for each, in order; where there was no answer, without a reward and with the reason."""
        keys = [question_key(self._service.identity, question) for question in questions]
        known = self._cache.read(keys) if self._cache else {}
        judgements = {key: _judgement(reward, cached=1.0) for key, reward in known.items()}
        unknown = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        order, size = list(unknown), self._service.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        with ThreadPoolExecutor(self._term.concurrency) as pool:
            for answers in pool.map(lambda batch: self._ask({key: unknown[key] for key in batch}), batches):
                judgements |= answers
        return _in_order(keys, judgements)

    def _ask(self, questions: dict[str, Question]) -> dict[str, Judgement]:
        """By key; where the last attempt failed too, without rewards."""
        attempts = [self._try(list(questions.values()))]
        while not attempts[-1].is_final and len(attempts) <= self._term.retries:
            time.sleep(_wait_s(self._term.backoff_s, len(attempts)))
            attempts.append(self._try(list(questions.values())))
        rewards, reason = attempts[-1].rewards, attempts[-1].reason
        if rewards is not None and self._cache:
            self._cache.write(dict(zip(questions, rewards, strict=True)))
        cost = sum(attempt.cost for attempt in attempts) / len(questions)
        retries = float(len(attempts) - 1)
        return {
            key: _judgement(reward, retries=retries, cost=cost, reason=reason)
            for key, reward in zip(questions, rewards or [None] * len(questions), strict=True)
        }

    def _try(self, questions: list[Question]) -> "_Attempt":
        try:
            with self._spending.call(self._service.most(questions)) as call:
                return self._call(questions, call)
        except BudgetSpentError:
            return _Attempt(reason=BUDGET)

    def _call(self, questions: list[Question], call: Call) -> "_Attempt":
        try:
            reply = self._service.call(questions)
        except LateCallError as error:
            return _Attempt(reason=str(error), cost=call.used.money, is_final=False)
        except CallError as error:
            call.used = Usage(calls=1)
            return _Attempt(reason=str(error), is_final=isinstance(error, HopelessCallError))
        call.used = reply.used
        try:
            return _Attempt(self._service.rewards(reply.text, questions), cost=call.used.money)
        except ValueError as error:
            return _Attempt(reason=f"nonsense: {error}", cost=call.used.money, is_final=False)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What came of one call."""

    rewards: list[float | None] | None = None
    reason: str = ""
    cost: float = 0.0
    is_final: bool = True


def _judgement(
    reward: float | None, *, retries: float = 0.0, cached: float = 0.0, cost: float = 0.0, reason: str = ""
) -> Judgement:
    """With every metric in every judgement, so that their means are shares of all."""
    metrics = {
        "unjudged": float(reward is None),
        "unjudged_budget": float(reason == BUDGET),
        "retries": retries,
        "cached": cached,
    }
    why = "" if reward is not None else reason or "the judge could not say"
    return Judgement(reward, metrics, cost=cost, reason=why)


def _in_order(keys: Sequence[str], judgements: dict[str, Judgement]) -> list[Judgement]:
    """One for each key; the answer to a question that was asked before cost nothing more."""
    answers: list[Judgement] = []
    seen: set[str] = set()
    for key in keys:
        judgement = judgements[key]
        repeated = _judgement(judgement.reward, cached=1.0, reason=judgement.reason)
        answers.append(repeated if key in seen else judgement)
        seen.add(key)
    return answers


def _wait_s(backoff_s: float, retry: int) -> float:
    """Twice as long before each next one, and varied, so that those who failed together come back apart."""
    return min(_LONGEST_WAIT_S, backoff_s * 2 ** (retry - 1)) * random.uniform(0.5, 1.5)
