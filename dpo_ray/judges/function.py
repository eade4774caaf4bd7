"""A judge that is any Python function, found by its import path."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import SupportsFloat, cast

from dpo_ray.import_path import load_function
from dpo_ray.types import Completion, Judgement, ScoredCompletion

JudgeFunction = Callable[[Sequence[Completion]], Sequence[Judgement | float | None]]
"""Completions in; for each in order a judgement, a bare reward, or None where it cannot say."""


class JudgeError(ValueError):
    """A judge failed, or gave what is no judgement."""


def load_judge(path: str) -> JudgeFunction:
    """The function at `module:function`; modules of the current directory can be imported."""
    return cast(JudgeFunction, load_function(path, setting="judge.function"))


def judge_completions(
    judge: JudgeFunction, name: str, completions: Sequence[Completion]
) -> list[ScoredCompletion]:
    """Each completion with its judgement, in order; JudgeError where the judge breaks its contract."""
    if not completions:
        return []
    try:
        verdicts = list(judge(completions))
    except Exception as error:
        start = str(completions[0].prompt.text)[:60]
        raise JudgeError(
            f"judge {name} failed on {len(completions)} completions, the first of {start!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if len(verdicts) != len(completions):
        raise JudgeError(
            f"judge {name} gave {len(verdicts)} judgements for {len(completions)} completions: "
            "return one for each, in order"
        )
    return [
        ScoredCompletion(completion, _judgement(verdict, name, completion), name)
        for completion, verdict in zip(completions, verdicts, strict=True)
    ]


def _judgement(verdict: object, name: str, completion: Completion) -> Judgement:
    if verdict is None:
        return Judgement(reward=None)
    if not isinstance(verdict, Judgement):
        return Judgement(reward=_finite(verdict, "reward", name, completion))
    reward = None if verdict.reward is None else _finite(verdict.reward, "reward", name, completion)
    metrics = {key: _finite(value, key, name, completion) for key, value in verdict.metrics.items()}
    return Judgement(reward=reward, metrics=metrics)


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
