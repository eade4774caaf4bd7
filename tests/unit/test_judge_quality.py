"""How far a judge can be trusted is measured, and shown."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from judged import answers

from dpo_ray.buffer import PreferenceBuffer, SnapshotQuery
from dpo_ray.config import JudgeConfig, JudgeQualityConfig
from dpo_ray.judges import Question
from dpo_ray.judges.__main__ import judge_settings, main, measure, read_questions
from dpo_ray.judges.pairwise import pairwise_judge
from dpo_ray.judges.quality import as_questions, measure_judge
from dpo_ray.types import Completion, Pair

PAIRS = [
    Pair("Why?", better, worse, (1,), (2,), (3,), source="human", round=0, judge=better)
    for better, worse in [("a b c", "a"), ("b b", "c"), ("c", "c d e"), ("d", "e")]
]


def by_length(completions: Sequence[Completion]) -> list[float | None]:
    return [float(len(completion.text)) for completion in completions]


def test_agreement_is_the_share_of_pairs_in_which_people_say_the_same() -> None:
    quality = measure_judge(by_length, "length", as_questions(PAIRS))
    assert quality.agreement == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert (quality.self_agreement, quality.unjudged, quality.pairs) == (1.0, 0.0, 4)
    assert math.isnan(quality.first_wins)


def test_a_judge_that_changes_its_mind_does_not_agree_with_itself() -> None:
    calls: list[int] = []

    def moody(completions: Sequence[Completion]) -> list[float]:
        calls.append(1)
        return [len(each.text) * (-1.0 if len(calls) == 2 else 1.0) for each in completions]

    assert measure_judge(moody, "moody", as_questions(PAIRS)).self_agreement == 0.25  # The tie stays one.


def test_what_it_could_not_say_is_no_disagreement() -> None:
    def silent_on_c(completions: Sequence[Completion]) -> list[float | None]:
        return [None if each.text.startswith("c") else float(len(each.text)) for each in completions]

    quality = measure_judge(silent_on_c, "silent", as_questions(PAIRS))
    assert (quality.unjudged, quality.agreement) == (0.5, 0.75)


def test_a_bias_for_the_first_place_shows() -> None:
    def mostly_first(questions: Sequence[Question]) -> list[float]:
        return [0.0 if one.text == "a" else 1.0 for one, _ in questions]

    judge = pairwise_judge(mostly_first, "first", both_orders=True)
    quality = measure_judge(judge, "first", as_questions(PAIRS))
    assert quality.first_wins == pytest.approx(7 / 8)
    assert quality.flips == pytest.approx(3 / 4)


def test_in_one_order_the_better_side_is_not_always_first() -> None:
    judge = pairwise_judge(lambda questions: [1.0] * len(questions), "first", both_orders=False)
    assert measure_judge(judge, "first", as_questions(PAIRS)).agreement == 0.5


def test_votes_of_people_are_read_from_the_runs_snapshots(
    buffer: PreferenceBuffer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Pair("Why?", "z", "y", (1,), (8,), (9,), source="judge")
    buffer.put([*PAIRS, machine])
    for round_ in range(2):
        query = SnapshotQuery(max_round=round_, min_policy_version=0, limit=99, seed=0)
        buffer.declare_snapshot(query, live_version=0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"judge": {"kind": "regex", "pattern": "b"}}))
    config = JudgeQualityConfig(run_dir=str(tmp_path))
    assert sorted(one.text for one, _ in read_questions(config)) == ["a b c", "b b", "c", "d"]
    main(config)
    printed = capsys.readouterr().out
    assert "regex b" in printed
    assert "0.750" in printed  # Two pairs are right, two are ties.


def test_settings_that_are_given_beat_the_runs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"judge": {"kind": "regex", "pattern": "b"}}))
    given = JudgeConfig(kind="regex", pattern="z")
    assert judge_settings(JudgeQualityConfig(run_dir=str(tmp_path), judge=given)) == given


def test_each_judge_of_several_is_measured_on_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "2+2?", "chosen": "4", "rejected": "5", "answer": "4"}\n')
    settings: dict[str, Any] = {"kind": "exact", "plus": [{"kind": "regex", "pattern": "5"}]}
    questions = read_questions(JudgeQualityConfig(pairs=str(file)))
    rows = measure(JudgeConfig.model_validate(settings), questions)
    assert [(row.judge, row.agreement) for row in rows] == [("exact answer", 1.0), ("regex 5", 0.0)]


def test_why_nothing_was_judged_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "2+2?", "chosen": "4", "rejected": "5"}\n')
    gone = JudgeConfig(kind="llm", url="http://127.0.0.1:9/v1", model="m", retries=0)
    main(JudgeQualityConfig(pairs=str(file), judge=gone))
    assert "llm m left out: APIConnectionError" in capsys.readouterr().out


def test_a_run_without_votes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(JudgeQualityConfig(run_dir=str(tmp_path)))
    assert "no pairs that people judged in the snapshots of" in capsys.readouterr().err


def test_pairs_of_one_prompt_are_not_compared_with_each_other() -> None:
    assert len({question[0].prompt.token_ids for question in as_questions(PAIRS)}) == len(PAIRS)
    assert len({completion.prompt.token_ids for completion in answers("a", "b")}) == 1
