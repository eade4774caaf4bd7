"""Judges by rule: what the completion must contain, or must come to."""

import gzip
import json
from pathlib import Path

import pytest
from judged import answers, judgements, rewards

from dpo_ray.config import JudgeConfig
from dpo_ray.judges import check_judges, make_judge
from dpo_ray.judges.budget import Spending
from dpo_ray.types import Completion, Judgement

GSM8K = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def ask(completions: list[Completion], **settings: object) -> list[float | None]:
    config = JudgeConfig.model_validate(settings)
    return rewards(make_judge(config, Spending(config.budget))(completions))


def test_a_pattern_is_found_or_not() -> None:
    assert ask(answers("It is 7.", "It is seven."), kind="regex", pattern=r"\b\d+\b") == [1.0, 0.0]


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"judge.pattern '\(' is no regular expression"):
        check_judges(JudgeConfig(kind="regex", pattern="("))


def test_an_exact_answer_is_the_key_and_nothing_else() -> None:
    assert ask(answers(" Paris\n", "paris", "Paris.", answer="Paris"), kind="exact") == [1.0, 0.0, 0.0]
    assert ask(answers("so\n#### 9", "9", answer="3 + 6\n#### 9"), kind="exact") == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["exact", "math"])
def test_without_a_key_a_verifier_cannot_say(kind: str) -> None:
    assert ask(answers("9"), kind=kind) == [None]
    assert ask(answers("9", answer=None), kind=kind) == [None]
    assert ask(answers("9", answer="9", other="8"), kind=kind, column="other") == [0.0]


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("#### 72", "So she has 72 clips.", "So she has 71 clips."),
        ("#### 1,000", "It costs $1000.", "It costs $100."),
        ("1/2", r"The share is \\boxed{\\frac{2}{4}}", "The share is 2"),
        ("0.5", "half, which is 1/2", "nothing"),
        ("#### -3", "x = -3", "x = 3"),
    ],
)
def test_mathematics_is_compared_as_such(key: str, right: str, wrong: str) -> None:
    assert ask(answers(right, wrong, "", answer=key), kind="math") == [1.0, 0.0, 0.0]


def test_what_takes_for_ever_to_compute_is_no_low_score() -> None:
    judge = make_judge(JudgeConfig(kind="math"), Spending(JudgeConfig().budget))
    [judgement] = judgements(judge(answers("$9^{9^{9^{9}}}$", answer="7")))
    assert judgement == Judgement(None, reason="TimeoutException")


def test_gold_answers_of_gsm8k_verify_and_altered_ones_do_not() -> None:
    file = GSM8K / "gsm8k-test.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    rows = [json.loads(line) for line in file.read_text().splitlines()][:100]
    for row in rows:
        solution, _, key = row["answer"].rpartition("#### ")
        number = int(key.replace(",", ""))
        written = (
            f"{solution}The answer is {number}.",
            f"{solution}#### {key}",
            f"{solution}The answer is {number + 1}.",
        )
        assert ask(answers(*written, answer=row["answer"]), kind="math") == [1.0, 1.0, 0.0], row


def test_training_keys_of_gsm8k_are_all_read() -> None:
    file = GSM8K / "gsm8k-train.jsonl.gz"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    completions = [answers("", answer=row["answer"])[0] for row in rows[::50]]
    assert set(ask(completions, kind="math")) == {0.0}
