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

from dpo_ray.buffer import PreferenceBuffer, SnapshotQuery
from dpo_ray.film_reviews import is_grammatical, sentiment
from dpo_ray.preference_data import PairSet, load_pairs
from dpo_ray.starter import make_review_tokenizer
from dpo_ray.storage import Storage
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


def load(source: object, tokenizer: Any = PLAIN, *, max_tokens: int = 1000, **options: Any) -> PairSet:
    return load_pairs(str(source), split="train", tokenizer=tokenizer, max_tokens=max_tokens, **options)


def load_row(folder: Path, tokenizer: Any = PLAIN, **row: object) -> Pair:
    source = write_jsonl(folder / "pairs.jsonl", row)
    (pair,) = load(source, tokenizer, unpaired_allowed=True).pairs
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
        {
            "prompt": [{"from": "human", "value": "Q"}],
            "chosen": [{"from": "gpt", "value": "yes"}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
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


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("The sky is", "The sky is, say, blue", ("The sky", " is", " is, say, blue")),
        ("Two lines:\none", "Two lines:\ntwo", ("Two lines:", "\none", "\ntwo")),
        ("f(x) = 1", "f(y) = 1", ("f(", "x) = 1", "y) = 1")),
    ],
)
def test_texts_without_a_prompt_share_their_first_whole_words(
    tmp_path: Path, chosen: str, rejected: str, expected: tuple[str, str, str]
) -> None:
    pair = load_row(tmp_path, CHAT, chosen=chosen, rejected=rejected)
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


PRAISED = Pair("Q", "yes", "", codes("Q"), (*codes("yes"), EOS), (), source="file")
BLAMED = Pair("Q", "", "yes", codes("Q"), (), (*codes("yes"), EOS), source="file")


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1"])
def test_a_good_label_makes_a_pair_without_a_rejected_side(tmp_path: Path, label: object) -> None:
    pair = load_row(tmp_path, prompt="Q", completion="yes", label=label)
    assert pair == PRAISED
    assert pair.is_unpaired


@pytest.mark.parametrize("label", [False, 0, 0.0, "false", "False", "0"])
def test_a_bad_label_makes_a_pair_without_a_chosen_side(tmp_path: Path, label: object) -> None:
    pair = load_row(tmp_path, prompt="Q", completion="yes", label=label)
    assert pair == BLAMED
    assert pair.is_unpaired


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("Q")], "completion": [assistant("yes")]},
        {"prompt": [user("Q")], "completion": "yes"},
        {"prompt": "Q", "completion": [assistant("yes")]},
        {"completion": [user("Q"), assistant("yes")]},
        {"prompt": "Q", "messages": [user("Q"), assistant("yes")]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "yes"}]},
        {"messages": [user("Q"), assistant("yes"), user("thanks")]},
        {"completion": "\n\nHuman: Q\n\nAssistant: yes"},
    ],
)
def test_every_way_to_write_a_labelled_conversation_gives_the_same_pair(
    tmp_path: Path, row: dict[str, object]
) -> None:
    pair = load_row(tmp_path, CHAT, **row, label=True)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("Q")], [assistant("yes")], "")
    assert pair.prompt_ids == (BOS, USER, ord("Q"), EOS, ASSISTANT)
    assert (pair.chosen_ids, pair.rejected_ids) == ((*codes("yes"), EOS), ())


def test_earlier_answers_of_a_labelled_conversation_belong_to_the_prompt(tmp_path: Path) -> None:
    before = [user("Q"), assistant("yes"), user("why")]
    pair = load_row(tmp_path, CHAT, messages=[*before, assistant("so")], label=False)
    assert (pair.prompt, pair.rejected) == (before, [assistant("so")])


def test_a_thumb_up_and_a_thumb_down_for_one_answer_are_two_pairs() -> None:
    assert PRAISED.pair_id != BLAMED.pair_id
    assert not Pair("Q", "a", "b", (1,), (2,), (3,)).is_unpaired


def test_one_sided_rows_are_refused_where_the_loss_compares(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", FINE, {"prompt": "Q", "completion": "yes", "label": True})
    with pytest.raises(ValueError, match=r"row 2: one completion .* set --training\.loss\.type to kto"):
        load(source)
    assert [pair.is_unpaired for pair in load(source, unpaired_allowed=True).pairs] == [False, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "completion": "yes"}, "row 1: no column label: .* prompt, completion"),
        ({"prompt": "Q", "label": True}, "row 1: no column chosen and no column rejected"),
        ({"prompt": "Q", "completion": "yes", "label": "maybe"}, "row 1: label is 'maybe': write true"),
        ({**FINE, "weight": 0}, r"row 1: weight=0\.0 of a pair: give a finite number above 0"),
        ({**FINE, "weight": -1.5}, r"row 1: weight=-1\.5 of a pair"),
        ({**FINE, "weight": "much"}, "row 1: weight is 'much': write a finite number, or rename"),
        ({**FINE, "weight": float("nan")}, "row 1: weight is nan"),
        ({**FINE, "chosen_reward": [1]}, r"row 1: chosen_reward is \[1\]"),
    ],
)
def test_what_a_row_lacks_is_said(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(write_jsonl(tmp_path / "pairs.jsonl", row), unpaired_allowed=True)


def test_weights_and_rewards_are_the_rows_own_and_a_margin_is_none(tmp_path: Path) -> None:
    row = {**FINE, "weight": "2.5", "chosen_reward": 3, "rejected_reward": None, "margin": 7}
    pair = load_row(tmp_path, **row)
    assert (pair.weight, pair.chosen_reward, pair.rejected_reward) == (2.5, 3.0, None)
    assert load_row(tmp_path, **FINE).weight == 1.0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "completion": " ", "label": True}, "empty"),
        ({"prompt": "Q", "completion": "yes" * 9, "label": True}, "too_long"),
        ({"completion": "yes", "label": True}, "no_shared_prompt"),
        ({"messages": [user("Q")], "label": True}, "no_shared_prompt"),
        ({"messages": [assistant("Q")], "label": True}, "no_shared_prompt"),
        (
            {"prompt": [user("Q")], "completion": [assistant("a"), user("R"), assistant("b")], "label": True},
            "several_turns",
        ),
        ({"prompt": [user("Q")], "completion": [], "label": True}, "empty"),
        (
            {
                "prompt": [user("Q")],
                "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}],
                "rejected": [assistant("no")],
            },
            "tool_calls",
        ),
    ],
)
def test_unusable_labelled_rows_are_counted(tmp_path: Path, row: object, reason: str) -> None:
    fine = {"prompt": "Q", "completion": "yes", "label": True}
    source = write_jsonl(tmp_path / "pairs.jsonl", fine, row)
    loaded = load(source, CHAT, max_tokens=10, unpaired_allowed=True)
    assert (loaded.pairs, loaded.dropped) == ((PRAISED,), {reason: 1})


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


def test_a_snapshot_gives_its_pairs_back_in_new_tokens(
    buffer: PreferenceBuffer, storage: Storage, tmp_path: Path
) -> None:
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


def test_a_snapshot_of_conversations_gives_them_back(
    buffer: PreferenceBuffer, storage: Storage, tmp_path: Path
) -> None:
    both = Pair([user("Q")], [assistant("yes")], [assistant("no")], (1,), (2,), (3,))
    buffer.put([both, Pair([user("Q")], "", [assistant("nay")], (1,), (), (4,))])
    buffer.declare_snapshot(SnapshotQuery(max_round=0, min_policy_version=0, limit=9, seed=0), live_version=0)
    loaded = load(tmp_path / "rounds/00000/pairs.parquet", CHAT, unpaired_allowed=True)
    texts = [(pair.prompt, pair.chosen, pair.rejected) for pair in loaded.pairs]
    assert ([user("Q")], [assistant("yes")], [assistant("no")]) in texts
    assert ([user("Q")], "", [assistant("nay")]) in texts


def test_a_completion_without_its_space_keeps_the_last_word_of_the_prompt(tmp_path: Path) -> None:
    tokenizer = make_review_tokenizer()
    row = {"prompt": "the film", "chosen": "was great .", "rejected": " was dull ."}
    pair = load_row(tmp_path, tokenizer, **row)
    texts = [tokenizer.decode(list(ids)) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    assert texts == ["the film", "was great . <eos>", "was dull . <eos>"]


def test_film_reviews_are_pairs_that_the_judge_tells_apart() -> None:
    tokenizer = make_review_tokenizer()
    loaded = load("film_reviews", tokenizer, max_tokens=128)
    assert (len(loaded.pairs), loaded.dropped, loaded.truncated) == (2048, {}, 0)
    assert len({pair.pair_id for pair in loaded.pairs}) == 2048
    assert loaded == load("film_reviews", tokenizer, max_tokens=128)
    for pair in loaded.pairs[:200]:
        chosen, rejected = (tokenizer.decode(list(ids[:-1])) for ids in (pair.chosen_ids, pair.rejected_ids))
        assert is_grammatical(f"{pair.prompt} {chosen}")
        assert is_grammatical(f"{pair.prompt} {rejected}")
        assert (pair.chosen_reward, pair.rejected_reward) == (sentiment(chosen), sentiment(rejected))
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == tokenizer.eos_token_id


@pytest.mark.skipif(not SAMPLE.exists(), reason="sample data is not here")
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_hh_rlhf_loads_but_for_empty_answers_and_parted_prompts(tokenizer: Any) -> None:
    loaded = load(SAMPLE, tokenizer, max_tokens=10**6)
    assert len(loaded.pairs) == 2303
    assert loaded.dropped == {"empty": 4, "several_turns": 5}
    assert all(pair.chosen_ids[-1] == pair.rejected_ids[-1] == EOS for pair in loaded.pairs)


@pytest.mark.skipif(not SAMPLE.exists(), reason="sample data is not here")
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_hh_rlhf_prompts_are_cut_to_what_fits(tokenizer: Any) -> None:
    whole = {pair.chosen_ids: pair for pair in load(SAMPLE, tokenizer, max_tokens=10**6).pairs}
    loaded = load(SAMPLE, tokenizer, max_tokens=500, long_prompts="cut_start")
    cut = 0
    for pair in loaded.pairs:
        prompt_ids = whole[pair.chosen_ids].prompt_ids
        num_tokens = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        if pair.prompt_ids == prompt_ids:
            assert num_tokens <= 500
            continue
        cut += 1
        assert num_tokens == 500
        assert pair.prompt_ids[-20:] == prompt_ids[-20:]
        assert (pair.prompt_ids[0] == BOS) == (prompt_ids[0] == BOS)
    assert loaded.truncated == cut > 500
    assert len(loaded.pairs) + sum(loaded.dropped.values()) == 2312
    assert loaded.dropped["too_long"] < load(SAMPLE, tokenizer, max_tokens=500).dropped["too_long"]


@pytest.mark.skipif(not SAMPLE.exists(), reason="sample data is not here")
def test_hh_rlhf_as_thumbs_has_the_sides_of_its_pairs(tmp_path: Path) -> None:
    pairs = load(SAMPLE, CHAT, max_tokens=10**6).pairs[:100]
    rows = [
        {"prompt": pair.prompt, "completion": completion, "label": label}
        for pair in pairs
        for completion, label in ((pair.chosen, True), (pair.rejected, False))
    ]
    thumbs = load(
        write_jsonl(tmp_path / "a.jsonl", *rows), CHAT, max_tokens=10**6, unpaired_allowed=True
    ).pairs
    assert [pair.prompt_ids for pair in thumbs[::2]] == [pair.prompt_ids for pair in pairs]
    assert [pair.chosen_ids for pair in thumbs[::2]] == [pair.chosen_ids for pair in pairs]
    assert [pair.rejected_ids for pair in thumbs[1::2]] == [pair.rejected_ids for pair in pairs]
