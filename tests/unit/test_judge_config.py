"""A judge reads the settings of its kind, and no others."""

from typing import Any

import pytest
from pydantic import ValidationError

from dpo_ray.config import IterativeDPOConfig, JudgeConfig
from dpo_ray.run_folder import RunFolder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "x"}, r"pattern=x is not read by a judge of kind function: .* or set kind to regex"),
        ({"kind": "regex"}, "a judge of kind regex needs pattern: set it"),
        ({"kind": "llm", "model": "m"}, "a judge of kind llm needs url: set it"),
        ({"kind": "http", "url": "live"}, "url=live is the run's own policy: set kind to llm"),
        ({"kind": "http", "url": "http://me:pw@host/"}, "take it out, and name api_key_variable"),
        ({"kind": "http", "url": "http://h", "temperature": 1}, "temperature=1.0 is not read .* kind to llm"),
        (
            {"kind": "llm", "url": "http://h", "model": "m", "scale": 5},
            "scale=5 is not read by mode=pairwise",
        ),
        ({"combine": "minimum"}, "combine=minimum needs several judges: add them with plus"),
        ({"plus": [{"kind": "regex"}]}, "a judge of kind regex needs pattern"),
        ({"budget": {"calls": 5}}, "of which there is none: unset it"),
        (
            {"kind": "llm", "url": "http://h", "model": "m", "budget": {"money": 5}},
            "budget.money needs a price: set input_price",
        ),
    ],
)
def test_what_is_not_read_or_is_missing_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        JudgeConfig.model_validate(settings)
    assert "pw@" not in str(caught.value.errors(include_input=False))


def test_a_rule_judges_any_prompts_without_a_function() -> None:
    config = IterativeDPOConfig(prompts="mine.jsonl", judge=JudgeConfig(kind="math"))
    assert config.judge.full_name == "math answer"
    with pytest.raises(
        ValidationError, match=r"the judge of film reviews cannot score prompts of mine.jsonl"
    ):
        IterativeDPOConfig(
            prompts="mine.jsonl", judge=JudgeConfig.model_validate({"kind": "math", "plus": [{}]})
        )


def test_a_run_may_go_on_with_a_larger_budget_and_not_with_another_judge(tmp_path: Any) -> None:
    def config(**judge: Any) -> IterativeDPOConfig:
        given = {"kind": "http", "url": "http://h", "budget": {"calls": 5}, **judge}
        return IterativeDPOConfig(run_dir=str(tmp_path), judge=JudgeConfig.model_validate(given))

    RunFolder(config())
    RunFolder(config(budget={"calls": 10}))
    with pytest.raises(ValueError, match=r"judge.url: http://h there, http://other now"):
        RunFolder(config(url="http://other"))
