"""A prompt has one beginning token, a completion one end token, whatever the text brings."""

from pathlib import Path
from typing import Any

import pytest
from characters import (
    AB,
    ASSISTANT,
    BOS,
    CHAT_TEMPLATE,
    EOS,
    FINE,
    PLAIN,
    USER,
    assistant,
    codes,
    load,
    load_row,
    make_tokenizer,
    user,
    write_jsonl,
)

from dpo_ray.starter import make_review_tokenizer


def test_only_the_prompt_has_a_bos(tmp_path: Path) -> None:
    pair = load_row(tmp_path, make_tokenizer("<bos> $A <eos>"), **FINE)
    assert pair.prompt_ids == (BOS, ord("Q"))
    assert (pair.chosen_ids, pair.rejected_ids) == ((*codes("yes"), EOS), (*codes("no"), EOS))


@pytest.mark.parametrize("tokenizer", [PLAIN, make_tokenizer("<bos> $A <eos>")], ids=["plain", "adds_eos"])
@pytest.mark.parametrize("chosen", ["yes<eos>", "yes<eos>\n"])
def test_an_eos_that_the_completion_brings_is_not_doubled(
    tmp_path: Path, tokenizer: Any, chosen: str
) -> None:
    pair = load_row(tmp_path, tokenizer, prompt="Q", chosen=chosen, rejected="no")
    assert pair.chosen_ids == (*codes("yes"), EOS)


def test_a_token_across_the_border_leaves_the_prompt_as_the_sampler_sees_it(tmp_path: Path) -> None:
    pair = load_row(tmp_path, make_tokenizer("<bos> $A <eos>"), prompt="xa", chosen="bab", rejected="c")
    assert pair.prompt_ids == (BOS, *codes("xa"))
    assert pair.chosen_ids == (ord("b"), AB, EOS)


def test_messages_get_the_chat_template_once_over_the_whole_conversation(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("<bos> $A <eos>", CHAT_TEMPLATE)
    pair = load_row(
        tmp_path, tokenizer, prompt=[user("Q")], chosen=[assistant("yes")], rejected=[assistant("no")]
    )
    assert pair.prompt_ids == (BOS, USER, ord("Q"), EOS, ASSISTANT)
    assert (pair.chosen_ids, pair.rejected_ids) == ((*codes("yes"), EOS), (*codes("no"), EOS))
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("Q")], [assistant("yes")], [assistant("no")])


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="{{ messages | length }}" + CHAT_TEMPLATE)
    row = {"prompt": [user("Q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    with pytest.raises(ValueError, match=r"row 1: .* writes the prompt in another way"):
        load(write_jsonl(tmp_path / "pairs.jsonl", row), tokenizer)


def test_messages_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    row = {"prompt": [user("Q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        load(write_jsonl(tmp_path / "pairs.jsonl", row))


def test_text_needs_an_end_of_sequence_token(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token: set eos_token"):
        load(write_jsonl(tmp_path / "pairs.jsonl", FINE), tokenizer)


def test_a_completion_without_its_space_keeps_the_last_word_of_the_prompt(tmp_path: Path) -> None:
    tokenizer = make_review_tokenizer()
    row = {"prompt": "the film", "chosen": "was great .", "rejected": " was dull ."}
    pair = load_row(tmp_path, tokenizer, **row)
    texts = [tokenizer.decode(list(ids)) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    assert texts == ["the film", "was great . <eos>", "was dull . <eos>"]
