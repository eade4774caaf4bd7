"""The starter is made once, whole, and the same each time."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dpo_ray.film_reviews import VOCABULARY, generate_reviews
from dpo_ray.starter import Recipe, make_random_model, make_review_tokenizer, make_starter

TINY = Recipe(steps=3, batch_size=4, warmup_steps=1, hidden_size=64, num_layers=1)
QUESTIONS = [f"How many apples are left of {num} after Anna eats two?" for num in range(50)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random_model")
    make_random_model(QUESTIONS, folder, vocab_size=400)
    return folder


def ignore_progress(step: int, num_steps: int, loss: float) -> None:
    pass


def test_a_review_comes_back_from_its_tokens() -> None:
    tokenizer = make_review_tokenizer()
    for review in ["the film was dull .", *generate_reviews(50, seed=0)]:
        token_ids = tokenizer(review)["input_ids"]
        assert len(token_ids) == len(review.split())
        assert tokenizer.decode(token_ids) == review


def test_every_word_of_the_grammar_has_a_token_of_its_own() -> None:
    tokenizer = make_review_tokenizer()
    token_ids = tokenizer(" ".join(VOCABULARY))["input_ids"]
    assert len(set(token_ids)) == len(VOCABULARY)
    assert not set(token_ids) & set(tokenizer.all_special_ids)


def test_a_conversation_is_rendered_as_its_last_user_message() -> None:
    conversation = [
        {"role": "user", "content": "this plot"},
        {"role": "assistant", "content": "is dull ."},
        {"role": "user", "content": "the film"},
    ]
    rendered = make_review_tokenizer().apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False
    )
    assert rendered == "the film"


def test_the_starter_is_trained_once_and_then_cached(cache: Path) -> None:
    steps: list[tuple[int, int]] = []
    first = make_starter(0, lambda step, num_steps, loss: steps.append((step, num_steps)), recipe=TINY)
    again = make_starter(0, lambda *_: pytest.fail("trained again"), recipe=TINY)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert again == first
    assert list(cache.iterdir()) == [first]


def test_another_seed_or_recipe_is_another_starter(cache: Path) -> None:
    one_step = Recipe(steps=1, batch_size=2, warmup_steps=1, hidden_size=64, num_layers=1)
    folders = {
        make_starter(0, ignore_progress, recipe=TINY),
        make_starter(1, ignore_progress, recipe=TINY),
        make_starter(0, ignore_progress, recipe=one_step),
    }
    assert len(folders) == 3


def test_a_killed_run_leaves_no_model(cache: Path) -> None:
    def kill(step: int, num_steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_starter(0, kill, recipe=TINY)
    assert not list(cache.glob("starter-*"))


def test_the_starter_loads_as_any_hugging_face_model(cache: Path) -> None:
    folder = make_starter(0, ignore_progress, recipe=TINY)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("the film was dull .")["input_ids"]) == "the film was dull ."
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_fine_tuning_lowers_the_loss(cache: Path) -> None:
    losses: list[float] = []
    recipe = Recipe(steps=60, batch_size=8, warmup_steps=2, hidden_size=64, num_layers=1)
    make_starter(0, lambda step, num_steps, loss: losses.append(loss), recipe=recipe)
    assert losses[-1] < losses[0] - 1


def test_a_random_model_reads_any_text(random_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    model = AutoModelForCausalLM.from_pretrained(random_model)
    text = "How many apples? Zwölf: 12 €!"
    encoded = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(encoded["input_ids"][0]) == text
    assert model(**encoded).logits.shape == (*encoded["input_ids"].shape, len(tokenizer))


def test_a_random_model_speaks_chatml(random_model: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(random_model)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many?"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_seed_decides_a_random_model(random_model: Path, tmp_path: Path) -> None:
    make_random_model(QUESTIONS, tmp_path / "same", vocab_size=400)
    make_random_model(QUESTIONS, tmp_path / "other", vocab_size=400, seed=1)
    for name, is_same in [("same", True), ("other", False)]:
        made = (tmp_path / name / "model.safetensors").read_bytes()
        assert (made == (random_model / "model.safetensors").read_bytes()) is is_same
    for name in ["same", "other"]:
        made = (tmp_path / name / "tokenizer.json").read_text()
        assert made == (random_model / "tokenizer.json").read_text()
