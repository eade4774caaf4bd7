"""The examples do what their texts say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_ray import lm_head
from dpo_ray.config import IterativeDPOConfig, JudgeConfig, parse_config
from dpo_ray.judges import JudgeFunction, judge_completions, load_judge, make_judge
from dpo_ray.judges.budget import Spending
from dpo_ray.losses import PairLogps
from dpo_ray.pairing import make_pairs
from dpo_ray.types import Completion, Judgement, Prompt, ScoredCompletion
from examples import custom_loss

ROOT = Path(__file__).resolve().parents[2]
KEY = "They eat 3 + 4 = <<3+4=7>>7 eggs.\nSo she sells 16 - 7 = 9 eggs.\n#### "


def completion(text: str, *, num_tokens: int = 3, fields: dict[str, object] | None = None) -> Completion:
    prompt = Prompt("How much?", (1, 2), fields or {})
    return Completion(prompt, text, tuple(range(num_tokens)), -1.0, 0, "stop")


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a job is started, and its judge is found by an import path."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture
def exact_answer(in_root: None) -> JudgeFunction:
    return load_judge("examples.judge:exact_answer")


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("18", "She makes 9 * 2 = 18 dollars.", 1.0),
        ("18", "She makes 9 * 2 = $18.00 every day.", 1.0),
        ("18", "18 eggs at first, so 17 in the end.", 0.0),
        ("18", "I cannot say.", 0.0),
        ("18", "", 0.0),
        ("1,234", "In all 1234.", 1.0),
        ("1234", "In all 1,234, give or take nothing.", 1.0),
        ("-5", "It is -5 degrees.", 1.0),
        ("5", "It is -5 degrees.", 0.0),
        ("5", "What is left is 10-5.", 1.0),
        ("0.5", "Half of it, 0.50", 1.0),
    ],
)
def test_the_last_number_is_the_answer(
    exact_answer: JudgeFunction, answer: str, text: str, reward: float
) -> None:
    assert exact_answer([completion(text, fields={"answer": KEY + answer})]) == [reward]


@pytest.mark.parametrize("fields", [{}, {"answer": None}, {"answer": "7"}, {"answer": "#### none"}])
def test_without_a_right_answer_the_judge_cannot_say(
    exact_answer: JudgeFunction, fields: dict[str, object]
) -> None:
    assert exact_answer([completion("It is 7.", fields=fields)]) == [None]


def test_each_completion_is_judged_by_its_own_row(exact_answer: JudgeFunction) -> None:
    rows: list[dict[str, object]] = [{"answer": "#### 7"}, {}, {"answer": "#### 8"}]
    assert exact_answer([completion("7", fields=row) for row in rows]) == [1.0, None, 0.0]


def test_the_shorter_answer_is_the_better_one(in_root: None) -> None:
    judge = load_judge("examples.judge:shorter_is_better")
    assert judge([completion("so", num_tokens=1), completion("and so on", num_tokens=4)]) == [-1.0, -4.0]


def answered(text: str, reward: float | None) -> ScoredCompletion:
    return ScoredCompletion(completion(text, num_tokens=len(text)), Judgement(reward), "taste")


def test_a_rule_of_ones_own_is_one_line_of_the_settings(in_root: None) -> None:
    job = ["--pairing.rule", "examples.pair_rule:shortest_best"]
    pairing = parse_config(IterativeDPOConfig, job).pairing
    candidates = [
        *(answered("right, at length", 1), answered("right", 1)),
        *(answered("wrong, at length", 0), answered("no", 0), answered("unjudged", None)),
    ]
    (pair,) = make_pairs(candidates, pairing, round_=0, seed=0).pairs
    assert (pair.chosen, pair.rejected) == ("right", "no")


def test_a_judge_and_a_rule_of_ones_own_make_the_pairs(in_root: None) -> None:
    judge, rule = "examples.judge:exact_answer", "examples.pair_rule:shortest_best"
    job = ["--prompts", "questions.jsonl", "--judge.function", judge, "--pairing.rule", rule]
    config = parse_config(IterativeDPOConfig, job)
    fields: dict[str, object] = {"answer": "#### 7"}
    texts = ["It is certainly 7", "7", "It is 8, I think", "so 8"]
    completions = [completion(text, num_tokens=len(text), fields=fields) for text in texts]
    scored = judge_completions(load_judge(config.judge.function), judge, completions)
    (pair,) = make_pairs(scored, config.pairing, round_=0, seed=0).pairs
    assert (pair.chosen, pair.rejected) == ("7", "so 8")
    assert (pair.judge, pair.chosen_reward, pair.rejected_reward) == (judge, 1.0, 0.0)


def test_what_repeats_itself_loses(in_root: None) -> None:
    config = JudgeConfig(kind="pairwise", function="examples.judge:says_it_once")
    judge = make_judge(config, Spending(config.budget))
    texts = ("so so so", "so it is", "so it so")
    said = [each for each in judge([completion(text) for text in texts]) if isinstance(each, Judgement)]
    rewards = [each.reward or 0.0 for each in said]
    assert rewards == pytest.approx([1 / 4, 3 / 4, 1 / 2])


def test_the_client_tells_its_options() -> None:
    ended = subprocess.run(
        [sys.executable, "examples/client.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--base_url" in ended.stdout
    assert "http://127.0.0.1:8000/v1" in ended.stdout


def test_the_custom_loss_is_paid_until_the_target_is_reached() -> None:
    margin, zeros, ones = torch.tensor([0.0, 5.0, 20.0]), torch.zeros(3), torch.ones(3)
    logps = PairLogps(margin, zeros, zeros, zeros, ones, ones)
    # At beta 0.1 the target is a margin of 10 nats.
    assert custom_loss.squared_hinge_loss(logps, beta=0.1).tolist() == [1.0, 0.25, 0.0]


@pytest.mark.parametrize("tile_bytes", [1, 2**26])
def test_the_custom_loss_begins_at_one_and_is_learned(
    tile_bytes: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(lm_head._TILE_BYTES, "cpu", tile_bytes)  # One pair at a time, or all at once.
    custom_loss.main(["--model", str(tiny_model), "--batch_size", "8", "--steps", "3"])
    first, *_, last = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert first == 1.0
    assert last < 0.99
