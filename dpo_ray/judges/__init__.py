"""Who says which completion is better."""

from dpo_ray.judges.configured import (
    check_judges,
    make_judge,
    make_single_judge,
    prompt_shares,
    require_judged,
)
from dpo_ray.judges.function import (
    CompareFunction,
    JudgeError,
    JudgeFunction,
    Question,
    judge_completions,
    load_judge,
)

__all__ = [
    "CompareFunction",
    "JudgeError",
    "JudgeFunction",
    "Question",
    "check_judges",
    "judge_completions",
    "load_judge",
    "make_judge",
    "make_single_judge",
    "prompt_shares",
    "require_judged",
]
