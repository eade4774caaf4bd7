"""What there is to imitate becomes the one side of a pair, in tokens that the policy would write."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from characters import (
    ASSISTANT,
    BOS,
    CHAT,
    EOS,
    HH_RLHF,
    PLAIN,
    USER,
    assistant,
    codes,
    load,
    make_tokenizer,
    user,
    write_jsonl,
)

from dpo_ray.film_reviews import generate_reviews
from dpo_ray.preference_data import PairSet
from dpo_ray.sft_data import load_texts
from dpo_ray.starter import make_review_tokenizer
from dpo_ray.types import Pair

ADDS_BOTH = make_tokenizer("<bos> $A <eos>")


def without_bos() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    return tokenizer


def texts(source: object, tokenizer: Any = PLAIN, *, max_tokens: int = 1000, **options: Any) -> PairSet:
    return load_texts(str(source), split="train", tokenizer=tokenizer, max_tokens=max_tokens, **options)


def texts_of(folder: Path, *rows: object, tokenizer: Any = PLAIN, **options: Any) -> PairSet:
    return texts(write_jsonl(folder / "texts.jsonl", *rows), tokenizer, **options)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "yes"},
        {"prompt": "Q", "completion": "yes", "label": True},
        {"prompt": "Q", "chosen": "yes", "rejected": "no"},
        {"prompt": "Q", "chosen": "yes", "rejected": "yes"},
        {"prompt": "Q", "chosen": "yes", "rejected": ""},
    ],
)
@pytest.mark.parametrize("tokenizer", [PLAIN, ADDS_BOTH], ids=["plain", "adds_both"])
def test_text_completions_are_what_is_imitated(tmp_path: Path, row: object, tokenizer: Any) -> None:
    prompt_ids = (*((BOS,) if tokenizer is ADDS_BOTH else ()), ord("Q"))
    expected = Pair("Q", "yes", "", prompt_ids, (*codes("yes"), EOS), (), source="file")
    assert texts_of(tmp_path, row, tokenizer=tokenizer) == PairSet((expected,), {})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("Q"), assistant("yes")]},
        {"messages": [user("Q"), assistant("yes"), user("thanks")]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "yes"}]},
        {"prompt": [user("Q")], "completion": [assistant("yes")]},
        {"chosen": [user("Q"), assistant("yes")], "rejected": [user("Q"), assistant("no")]},
        {"chosen": "\n\nHuman: Q\n\nAssistant: yes", "rejected": "\n\nHuman: Q\n\nAssistant: no"},
    ],
)
def test_the_last_answer_is_imitated_given_the_rest(tmp_path: Path, row: object) -> None:
    prompt_ids = (BOS, USER, ord("Q"), EOS, ASSISTANT)
    expected = Pair([user("Q")], [assistant("yes")], "", prompt_ids, (*codes("yes"), EOS), (), source="file")
    assert texts_of(tmp_path, row, tokenizer=CHAT).pairs == (expected,)


def test_earlier_answers_are_given_and_not_imitated(tmp_path: Path) -> None:
    before = [user("Q"), assistant("yes"), user("why")]
    (pair,) = texts_of(tmp_path, {"messages": [*before, assistant("so")]}, tokenizer=CHAT).pairs
    assert pair.prompt == before
    assert pair.chosen_ids == (*codes("so"), EOS)


@pytest.mark.parametrize("text", ["yes", "<bos>yes", "yes<eos>", "<bos>yes<eos>\n"])
@pytest.mark.parametrize("tokenizer", [PLAIN, ADDS_BOTH], ids=["plain", "adds_both"])
def test_a_plain_text_follows_one_bos_and_ends_with_one_eos(
    tmp_path: Path, text: str, tokenizer: Any
) -> None:
    (pair,) = texts_of(tmp_path, {"text": text}, tokenizer=tokenizer).pairs
    assert (pair.prompt, pair.chosen) == ("", text)
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ((BOS,), (*codes("yes"), EOS), ())
    assert pair.is_unpaired


def test_without_a_bos_a_text_follows_the_eos_of_the_text_before(tmp_path: Path) -> None:
    (pair,) = texts_of(tmp_path, {"text": "yes"}, tokenizer=without_bos()).pairs
    assert (pair.prompt_ids, pair.chosen_ids) == ((EOS,), (*codes("yes"), EOS))


@pytest.mark.parametrize(
    ("max_tokens", "blocks"),
    [
        (8, [(*codes("123456"), EOS)]),
        (7, [codes("123"), (*codes("456"), EOS)]),
        (5, [codes("123"), (*codes("456"), EOS)]),
        (4, [codes("12"), codes("34"), (*codes("56"), EOS)]),
        (2, [*map(codes, "123456"), (EOS,)]),
    ],
)
def test_a_long_text_is_cut_to_equal_blocks_that_fit(
    tmp_path: Path, max_tokens: int, blocks: list[tuple[int, ...]]
) -> None:
    loaded = texts_of(tmp_path, {"text": "123456"}, max_tokens=max_tokens)
    assert [pair.chosen_ids for pair in loaded.pairs] == blocks
    assert all(pair.prompt_ids == (BOS,) for pair in loaded.pairs)
    assert loaded.truncated == int(len(blocks) > 1)
    assert "".join(str(pair.chosen) for pair in loaded.pairs).replace(" ", "") == "123456"


def test_a_long_prompt_is_cut_or_left_out_as_pairs_are(tmp_path: Path) -> None:
    row = {"prompt": "12345", "completion": "67"}
    fine = {"prompt": "Q", "completion": "1"}
    dropped = texts_of(tmp_path, row, fine, max_tokens=7)
    assert (len(dropped.pairs), dropped.dropped, dropped.truncated) == (1, {"too_long": 1}, 0)
    cut = texts_of(tmp_path, row, fine, max_tokens=7, long_prompts="cut_start")
    assert (cut.pairs[0].prompt_ids, cut.dropped, cut.truncated) == (codes("2345"), {}, 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": " \n"}, "empty"),
        ({"prompt": "Q", "completion": ""}, "empty"),
        ({"prompt": "Q", "completion": "yes", "label": False}, "blamed"),
        ({"messages": [user("Q")]}, "no_shared_prompt"),
    ],
)
def test_what_is_no_example_is_left_out_and_counted(tmp_path: Path, row: object, reason: str) -> None:
    loaded = texts_of(tmp_path, {"text": "yes"}, row, row)
    assert (len(loaded.pairs), loaded.dropped) == (1, {reason: 2})
    assert loaded.dropped_rows == ((2, reason), (3, reason))


@pytest.mark.parametrize("row", [{"question": "1+1", "answer": "2"}, {"text": 7}, {"text": None}])
def test_a_row_with_nothing_to_imitate_names_its_columns(tmp_path: Path, row: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"row 1: nothing to imitate: .* {', '.join(row)}"):
        texts_of(tmp_path, row)


def test_a_source_without_texts_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no texts in .*texts\.jsonl \(left out: \{'empty': 1\}\)"):
        texts_of(tmp_path, {"text": ""})


def test_film_reviews_are_the_starters_corpus() -> None:
    tokenizer = make_review_tokenizer()
    loaded = texts("film_reviews", tokenizer, max_tokens=128)
    assert (loaded.dropped, loaded.truncated) == ({}, 0)
    assert [pair.chosen for pair in loaded.pairs] == generate_reviews(8192, seed=0)
    for pair in loaded.pairs[:100]:
        assert pair.prompt_ids == (tokenizer.eos_token_id,)
        assert tokenizer.decode(list(pair.chosen_ids)) == f"{pair.chosen} <eos>"


@pytest.mark.skipif(not HH_RLHF.exists(), reason="sample data is not here")
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_hh_rlhf_gives_its_chosen_completions(tmp_path: Path, tokenizer: Any) -> None:
    with gzip.open(HH_RLHF, "rt") as lines:
        rows = [json.loads(line) for _, line in zip(range(300), lines, strict=False)]
    sample = write_jsonl(tmp_path / "sample.jsonl", *rows)
    imitated = {(pair.prompt_ids, pair.chosen_ids) for pair in texts(sample, tokenizer).pairs}
    compared = {(pair.prompt_ids, pair.chosen_ids) for pair in load(sample, tokenizer).pairs}
    assert compared <= imitated
    assert len(compared) > 150
