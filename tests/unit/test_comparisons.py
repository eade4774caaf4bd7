"""Every way to write a preference gives the same prompt and completions, and what is none is said."""

from pathlib import Path

import pytest
from characters import (
    ASSISTANT,
    BOS,
    CHAT,
    EOS,
    FINE,
    HH_RLHF,
    USER,
    assistant,
    codes,
    load,
    load_row,
    user,
    write_jsonl,
)

from dpo_ray.types import Pair


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


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", {"prompt": "Q", "chosen": "yes", "worse": "no"})
    with pytest.raises(ValueError, match=r"row 1: no column rejected: .* prompt, chosen, worse"):
        load(source)


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


@pytest.mark.skipif(not HH_RLHF.exists(), reason="sample data is not here")
def test_hh_rlhf_as_thumbs_has_the_sides_of_its_pairs(tmp_path: Path) -> None:
    pairs = load(HH_RLHF, CHAT, max_tokens=10**6).pairs[:100]
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
