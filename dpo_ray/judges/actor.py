"""A judge in a process of its own."""

from collections.abc import Sequence

from dpo_ray.judges.function import judge_completions, load_judge
from dpo_ray.types import Completion, ScoredCompletion


class JudgeActor:
    """Loads the judge where it runs: it may hold a model."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._judge = load_judge(path)

    def judge(self, completions: Sequence[Completion]) -> list[ScoredCompletion]:
        return judge_completions(self._judge, self._path, completions)
