"""A judge in a process of its own."""

from collections.abc import Sequence

from dpo_ray.config import JudgeConfig
from dpo_ray.judges.budget import Spending
from dpo_ray.judges.configured import make_judge
from dpo_ray.judges.function import judge_completions
from dpo_ray.storage import Storage
from dpo_ray.types import Completion, ScoredCompletion


class JudgeActor:
    """Makes the judge where it runs: it may hold a model."""

    def __init__(self, config: JudgeConfig, run_dir: str, place: int = 0, live_url: str = "") -> None:
        """`place`: of the actors that share the budget; `live_url`: where the live policy answers."""
        self._name = config.full_name
        spending = Spending(config.budget, Storage(run_dir), place=place, actors=config.actors)
        self._judge = make_judge(config, spending, live_url=live_url)

    def judge(self, completions: Sequence[Completion]) -> list[ScoredCompletion]:
        return judge_completions(self._judge, self._name, completions)
