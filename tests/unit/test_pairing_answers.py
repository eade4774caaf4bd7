"""A row's own answer is chosen, with the tokens that offline data would have."""

from pathlib import Path
from typing import Any

import pytest
from characters import CHAT, EOS, PLAIN, assistant, codes, load_row, user, write_jsonl
from scored import config

from dpo_ray.pairing import AnswerReader, make_pairs
from dpo_ray.prompts import load_prompts
from dpo_ray.types import Completion, Judgement, Message, Prompt, ScoredCompletion


def load_prompt(folder: Path, tokenizer: Any = PLAIN, **row: object) -> Prompt:
    source = str(write_jsonl(folder / "prompts.jsonl", row))
    loaded = load_prompts(source, split="train", column="prompt", tokenizer=tokenizer, max_tokens=1000)
    return loaded.prompts[0]


def answered(prompt: Prompt, text: str, reward: float | None = 0.0) -> ScoredCompletion:
    completion = Completion(prompt, text, (*codes(text), EOS), -2.0, 3, "stop")
    return ScoredCompletion(completion, Judgement(reward, cost=1.0), "taste")


CHAT_PROMPT: list[Message] = [user("Hi")]
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "answer"),
    [
        (PLAIN, "Q: ", "yes"),
        (PLAIN, "the a", "b goes on"),  # "ab" would be one token.
        (PLAIN, "Q", "ends<eos>"),
        (CHAT, CHAT_PROMPT, "Hello"),
        (CHAT, CHAT_PROMPT, [assistant("Hello")]),
        (CHAT, CHAT_PROMPT, [*CHAT_PROMPT, assistant("Hello")]),
    ],
)
def test_an_answers_tokens_are_those_of_offline_data(
    tmp_path: Path, tokenizer: Any, prompt: object, answer: object
) -> None:
    asked = load_prompt(tmp_path, tokenizer, prompt=prompt, key=answer)
    read = AnswerReader("key", tokenizer, 1000)(asked)
    offline = load_row(tmp_path, tokenizer, prompt=prompt, completion=answer, label=True)
    assert read == (offline.chosen, offline.chosen_ids)
    assert offline.prompt_ids == asked.token_ids


def test_an_answer_ends_with_the_token_that_ends_a_turn(tmp_path: Path) -> None:
    reader = AnswerReader("key", CHAT, 1000)
    read = reader(load_prompt(tmp_path, CHAT, prompt=CHAT_PROMPT, key="No"))
    assert read == ([assistant("No")], (*codes("No"), EOS))


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_the_answer_of_a_transcript_is_what_follows_the_prompt(tmp_path: Path, tokenizer: Any) -> None:
    row = {"chosen": f"{TRANSCRIPT} Hello", "rejected": f"{TRANSCRIPT} Bye"}
    asked = load_prompt(tmp_path, tokenizer, **row)
    read = AnswerReader("chosen", tokenizer, 1000)(asked)
    offline = load_row(tmp_path, tokenizer, **row)
    assert asked.token_ids == offline.prompt_ids
    assert read == (offline.chosen, offline.chosen_ids)


@pytest.mark.parametrize(
    "fields",
    [{}, {"key": None}, {"key": "  "}, {"key": "x" * 20}, {"key": [user("Other"), assistant("Hello")]}],
    ids=["no column", "null", "blank", "too long", "of another prompt"],
)
def test_what_is_no_answer_to_the_prompt_is_none(tmp_path: Path, fields: dict[str, object]) -> None:
    asked = load_prompt(tmp_path, CHAT, prompt=CHAT_PROMPT, **fields)
    assert AnswerReader("key", CHAT, 16)(asked) is None


def test_the_answer_is_chosen_and_the_worst_completion_rejected(tmp_path: Path) -> None:
    asked = load_prompt(tmp_path, prompt="Q", key="right")
    candidates = [answered(asked, "best", 2), answered(asked, "worst", -1), answered(asked, "unjudged", None)]
    pairing = config("answer_vs_worst", answer_column="key")
    answer_of = AnswerReader("key", PLAIN, 1000)
    (pair,) = make_pairs(candidates, pairing, round_=4, seed=0, answer_of=answer_of).pairs
    assert (pair.prompt_ids, pair.chosen, pair.rejected) == (codes("Q"), "right", "worst")
    assert (pair.chosen_ids, pair.rejected_ids) == ((*codes("right"), EOS), (*codes("worst"), EOS))
    assert (pair.chosen_reward, pair.rejected_reward) == (None, -1)
    assert (pair.chosen_logp, pair.rejected_logp) == (None, -2.0)
    assert (pair.policy_version, pair.round, pair.source, pair.judge) == (3, 4, "rule", "taste")
    assert pair.cost == 1.0


@pytest.mark.parametrize(
    ("text", "token_ids"),
    [("right", codes("right")), ("right ", (*codes("right"), EOS))],
    ids=["the same text, cut off", "the same tokens"],
)
def test_prompts_without_an_answer_and_repeated_answers_are_counted(
    tmp_path: Path, text: str, token_ids: tuple[int, ...]
) -> None:
    with_key = load_prompt(tmp_path, prompt="Q", key="right")
    repeated = ScoredCompletion(
        Completion(with_key, text, token_ids, -2.0, 3, "stop"), Judgement(0.0), "taste"
    )
    without = load_prompt(tmp_path, prompt="P", other="right")
    pairing, answer_of = config("answer_vs_worst", answer_column="key"), AnswerReader("key", PLAIN, 1000)
    candidates = [repeated, answered(without, "wrong")]
    made = make_pairs(candidates, pairing, round_=0, seed=0, answer_of=answer_of)
    assert made.pairs == []
    assert (made.counts.matched, made.counts.near_identical, made.counts.no_answer) == (2, 1, 1)


def test_a_column_that_no_row_has_is_named_before_anything_runs(tmp_path: Path) -> None:
    asked = load_prompt(tmp_path, prompt="Q", answer="yes", level=3)
    with pytest.raises(
        ValueError, match="answer_column 'key' is in no prompt's row: give one of answer, level"
    ):
        AnswerReader("key", PLAIN, 1000).check([asked])
    AnswerReader("answer", PLAIN, 1000).check([asked])
    with pytest.raises(ValueError, match="expected text or a list of messages, found int '3'"):
        AnswerReader("level", PLAIN, 1000).check([asked])
