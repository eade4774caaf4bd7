"""Judges that check an answer by a rule: a regular expression, or a column with the right answer."""

import re
import threading
from collections.abc import Sequence

from math_verify import parse, verify
from math_verify.errors import TimeoutException

from dpo_ray.judges.function import JudgeFunction
from dpo_ray.types import Completion, Judgement

_KEY_MARK = "####"
"""GSM8K (arXiv:2110.14168) writes the answer after its solution and this mark."""
_TIMEOUT_S = 2


def regex_judge(pattern: str) -> JudgeFunction:
    """1 for completions in which the pattern is found, else 0. ValueError: it is no pattern."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"judge.pattern {pattern!r} is no regular expression: {error}") from None
    return lambda completions: [float(bool(compiled.search(each.text))) for each in completions]


def exact_judge(column: str) -> JudgeFunction:
    """1 where the completion is the right answer, white space around it aside, else 0; None without a key."""

    def judge(completions: Sequence[Completion]) -> list[float | None]:
        keys = [answer_key(each, column) for each in completions]
        return [
            None if key is None else float(final_answer(each.text) == key)
            for each, key in zip(completions, keys, strict=True)
        ]

    return judge


def math_judge(column: str) -> JudgeFunction:
    """1 where the completion's last expression equals the right one, else 0; None without a key."""

    def judge(completions: Sequence[Completion]) -> list[Judgement]:
        return [_equals(answer_key(each, column), each.text) for each in completions]

    return judge


def answer_key(completion: Completion, column: str) -> str | None:
    """The right answer of the prompt's row; None where it has none."""
    value = completion.prompt.fields.get(column)
    return (final_answer(str(value)) or None) if value is not None else None


def final_answer(text: str) -> str:
    """What follows the last `####`, or all of a text without one."""
    return text.rpartition(_KEY_MARK)[2].strip()


def _equals(key: str | None, text: str) -> Judgement:
    if key is None:
        return Judgement(None)
    # The library's clock is a signal, which only a main thread gets; a policy can write what takes for ever.
    seconds = _TIMEOUT_S if threading.current_thread() is threading.main_thread() else 0
    try:
        right = parse(f"${key}$", parsing_timeout=seconds, raise_on_error=True)
        given = parse(final_answer(text), parsing_timeout=seconds, raise_on_error=True)
        is_equal = verify(right, given, timeout_seconds=seconds, raise_on_error=True)
    except (TimeoutException, Exception) as error:
        return Judgement(None, reason=type(error).__name__)
    return Judgement(float(is_equal) if right else None)
