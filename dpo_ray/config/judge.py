"""Who gives the rewards."""

from pydantic import Field

from dpo_ray.config.section import Section


class JudgeConfig(Section):
    """Who says which completion is better."""

    function: str = "dpo_ray.film_reviews:judge_reviews"
    """Import path `module:function` of a judge: a list of completions in, a list of judgements out."""
    actors: int = Field(default=1, ge=1)
    """Judge actors; completions are divided among them."""
    cpus_per_actor: float = Field(default=1, ge=0)
    """CPUs that each judge actor reserves in Ray."""
