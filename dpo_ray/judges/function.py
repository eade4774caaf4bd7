"""A judge that is any Python function, found by its import path."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, SupportsFloat

from dpo_ray.import_path import load_function
from dpo_ray.types import Completion, Judgement, ScoredCompletion

JudgeFunction = Callable[[Sequence[Completion]], Sequence[Judgement | float | None]]
"""Completions in; for each in order a judgement, a bare reward, or None where it cannot say."""
Question = tuple[Completion, ...]
"""One completion to rate, or two of one prompt to compare."""
CompareFunction = Callable[[Sequence[Question]], Sequence[Judgement | float | None]]
"""The same of two completions each: the reward is the preference for the first, from 0 to 1."""


class JudgeError(ValueError):
    """A judge failed, or gave what is no judgement."""


def load_judge(path: str) -> Callable[..., Any]:
    """The function at `module:function`; modules of the current directory can be imported."""
    return load_function(path, setting="judge.function")


def judge_completions(
    judge: JudgeFunction, name: str, completions: Sequence[Completion]
) -> list[ScoredCompletion]:
    """Each completion with its judgement, in order; JudgeError where the judge breaks its contract."""
    judgements = _ask(judge, name, completions, completions)
    return [
        ScoredCompletion(completion, judgement, name)
        for completion, judgement in zip(completions, judgements, strict=True)
    ]


def ask_to_compare(compare: CompareFunction, name: str, questions: Sequence[Question]) -> list[Judgement]:
    """A preference for each question, in order; JudgeError where the judge breaks its contract."""
    preferences = _ask(compare, name, questions, [first for first, _ in questions])
    for preference in preferences:
        if preference.reward is not None and not 0 <= preference.reward <= 1:
            raise JudgeError(
                f"judge {name} gave the preference {preference.reward:g}: return a number from 0 (the second "
                "completion is better) to 1 (the first is), or None where the judge cannot say"
            )
    return preferences


def _ask(
    judge: Callable[[Any], Sequence[object]],
    name: str,
    asked: Sequence[Any],
    completions: Sequence[Completion],
) -> list[Judgement]:
    if not asked:
        return []
    try:
        verdicts = list(judge(asked))
    except Exception as error:
        start = str(completions[0].prompt.text)[:60]
        raise JudgeError(
            f"judge {name} failed on {len(asked)} completions, the first of {start!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if len(verdicts) != len(asked):
        raise JudgeError(
            f"judge {name} gave {len(verdicts)} judgements for {len(asked)} completions: "
            "return one for each, in order"
        )
    return [_judgement(verdict, name, of) for verdict, of in zip(verdicts, completions, strict=True)]


def _judgement(verdict: object, name: str, completion: Completion) -> Judgement:
    if verdict is None:
        return Judgement(reward=None)
    if not isinstance(verdict, Judgement):
        return Judgement(reward=_finite(verdict, "reward", name, completion))
    return replace(
        verdict,
        reward=None if verdict.reward is None else _finite(verdict.reward, "reward", name, completion),
        metrics={key: _finite(value, key, name, completion) for key, value in verdict.metrics.items()},
        cost=_finite(verdict.cost, "cost", name, completion),
    )


def _finite(value: object, what: str, name: str, completion: Completion) -> float:
    """`value` as a Python float, whichever library's number it is."""
    if isinstance(value, SupportsFloat):
        # float() fails for an array of several numbers, and for an integer beyond all floats.
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            number = float(value)
            if math.isfinite(number):
                return number
    raise JudgeError(
        f"judge {name} gave the {what} {value!r} ({type(value).__name__}) to a completion of "
        f"{str(completion.prompt.text)[:60]!r}: "
        "return a finite reward, a Judgement, or None where the judge cannot say"
    )
