"""Each family's chat template is applied once: one beginning token, one token that ends the answer."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dpo_ray.preference_data import load_pairs
from dpo_ray.tokenization import tokenize_prompt
from dpo_ray.types import Message, Pair

MakeTokenizer = Callable[["Family"], PreTrainedTokenizerFast]
TEXTS = ["user", "assistant", "system", "Why is the sky blue?", "Because of the air.", "No idea.", "Be kind."]


@dataclass(frozen=True)
class Family:
    """The special tokens and the chat template of a family of models, in its style."""

    specials: tuple[str, ...]
    template: str | None
    eos: str
    end: str
    """What the policy writes last in a chat."""
    bos: str | None = None
    adds_bos: bool = False
    """Whether the tokenizer itself writes a BOS before a text."""
    default_system: str = ""


LLAMA = Family(
    specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    template="{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    eos="<|eot_id|>",
    end="<|eot_id|>",
    bos="<|begin_of_text|>",
    adds_bos=True,
)
QWEN = Family(
    specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    template="{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    eos="<|im_end|>",
    end="<|im_end|>",
)
GEMMA = Family(
    specials=("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    template="{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "<start_of_turn>{{ role }}\n{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    eos="<eos>",
    end="<end_of_turn>",
    bos="<bos>",
    adds_bos=True,
)
PHI = Family(
    specials=("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
    template="{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    eos="<|endoftext|>",
    end="<|end|>",
    bos="<s>",
)
WITHOUT_END = Family(
    specials=("<|endoftext|>", "<|user|>", "<|assistant|>"),
    template="{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    eos="<|endoftext|>",
    end="<|endoftext|>",
)
NEOX = Family(specials=("<|endoftext|>",), template=None, eos="<|endoftext|>", end="<|endoftext|>")
CHAT_FAMILIES = {"llama": LLAMA, "qwen": QWEN, "gemma": GEMMA, "phi": PHI, "without_end": WITHOUT_END}
each_chat_family = pytest.mark.parametrize("family", CHAT_FAMILIES.values(), ids=CHAT_FAMILIES)


def by_character(family: Family) -> PreTrainedTokenizerFast:
    """An ASCII character's id is its code; special tokens follow from 128 on."""
    specials = {token: 128 + number for number, token in enumerate(family.specials)}
    return finish(Tokenizer(BPE({**{chr(code): code for code in range(128)}, **specials}, [])), family)


def by_pieces(family: Family) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, trained on a few lines."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 3, trainer)
    return finish(backend, family)


def finish(backend: Tokenizer, family: Family) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(list(family.specials))
    if family.adds_bos and family.bos is not None:
        special = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = TemplateProcessing(single=f"{family.bos} $A", special_tokens=[special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, chat_template=family.template
    )


def ids(family: Family, *parts: str) -> tuple[int, ...]:
    """Ids of `by_character`: each part is a special token, or text."""
    special = {token: (128 + number,) for number, token in enumerate(family.specials)}
    return tuple(id_ for part in parts for id_ in special.get(part, tuple(map(ord, part))))


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def load(folder: Path, tokenizer: PreTrainedTokenizerFast, **row: object) -> Pair:
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    loaded = load_pairs(
        str(folder / "pairs.jsonl"),
        split="train",
        tokenizer=tokenizer,
        max_tokens=1000,
        unpaired_allowed=True,
    )
    (pair,) = loaded.pairs
    return pair


def load_talk(folder: Path, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[Message]) -> Pair:
    answers = {"chosen": [turn("assistant", "Air.")], "rejected": [turn("assistant", "No")]}
    return load(folder, tokenizer, prompt=prompt, **answers)


def test_llama_ids_by_hand(tmp_path: Path) -> None:
    pair = load_talk(tmp_path, by_character(LLAMA), [turn("user", "Why?")])
    assert pair.prompt_ids == ids(
        LLAMA,
        *("<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\nWhy?", "<|eot_id|>"),
        *("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"),
    )
    assert pair.chosen_ids == ids(LLAMA, "Air.", "<|eot_id|>")
    assert pair.rejected_ids == ids(LLAMA, "No", "<|eot_id|>")


def test_qwen_ids_by_hand_stop_before_the_newline_that_nobody_writes(tmp_path: Path) -> None:
    pair = load_talk(tmp_path, by_character(QWEN), [turn("user", "Why?")])
    assert pair.prompt_ids == ids(
        QWEN,
        *("<|im_start|>", "system\nBe kind.", "<|im_end|>", "\n"),
        *("<|im_start|>", "user\nWhy?", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
    )
    assert pair.chosen_ids == ids(QWEN, "Air.", "<|im_end|>")
    assert pair.rejected_ids == ids(QWEN, "No", "<|im_end|>")


def test_gemma_ids_by_hand_end_with_the_turn_and_not_with_eos(tmp_path: Path) -> None:
    pair = load_talk(tmp_path, by_character(GEMMA), [turn("user", "Why?")])
    assert pair.prompt_ids == ids(
        GEMMA,
        *("<bos>", "<start_of_turn>", "user\nWhy?", "<end_of_turn>", "\n"),
        *("<start_of_turn>", "model\n"),
    )
    assert pair.chosen_ids == ids(GEMMA, "Air.", "<end_of_turn>")
    assert pair.rejected_ids == ids(GEMMA, "No", "<end_of_turn>")


def test_neox_ids_by_hand_are_the_text_and_one_eos(tmp_path: Path) -> None:
    pair = load(tmp_path, by_character(NEOX), prompt="Why?", chosen=" Air.", rejected=" No")
    assert pair.prompt_ids == ids(NEOX, "Why?")
    assert pair.chosen_ids == ids(NEOX, " Air.", "<|endoftext|>")
    assert pair.rejected_ids == ids(NEOX, " No", "<|endoftext|>")


def test_neox_refuses_messages_by_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1: these are messages, .* no chat template"):
        load_talk(tmp_path, by_character(NEOX), [turn("user", "Why?")])


def test_of_two_end_tokens_the_first_ends_the_answer(tmp_path: Path) -> None:
    pair = load_talk(tmp_path, by_character(PHI), [turn("user", "Why?")])
    assert pair.prompt_ids == ids(PHI, "<|user|>", "\nWhy?", "<|end|>", "\n", "<|assistant|>", "\n")
    assert pair.chosen_ids == ids(PHI, "Air.", "<|end|>")


def test_a_template_without_end_token_gets_eos(tmp_path: Path) -> None:
    pair = load_talk(tmp_path, by_character(WITHOUT_END), [turn("user", "Why?")])
    assert pair.chosen_ids == ids(WITHOUT_END, "Air.", "<|endoftext|>")


@each_chat_family
@pytest.mark.parametrize("make_tokenizer", [by_character, by_pieces])
@pytest.mark.parametrize(
    "prompt",
    [
        [turn("user", "Why is the sky blue?")],
        [turn("user", "Why?"), turn("assistant", "Because of the air."), turn("user", "Be kind.")],
    ],
    ids=["one_turn", "three_turns"],
)
def test_prompt_and_completion_are_the_template_applied_once(
    tmp_path: Path, family: Family, make_tokenizer: MakeTokenizer, prompt: list[Message]
) -> None:
    tokenizer = make_tokenizer(family)
    pair = load_talk(tmp_path, tokenizer, prompt)
    for token_ids, answer in ((pair.chosen_ids, "Air."), (pair.rejected_ids, "No")):
        conversation = cast(list[dict[str, str]], [*prompt, turn("assistant", answer)])
        rendered = str(tokenizer.apply_chat_template(conversation, tokenize=False))
        whole = tuple(tokenizer(rendered, add_special_tokens=False).input_ids)
        end = cast(int, tokenizer.convert_tokens_to_ids(family.end))
        if family is WITHOUT_END:
            whole = (*whole, end)
        made = (*pair.prompt_ids, *token_ids)
        assert made == whole[: len(made)]
        assert str(tokenizer.decode(list(whole[len(made) :]))).removesuffix(family.eos).strip() == ""
        assert token_ids.count(end) == 1
        assert token_ids[-1] == end
        assert [id_ for id_ in made if id_ == tokenizer.bos_token_id] == (
            [made[0]] if family in (LLAMA, GEMMA) else []
        )


@pytest.mark.parametrize("family", [LLAMA, QWEN], ids=["llama", "qwen"])
@pytest.mark.parametrize("make_tokenizer", [by_character, by_pieces])
@pytest.mark.parametrize("after_end", ["", "\n"])
def test_a_conversation_that_was_written_out_as_text_gives_the_same_ids(
    tmp_path: Path, family: Family, make_tokenizer: MakeTokenizer, after_end: str
) -> None:
    tokenizer = make_tokenizer(family)
    prompt = [turn("user", "Why?")]
    rendered = tokenizer.apply_chat_template(
        cast(list[dict[str, str]], prompt), add_generation_prompt=True, tokenize=False
    )
    texts = {"chosen": f"Air.{family.end}{after_end}", "rejected": f"No{family.end}{after_end}"}
    written = load(tmp_path, tokenizer, prompt=rendered, **texts)
    talk = load_talk(tmp_path, tokenizer, prompt)
    assert written.prompt_ids == talk.prompt_ids
    assert (written.chosen_ids, written.rejected_ids) == (talk.chosen_ids, talk.rejected_ids)


@each_chat_family
def test_a_thumb_on_a_conversation_has_the_ids_of_the_pairs_side(tmp_path: Path, family: Family) -> None:
    tokenizer, prompt = by_pieces(family), [turn("user", "Why?")]
    pair = load_talk(tmp_path, tokenizer, prompt)
    up = load(tmp_path, tokenizer, prompt=prompt, completion=[turn("assistant", "Air.")], label=True)
    down = load(tmp_path, tokenizer, messages=[*prompt, turn("assistant", "No")], label=False)
    assert (up.prompt_ids, up.chosen_ids, up.rejected_ids) == (pair.prompt_ids, pair.chosen_ids, ())
    assert (down.prompt_ids, down.chosen_ids, down.rejected_ids) == (pair.prompt_ids, (), pair.rejected_ids)


@each_chat_family
def test_offline_prompts_are_those_that_a_sampler_would_see(tmp_path: Path, family: Family) -> None:
    tokenizer, prompt = by_pieces(family), [turn("user", "Why?")]
    assert load_talk(tmp_path, tokenizer, prompt).prompt_ids == tokenize_prompt(prompt, tokenizer)


def test_a_system_turn_that_the_template_refuses_is_named_by_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1: .*refuses these messages: System role not supported"):
        load_talk(tmp_path, by_character(GEMMA), [turn("system", "Be kind."), turn("user", "Why?")])


def test_a_system_turn_replaces_the_default_one(tmp_path: Path) -> None:
    pair = load_talk(tmp_path, by_character(QWEN), [turn("system", "Hm."), turn("user", "Why?")])
    assert pair.prompt_ids[:12] == ids(QWEN, "<|im_start|>", "system\nHm.", "<|im_end|>")


def test_a_template_that_leaves_out_answers_is_refused(tmp_path: Path) -> None:
    mute = Family(specials=("<eos>",), template="{{ messages[0].content }}", eos="<eos>", end="<eos>")
    with pytest.raises(ValueError, match=r"row 1: .*leaves out what the assistant says"):
        load_talk(tmp_path, by_character(mute), [turn("user", "Why?")])


@pytest.mark.parametrize("tools", [[{"name": "clock"}], '[{"name": "clock"}]'])
def test_tools_and_template_settings_reach_the_template(tmp_path: Path, tools: object) -> None:
    family = Family(
        specials=("<eos>",),
        template="{{ tools[0].name }}:{{ mood }}:{% if unset is defined %}set{% endif %}"
        "{% for message in messages %}{{ message.content }}<eos>{% endfor %}",
        eos="<eos>",
        end="<eos>",
    )
    settings = {"tools": tools, "chat_template_kwargs": {"mood": "calm", "unset": None}}
    answers = {"chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "b")]}
    pair = load(tmp_path, by_character(family), prompt=[turn("user", "Q")], **settings, **answers)
    assert pair.prompt_ids == ids(family, "clock:calm:Q", "<eos>")
    assert pair.chosen_ids == ids(family, "a", "<eos>")
