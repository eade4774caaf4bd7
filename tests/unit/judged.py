"""Completions to judge, and what judges say of them."""

from collections.abc import Sequence

from dpo_ray.types import Completion, Judgement, Prompt


def answers(*texts: str, prompt: str = "Why so?", **fields: object) -> list[Completion]:
    """Completions of one prompt."""
    asked = Prompt(prompt, tuple(prompt.encode()), fields)
    return [
        Completion(asked, text, (2,), logp=-1.0, policy_version=4, finish_reason="stop") for text in texts
    ]


def rewards(verdicts: Sequence[Judgement | float | None]) -> list[float | None]:
    return [each.reward if isinstance(each, Judgement) else each for each in verdicts]


def judgements(verdicts: Sequence[Judgement | float | None]) -> list[Judgement]:
    assert all(isinstance(each, Judgement) for each in verdicts)
    return [each for each in verdicts if isinstance(each, Judgement)]
