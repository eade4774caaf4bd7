"""Offline pairs have the tokens that a sampler and a learner would agree on."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dpo_ray.preference_data import PairSet, load_pairs
from dpo_ray.types import Message, Pair

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf-harmless-base-test.jsonl.gz"

# An ASCII character's id is its code; "ab" is one token.
BOS, EOS, USER, ASSISTANT, AB = 128, 129, 130, 131, 132
TURNS = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
CHAT_TEMPLATE = f"{{{{ bos_token }}}}{TURNS}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"


def make_tokenizer(layout: str = "$A", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character, special tokens where `layout` puts them."""
    specials = {"<bos>": BOS, "<eos>": EOS, "<user>": USER, "<assistant>": ASSISTANT}
    characters = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(BPE({**characters, **specials, "ab": AB}, [("a", "b")], unk_token="?"))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.post_processor = TemplateProcessing(single=layout, special_tokens=list(specials.items()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=chat_template
    )


PLAIN = make_tokenizer()
CHAT = make_tokenizer(chat_template=CHAT_TEMPLATE)


def codes(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def load(source: Path, tokenizer: Any = PLAIN, *, max_tokens: int = 1000) -> PairSet:
    return load_pairs(str(source), split="train", tokenizer=tokenizer, max_tokens=max_tokens)


def load_row(folder: Path, tokenizer: Any = PLAIN, **row: object) -> Pair:
    (pair,) = load(write_jsonl(folder / "pairs.jsonl", row), tokenizer).pairs
    return pair


FINE = {"prompt": "Q", "chosen": "yes", "rejected": "no"}


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


def test_only_the_prompt_has_a_bos(tmp_path: Path) -> None:
    pair = load_row(tmp_path, make_tokenizer("<bos> $A <eos>"), **FINE)
    assert pair.prompt_ids == (BOS, ord("Q"))
    assert (pair.chosen_ids, pair.rejected_ids) == ((*codes("yes"), EOS), (*codes("no"), EOS))


def test_an_eos_that_the_completion_brings_is_not_doubled(tmp_path: Path) -> None:
    assert load_row(tmp_path, prompt="Q", chosen="yes<eos>", rejected="no").chosen_ids == (*codes("yes"), EOS)


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


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [user("Q"), assistant("yes")], "rejected": [user("Q"), assistant("no")]},
        {"prompt": "Q", "chosen": [user("Q"), assistant("yes")], "rejected": [user("Q"), assistant("no")]},
        {"prompt": "Q", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        {"prompt": [user("Q")], "chosen": "yes", "rejected": "no"},
        {
            "prompt": None,
            "chosen": "\n\nHuman: Q\n\nAssistant: yes",
            "rejected": "\n\nHuman: Q\n\nAssistant: no",
        },
    ],
)
def test_every_way_to_write_a_conversation_gives_the_same_pair(
    tmp_path: Path, row: dict[str, object]
) -> None:
    expected = load_row(
        tmp_path, CHAT, prompt=[user("Q")], chosen=[assistant("yes")], rejected=[assistant("no")]
    )
    assert load_row(tmp_path, CHAT, **row) == expected


def test_earlier_answers_belong_to_the_shared_prompt(tmp_path: Path) -> None:
    shared = [user("Q"), assistant("yes"), user("why")]
    pair = load_row(tmp_path, CHAT, chosen=[*shared, assistant("so")], rejected=[*shared, assistant("no")])
    assert pair.prompt == shared
    assert pair.chosen_ids == (*codes("so"), EOS)


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


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([user("Q"), assistant("a")], [user("P"), assistant("a")], "no_shared_prompt"),
        ([user("Q"), assistant("a")], [user("Q")], "empty"),
        ([user("Q"), assistant("a")], [user("Q"), assistant("a")], "equal"),
        (
            [user("Q"), assistant("a")],
            [user("Q"), assistant("b"), user("R"), assistant("c")],
            "several_turns",
        ),
        ([assistant("a")], [assistant("b")], "no_shared_prompt"),
    ],
)
def test_unusable_conversations_are_counted(
    tmp_path: Path, chosen: object, rejected: object, reason: str
) -> None:
    row = {"chosen": chosen, "rejected": rejected}
    fine = {"chosen": [user("Q"), assistant("yes")], "rejected": [user("Q"), assistant("no")]}
    loaded = load(write_jsonl(tmp_path / "pairs.jsonl", fine, row), CHAT)
    assert (len(loaded.pairs), loaded.dropped) == (1, {reason: 1})


def test_a_pair_that_fits_exactly_is_kept(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", {"prompt": "1234", "chosen": "56", "rejected": "5"})
    assert len(load(source, max_tokens=7).pairs) == 1
    with pytest.raises(
        ValueError, match=r"no pairs in .*pairs\.jsonl \(left out: \{'too_long': 1\}\).* 6 tokens"
    ):
        load(source, max_tokens=6)


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", {"prompt": "Q", "chosen": "yes", "worse": "no"})
    with pytest.raises(ValueError, match=r"row 1: no column rejected: .* prompt, chosen, worse"):
        load(source)


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


def test_a_completion_of_another_type_names_row_and_type(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", FINE, {"prompt": "Q", "chosen": "yes", "rejected": 3})
    with pytest.raises(ValueError, match=r"row 2: expected text or a list of messages, found int '3'"):
        load(source)


@pytest.mark.skipif(not SAMPLE.exists(), reason="sample data is not here")
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_hh_rlhf_loads_but_for_empty_answers_and_parted_prompts(tokenizer: Any) -> None:
    loaded = load(SAMPLE, tokenizer, max_tokens=10**6)
    assert len(loaded.pairs) == 2303
    assert loaded.dropped == {"empty": 4, "several_turns": 5}
    assert all(pair.chosen_ids[-1] == pair.rejected_ids[-1] == EOS for pair in loaded.pairs)
