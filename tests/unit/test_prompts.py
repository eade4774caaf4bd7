"""Prompts come from every format with the right tokens, and nothing is lost uncounted."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dpo_ray.prompts import PromptSet, load_prompts, round_prompts, split_prompts
from dpo_ray.types import Prompt

SHARED = Path(__file__).parents[3] / "shared" / "data"

# An ASCII character's id is its code.
BOS, EOS, USER, ASSISTANT = 128, 129, 130, 131
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(layout: str = "$A", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character, special tokens where `layout` puts them."""
    specials = {"<bos>": BOS, "<eos>": EOS, "<user>": USER, "<assistant>": ASSISTANT}
    characters = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(BPE({**characters, **specials}, [], unk_token="?"))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.post_processor = TemplateProcessing(single=layout, special_tokens=list(specials.items()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=chat_template
    )


PLAIN = make_tokenizer()
CHAT = make_tokenizer(chat_template=CHAT_TEMPLATE)


def codes(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def write_jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def load(
    source: object, tokenizer: Any = PLAIN, *, column: str = "prompt", max_tokens: int = 100
) -> PromptSet:
    return load_prompts(str(source), split="train", column=column, tokenizer=tokenizer, max_tokens=max_tokens)


def numbered(*token_ids: int) -> list[Prompt]:
    return [Prompt(f"prompt {token_id}", (token_id,)) for token_id in token_ids]


def test_text_becomes_its_tokens_and_the_other_columns_its_fields(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", {"prompt": "hi", "answer": 42, "tags": ["x"]})
    assert load(source) == PromptSet((Prompt("hi", codes("hi"), {"answer": 42, "tags": ["x"]}),), 0, 0)


def test_messages_get_the_chat_template_once(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = make_tokenizer("<bos> $A <eos>", CHAT_TEMPLATE)
    (prompt,) = load(write_jsonl(tmp_path / "a.jsonl", {"prompt": messages}), tokenizer).prompts
    assert prompt.text == messages
    assert prompt.token_ids == (BOS, USER, *codes("hi"), EOS, ASSISTANT)


@pytest.mark.parametrize("text", ["hi", "<bos>hi"])
def test_a_prompt_has_one_bos_and_no_added_eos(tmp_path: Path, text: str) -> None:
    tokenizer = make_tokenizer("<bos> $A <eos>")
    (prompt,) = load(write_jsonl(tmp_path / "a.jsonl", {"prompt": text}), tokenizer).prompts
    assert prompt.token_ids == (BOS, *codes("hi"))


def test_an_eos_that_the_text_brings_stays(tmp_path: Path) -> None:
    (prompt,) = load(write_jsonl(tmp_path / "a.jsonl", {"prompt": "hi<eos>"})).prompts
    assert prompt.token_ids == (*codes("hi"), EOS)


def test_long_and_empty_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    texts = ["four", "fives", "", " \n", "six six"]
    loaded = load(write_jsonl(tmp_path / "a.jsonl", *({"prompt": text} for text in texts)), max_tokens=4)
    assert [prompt.text for prompt in loaded.prompts] == ["four"]
    assert (loaded.dropped_too_long, loaded.dropped_empty) == (2, 2)


def test_only_long_prompts_name_the_longest_and_the_setting(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", {"prompt": "abc"}, {"prompt": "abcde"})
    with pytest.raises(ValueError, match=r"2 dropped as longer than 2 tokens.* 5; raise --max_prompt_tokens"):
        load(source, max_tokens=2)


HH_ROW = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: No idea.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: No.",
}


def test_transcripts_give_their_shared_beginning_as_text(tmp_path: Path) -> None:
    (prompt,) = load(write_jsonl(tmp_path / "a.jsonl", HH_ROW)).prompts
    assert prompt.text == "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
    assert prompt.token_ids == codes(str(prompt.text))
    assert prompt.fields == HH_ROW


def test_transcripts_become_messages_for_a_chat_model(tmp_path: Path) -> None:
    (prompt,) = load(write_jsonl(tmp_path / "a.jsonl", HH_ROW), CHAT).prompts
    assert prompt.text == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Why?"},
    ]
    assert prompt.token_ids == (
        *(BOS, USER, *codes("Hi"), EOS),
        *(ASSISTANT, *codes("Yes?"), EOS),
        *(USER, *codes("Why?"), EOS, ASSISTANT),
    )


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", {"question": "1+1?", "answer": "2"})
    with pytest.raises(
        ValueError, match=r"row 1: no column 'prompt': set --prompts_column .* question, answer"
    ):
        load(source)


def test_messages_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", {"prompt": [{"role": "user", "content": "hi"}]})
    with pytest.raises(ValueError, match="tokenizer has no chat template: take an instruction-tuned"):
        load(source)


def test_the_chat_templates_own_refusal_names_the_row(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    source = write_jsonl(tmp_path / "a.jsonl", {"prompt": [{"role": "user", "content": "hi"}]})
    with pytest.raises(ValueError, match=r"row 1: .*refuses these messages: roles must alternate"):
        load(source, tokenizer)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, r"row 2: expected text or a list of messages, found int '7'"),
        (None, r"row 2: .* found NoneType"),
        (["hi"], r"row 2: a message needs a role and a content, .* found str 'hi'"),
        ([{"role": "user", "content": None}], r"row 2: a message needs a role"),
    ],
)
def test_a_prompt_of_another_type_names_row_and_type(tmp_path: Path, prompt: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(write_jsonl(tmp_path / "a.jsonl", {"prompt": "fine"}, {"prompt": prompt}))


@pytest.mark.parametrize("content", ["", '{"prompt": " "}'])
def test_a_file_without_prompts_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"no prompts in .*a\.jsonl"):
        load(tmp_path / "a.jsonl")


def test_film_reviews_are_generated_the_same_each_time() -> None:
    loaded = load("film_reviews")
    assert len(loaded.prompts) == 4096
    assert loaded == load("film_reviews")


def test_no_held_out_prompt_is_trained_on() -> None:
    prompts = numbered(*range(10), *range(10))
    train, held_out = split_prompts(prompts, held_out=3, seed=0)
    assert (len(train), len(held_out)) == (7, 3)
    assert sorted(prompt.token_ids for prompt in train + held_out) == [(n,) for n in range(10)]


def test_a_split_depends_on_its_seed_only() -> None:
    prompts = numbered(*range(100))
    once, again, other = (split_prompts(prompts, held_out=10, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once != other


@pytest.mark.parametrize(("held_out", "expected"), [(0, 0), (2, 2), (3, 2), (100, 2)])
def test_at_most_half_of_the_distinct_prompts_are_held_out(held_out: int, expected: int) -> None:
    train, held = split_prompts(numbered(1, 2, 3, 4, 5, 5, 5), held_out=held_out, seed=0)
    assert (len(train), len(held)) == (5 - expected, expected)


def test_a_single_distinct_prompt_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="1 distinct prompts cannot be divided: add prompts"):
        split_prompts(numbered(1, 1), held_out=1, seed=0)


def test_rounds_use_every_prompt_once_before_any_again() -> None:
    prompts = numbered(*range(10))
    drawn = [p for k in range(6) for p in round_prompts(prompts, round_=k, num=5, seed=0)]
    epochs = [[prompt.token_ids[0] for prompt in drawn[start : start + 10]] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_round_is_the_same_when_asked_again_and_depends_on_the_seed() -> None:
    prompts = numbered(*range(50))
    once, again, other = (round_prompts(prompts, round_=3, num=8, seed=seed) for seed in (0, 0, 1))
    assert once == again
    assert once != other


def test_a_round_larger_than_the_set_wraps_around() -> None:
    drawn = round_prompts(numbered(1, 2, 3), round_=0, num=7, seed=0)
    counts = [sum(prompt.token_ids == (n,) for prompt in drawn) for n in (1, 2, 3)]
    assert sorted(counts) == [2, 2, 3]


@pytest.mark.skipif(not SHARED.exists(), reason="sample data is not here")
def test_gsm8k_questions_carry_their_answers() -> None:
    loaded = load(SHARED / "gsm8k-test.jsonl", column="question", max_tokens=10**6)
    assert len(loaded.prompts) == 1319
    assert str(loaded.prompts[0].fields["answer"]).endswith("#### 18")


@pytest.mark.skipif(not SHARED.exists(), reason="sample data is not here")
def test_each_hh_rlhf_row_gives_a_prompt_that_ends_before_an_answer() -> None:
    source = SHARED / "hh-rlhf-harmless-base-test.jsonl.gz"
    plain, chat = load(source, max_tokens=10**6), load(source, CHAT, max_tokens=10**6)
    assert len(plain.prompts) == len(chat.prompts) == 2312
    assert all(str(prompt.text).endswith("\n\nAssistant:") for prompt in plain.prompts)
    assert all(prompt.text[0]["role"] == "user" for prompt in chat.prompts if isinstance(prompt.text, list))
