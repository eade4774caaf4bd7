"""Who says which completion is better."""

from dpo_ray.judges.function import JudgeError, JudgeFunction, judge_completions, load_judge

__all__ = ["JudgeError", "JudgeFunction", "judge_completions", "load_judge"]
