"""Offline pairs have the tokens that a sampler and a learner would agree on, and all of them fit."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from characters import (
    ASSISTANT,
    BOS,
    CHAT,
    EOS,
    FINE,
    HH_RLHF,
    PLAIN,
    assistant,
    codes,
    load,
    load_row,
    make_tokenizer,
    user,
    write_jsonl,
)
from datasets import Dataset

from dpo_ray.buffer import PreferenceBuffer, SnapshotQuery
from dpo_ray.film_reviews import is_grammatical, sentiment
from dpo_ray.preference_data import PairSet
from dpo_ray.starter import make_review_tokenizer
from dpo_ray.types import Pair

needs_data = pytest.mark.skipif(not HH_RLHF.exists(), reason="sample data is not here")


def test_text_completions_end_with_eos(tmp_path: Path) -> None:
    assert load_row(tmp_path, prompt="1+1=", chosen="2", rejected="3") == Pair(
        prompt="1+1=",
        chosen="2",
        rejected="3",
        prompt_ids=codes("1+1="),
        chosen_ids=(ord("2"), EOS),
        rejected_ids=(ord("3"), EOS),
        source="file",
    )


def test_transcripts_stay_text_without_a_chat_template(tmp_path: Path) -> None:
    start = "\n\nHuman: Q\n\nAssistant:"
    pair = load_row(tmp_path, chosen=f"{start} yes", rejected=f"{start} yet")
    assert (pair.prompt, pair.chosen, pair.rejected) == (start, " yes", " yet")
    assert pair.prompt_ids + pair.chosen_ids == (*codes(f"{start} yes"), EOS)


def test_every_format_gives_the_same_pairs(tmp_path: Path) -> None:
    expected = load(write_jsonl(tmp_path / "pairs.jsonl", FINE))
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nQ,yes,no\n")
    pq.write_table(pa.Table.from_pylist([FINE]), tmp_path / "pairs.parquet")
    Dataset.from_list([FINE]).save_to_disk(tmp_path / "saved")
    assert all(load(tmp_path / name) == expected for name in ("pairs.csv", "pairs.parquet", "saved"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "yes", "rejected": "yes"}, "equal"),
        ({"prompt": "Q", "chosen": "yes", "rejected": " "}, "empty"),
        ({"prompt": "", "chosen": "yes", "rejected": "no"}, "empty"),
        ({"prompt": "Q" * 7, "chosen": "yes", "rejected": "no"}, "too_long"),
        ({"chosen": "yes", "rejected": "no"}, "no_shared_prompt"),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: P\n\nAssistant: a"},
            "no_shared_prompt",
        ),
        (
            {
                "chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: c",
                "rejected": "\n\nHuman: Q\n\nAssistant: b",
            },
            "several_turns",
        ),
    ],
)
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_what_is_left_out_is_counted(tmp_path: Path, tokenizer: Any, row: object, reason: str) -> None:
    loaded = load(write_jsonl(tmp_path / "pairs.jsonl", FINE, row, row), tokenizer, max_tokens=10)
    assert (len(loaded.pairs), loaded.dropped) == (1, {reason: 2})


@pytest.mark.parametrize(("chosen", "rejected"), [("56", "5"), ("5", "56")])
def test_a_pair_that_fits_exactly_is_kept(tmp_path: Path, chosen: str, rejected: str) -> None:
    row = {"prompt": "1234", "chosen": chosen, "rejected": rejected}
    source = write_jsonl(tmp_path / "pairs.jsonl", row)
    assert len(load(source, max_tokens=7).pairs) == 1
    with pytest.raises(
        ValueError, match=r"no pairs in .*pairs\.jsonl \(left out: \{'too_long': 1\}\).* 6 tokens"
    ):
        load(source, max_tokens=6)


def test_one_sided_rows_are_refused_where_the_loss_compares(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", FINE, {"prompt": "Q", "completion": "yes", "label": True})
    with pytest.raises(ValueError, match=r"row 2: one completion .* set --training\.loss\.type to kto"):
        load(source)
    assert [pair.is_unpaired for pair in load(source, unpaired_allowed=True).pairs] == [False, True]


def test_the_log_and_the_set_name_each_row_that_was_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**FINE, "rejected": ""}, FINE, {**FINE, "rejected": "yes"}, {**FINE, "prompt": "Q" * 99}]
    source = write_jsonl(tmp_path / "pairs.jsonl", *rows)
    with caplog.at_level("INFO", logger="dpo_ray.preference_data"):
        loaded = load(source, max_tokens=50)
    assert loaded.dropped_rows == ((1, "empty"), (3, "equal"), (4, "too_long"))
    assert [record.getMessage() for record in caplog.records] == [
        f"{source}, row 1: left out, empty",
        f"{source}, row 3: left out, equal",
        f"{source}, row 4: left out, too_long",
    ]


LONG = {"prompt": "12345", "chosen": "67", "rejected": "8"}


@pytest.mark.parametrize(
    ("tokenizer", "max_tokens", "prompt_ids"),
    [
        (PLAIN, 8, codes("12345")),
        (PLAIN, 7, codes("2345")),
        (PLAIN, 4, codes("5")),
        (make_tokenizer("<bos> $A"), 9, (BOS, *codes("12345"))),
        (make_tokenizer("<bos> $A"), 8, (BOS, *codes("2345"))),
        (make_tokenizer("<bos> $A"), 5, (BOS, *codes("5"))),
    ],
)
def test_a_long_prompt_loses_its_start_but_not_its_bos(
    tmp_path: Path, tokenizer: Any, max_tokens: int, prompt_ids: tuple[int, ...]
) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", LONG)
    loaded = load(source, tokenizer, max_tokens=max_tokens, long_prompts="cut_start")
    (pair,) = loaded.pairs
    assert pair.prompt_ids == prompt_ids
    assert (pair.prompt, pair.chosen_ids, pair.rejected_ids) == (
        "12345",
        (*codes("67"), EOS),
        (ord("8"), EOS),
    )
    assert loaded.truncated == int(len(prompt_ids) < 5 + (prompt_ids[0] == BOS))
    assert loaded.dropped == {}


@pytest.mark.parametrize(("tokenizer", "max_tokens"), [(PLAIN, 3), (make_tokenizer("<bos> $A"), 4)])
def test_a_prompt_of_which_nothing_would_be_left_is_not_cut(
    tmp_path: Path, tokenizer: Any, max_tokens: int
) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", LONG, {"prompt": "Q", "chosen": "1", "rejected": "2"})
    loaded = load(source, tokenizer, max_tokens=max_tokens, long_prompts="cut_start")
    assert (len(loaded.pairs), loaded.truncated, loaded.dropped) == (1, 0, {"too_long": 1})


def test_a_long_conversation_keeps_its_end_and_its_bos(tmp_path: Path) -> None:
    row = {"prompt": [user("12345")], "completion": [assistant("6")], "label": True}
    source = write_jsonl(tmp_path / "pairs.jsonl", row)
    loaded = load(source, CHAT, max_tokens=7, long_prompts="cut_start", unpaired_allowed=True)
    assert loaded.pairs[0].prompt_ids == (BOS, *codes("45"), EOS, ASSISTANT)
    assert loaded.pairs[0].chosen_ids == (ord("6"), EOS)
    assert loaded.truncated == 1


QUERY = SnapshotQuery(max_round=0, min_policy_version=0, limit=9, seed=0)


def test_a_snapshot_gives_its_pairs_back_in_new_tokens(buffer: PreferenceBuffer, tmp_path: Path) -> None:
    both = Pair("Q", "yes", "no", (1,), (2, 3), (4,), chosen_reward=1.0, rejected_reward=0.5, weight=2.0)
    praised = Pair("Q", "so", "", (1,), (5,), (), policy_version=3, judge="thumbs")
    blamed = Pair("Q", "", "nay", (1,), (), (6,), policy_version=3, judge="thumbs")
    buffer.put([both, praised, blamed])
    buffer.declare_snapshot(SnapshotQuery(max_round=0, min_policy_version=0, limit=9, seed=0), live_version=0)
    loaded = load(tmp_path / "rounds/00000/pairs.parquet", unpaired_allowed=True)
    assert set(loaded.pairs) == {
        Pair(
            *("Q", "yes", "no", codes("Q"), (*codes("yes"), EOS), (*codes("no"), EOS)),
            chosen_reward=1.0,
            rejected_reward=0.5,
            source="file",
            weight=2.0,
        ),
        Pair("Q", "so", "", codes("Q"), (*codes("so"), EOS), (), source="file"),
        Pair("Q", "", "nay", codes("Q"), (), (*codes("nay"), EOS), source="file"),
    }


def test_a_snapshot_of_conversations_gives_them_back(buffer: PreferenceBuffer, tmp_path: Path) -> None:
    both = Pair([user("Q")], [assistant("yes")], [assistant("no")], (1,), (2,), (3,))
    buffer.put([both, Pair([user("Q")], "", [assistant("nay")], (1,), (), (4,))])
    buffer.declare_snapshot(SnapshotQuery(max_round=0, min_policy_version=0, limit=9, seed=0), live_version=0)
    loaded = load(tmp_path / "rounds/00000/pairs.parquet", CHAT, unpaired_allowed=True)
    texts = [(pair.prompt, pair.chosen, pair.rejected) for pair in loaded.pairs]
    assert ([user("Q")], [assistant("yes")], [assistant("no")]) in texts
    assert ([user("Q")], "", [assistant("nay")]) in texts


def test_film_reviews_are_pairs_that_the_judge_tells_apart() -> None:
    tokenizer = make_review_tokenizer()
    loaded = load("film_reviews", tokenizer, max_tokens=128)
    assert (len(loaded.pairs), loaded.dropped, loaded.truncated) == (2048, {}, 0)
    assert len({pair.pair_id for pair in loaded.pairs}) == 2048
    assert loaded == load("film_reviews", tokenizer, max_tokens=128)
    for pair in loaded.pairs[:200]:
        sides = (pair.chosen_ids[:-1], pair.rejected_ids[:-1])
        chosen, rejected = (str(tokenizer.decode(list(ids))) for ids in sides)
        assert is_grammatical(f"{pair.prompt} {chosen}")
        assert is_grammatical(f"{pair.prompt} {rejected}")
        assert (pair.chosen_reward, pair.rejected_reward) == (sentiment(chosen), sentiment(rejected))
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == tokenizer.eos_token_id


@functools.cache
def whole_sample(tokenizer: Any) -> PairSet:
    return load(HH_RLHF, tokenizer, max_tokens=10**6)


@needs_data
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_hh_rlhf_loads_but_for_empty_answers_and_parted_prompts(tokenizer: Any) -> None:
    loaded = whole_sample(tokenizer)
    assert len(loaded.pairs) == 2303
    assert loaded.dropped == {"empty": 4, "several_turns": 5}
    assert all(pair.chosen_ids[-1] == pair.rejected_ids[-1] == EOS for pair in loaded.pairs)


@needs_data
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_hh_rlhf_prompts_are_cut_to_what_fits(tokenizer: Any) -> None:
    loaded, left_out = load(HH_RLHF, tokenizer, max_tokens=500, long_prompts="cut_start"), 0
    cut_pairs = iter(loaded.pairs)
    cut = 0
    for pair in whole_sample(tokenizer).pairs:
        longer = max(len(pair.chosen_ids), len(pair.rejected_ids))
        start = int(pair.prompt_ids[0] == BOS)
        if longer + start >= 500:
            left_out += 1
            continue
        excess = max(0, len(pair.prompt_ids) + longer - 500)
        cut += excess > 0
        expected = pair.prompt_ids[:start] + pair.prompt_ids[start + excess :]
        assert next(cut_pairs) == dataclasses.replace(pair, prompt_ids=expected)
    assert loaded.dropped.get("too_long", 0) == left_out > 10
    assert loaded.truncated == cut > 500
