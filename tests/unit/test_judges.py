"""A judge is found by its path and held to its contract."""

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_ray.judges import JudgeError, judge_completions, load_judge
from dpo_ray.types import Completion, Judgement, Prompt, ScoredCompletion


def make_completion(text: str, prompt: str = "Why so?") -> Completion:
    return Completion(Prompt(prompt, (1,)), text, (2,), logp=-1.0, policy_version=0, finish_reason="stop")


COMPLETIONS = [make_completion("one"), make_completion("three")]


def judge_length(completions: Sequence[Completion]) -> list[float]:
    return [len(completion.text) for completion in completions]


def returning(verdicts: Any) -> Any:
    return lambda completions: verdicts


def rewards(scored: list[ScoredCompletion]) -> list[float | None]:
    return [one.judgement.reward for one in scored]


def test_each_completion_gets_its_own_judgement() -> None:
    assert judge_completions(judge_length, "length", COMPLETIONS) == [
        ScoredCompletion(COMPLETIONS[0], Judgement(3.0), "length"),
        ScoredCompletion(COMPLETIONS[1], Judgement(5.0), "length"),
    ]


def test_judgements_numbers_and_silence_may_be_mixed() -> None:
    judgement = Judgement(0.5, {"grammatical": 1.0})
    scored = judge_completions(returning([judgement, None]), "mixed", COMPLETIONS)
    assert [one.judgement for one in scored] == [judgement, Judgement(None)]


@pytest.mark.parametrize(
    "verdicts",
    [
        (1, 2.5),
        np.array([1.0, 2.5], dtype=np.float32),
        torch.tensor([1.0, 2.5]),
        [Judgement(np.float32(1)), Judgement(torch.tensor(2.5))],  # pyright: ignore[reportArgumentType]
        iter([1, 2.5]),
    ],
    ids=["tuple", "numpy", "torch", "judgements", "iterator"],
)
def test_rewards_of_any_library_become_python_floats(verdicts: object) -> None:
    scored = judge_completions(returning(verdicts), "numbers", COMPLETIONS)
    assert rewards(scored) == [1.0, 2.5]
    assert all(type(reward) is float for reward in rewards(scored))


@pytest.mark.parametrize("num", [1, 3])
def test_one_judgement_for_each_completion_is_required(num: int) -> None:
    with pytest.raises(JudgeError, match=f"judge short gave {num} judgements for 2 completions: return one"):
        judge_completions(returning([0.0] * num), "short", COMPLETIONS)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [float, Judgement], ids=["number", "judgement"])
def test_a_reward_that_is_not_finite_is_refused(reward: float, wrap: Any) -> None:
    with pytest.raises(ValueError, match=rf"judge moody gave the reward {reward} .*'Why so\?'.* None where"):
        judge_completions(returning([0.0, wrap(reward)]), "moody", COMPLETIONS)


@pytest.mark.parametrize("value", ["0.5", (0, 1), {"reward": 1}, 10**400, np.array([1.0, 2.0])])
def test_what_is_no_reward_is_refused(value: object) -> None:
    with pytest.raises(JudgeError, match=rf"judge odd gave the reward .*\({type(value).__name__}\)"):
        judge_completions(returning([0.0, value]), "odd", COMPLETIONS)


def test_a_metric_that_is_not_finite_is_refused() -> None:
    verdicts = [Judgement(1.0, {"grammatical": math.nan}), None]
    with pytest.raises(JudgeError, match="judge odd gave the grammatical nan"):
        judge_completions(returning(verdicts), "odd", COMPLETIONS)


def test_a_failing_judge_is_named_with_its_error() -> None:
    def fail(completions: Sequence[Completion]) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(
        JudgeError, match=r"judge exam failed on 2 completions, .*: KeyError: 'answer'"
    ) as caught:
        judge_completions(fail, "exam", COMPLETIONS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_judge_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(JudgeError("judge exam failed")))
    assert (type(error), str(error)) == (JudgeError, "judge exam failed")


def test_a_judge_without_completions_is_not_asked() -> None:
    assert judge_completions(returning(None), "idle", []) == []


def test_a_judge_is_found_by_its_import_path() -> None:
    judge = load_judge("dpo_ray.film_reviews:judge_reviews")
    assert len(judge(COMPLETIONS)) == 2


def test_a_judge_of_the_current_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")  # Restores sys.path afterwards.
    (tmp_path / "my_judge_here.py").write_text(
        "def constant(completions):\n    return [1.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    judge = load_judge("my_judge_here:constant")
    assert rewards(judge_completions(judge, "mine", COMPLETIONS)) == [1.0, 1.0]


@pytest.mark.parametrize("path", ["dpo_ray.film_reviews", "dpo_ray.film_reviews:", ":judge_reviews", ""])
def test_a_path_without_module_or_function_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=f"judge.function '{path}' is no import path: write module:function"):
        load_judge(path)


def test_a_missing_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"'no_such_judge' cannot be imported .*ModuleNotFoundError"):
        load_judge("no_such_judge:judge")


def test_a_module_that_breaks_on_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_judge.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'broken_judge' cannot be imported .*ZeroDivisionError: division"):
        load_judge("broken_judge:judge")


@pytest.mark.parametrize("name", ["judge_revews", "VOCABULARY"])
def test_a_missing_function_names_those_that_exist(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'{name}' is no function of 'dpo_ray.film_reviews'.*judge_reviews"
    ):
        load_judge(f"dpo_ray.film_reviews:{name}")
