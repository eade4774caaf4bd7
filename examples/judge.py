"""Judges of your own: any function from completions to rewards, named by `--judge.function module:function`.

A judge is called with a list of completions and gives, in the same order, one reward for each: a finite
number, or None where it cannot say. Completions without a reward are never paired, so None is not a low
score. Where a curve of something else is wanted too, a judge gives a `dpo_ray.types.Judgement` instead of
the bare number. It runs in a process of its own, is imported there once, and may be called again with the
same completions after a crash.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

from dpo_ray.judges import Question
from dpo_ray.types import Completion

# A minus right after a digit is a subtraction, not a sign.
_NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")


def exact_answer(completions: Sequence[Completion]) -> list[float | None]:
    """Rewards for GSM8K: 1.0 where the last number of the answer is the right one, else 0.0.

    The right number comes after the last "####" of the column `answer` in the prompt's row: the columns
    beside the prompt are in `completion.prompt.fields`. None where the row has no such answer.
    """
    return [_exact(completion) for completion in completions]


def shorter_is_better(completions: Sequence[Completion]) -> list[float]:
    """The smallest judge: needs no answer key, and works with any prompts."""
    return [-float(len(completion.token_ids)) for completion in completions]


def says_it_once(questions: Sequence[Question]) -> list[float]:
    """A judge that compares, for `--judge.kind pairwise`: of two completions, which repeats itself less.

    A preference goes from 0 (the second is better) over 0.5 (a tie) to 1 (the first is).
    """
    return [
        (1 + _distinct_share(first.text) - _distinct_share(second.text)) / 2 for first, second in questions
    ]


def _distinct_share(text: str) -> float:
    words = text.split()
    return len(set(words)) / max(1, len(words))


def _exact(completion: Completion) -> float | None:
    _, mark, key = str(completion.prompt.fields.get("answer") or "").rpartition("####")
    right = _last_number(key) if mark else None
    if right is None:
        return None
    return 1.0 if _last_number(completion.text) == right else 0.0


def _last_number(text: str) -> Decimal | None:
    """None where there is no number. "1,000" and "1000.0" are the same one."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
