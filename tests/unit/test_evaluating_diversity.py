"""Repetition, worked out by hand and by another implementation."""

import math
import random

import pytest
from sacrebleu.metrics.bleu import BLEU

from dpo_ray.evaluating.diversity import distinct_share, self_bleu, sentence_bleu


def test_distinct_n_is_the_share_of_different_ngrams() -> None:
    texts = ["a b a b", "a b c"]
    assert distinct_share(texts, n=1) == 3 / 7
    assert distinct_share(texts, n=2) == 3 / 5  # ab, ba, bc of ab ba ab ab bc.
    assert math.isnan(distinct_share(["a", ""], n=2))


def test_self_bleu_of_equal_texts_is_one_and_of_strangers_nothing() -> None:
    assert self_bleu([["so it is now", "so it is now"]]) == 1.0
    assert self_bleu([["a b c d", "e f g h"]]) == 0.0


def test_self_bleu_worked_out_by_hand() -> None:
    # Each of the two: 3 of 4 words, 2 + 1 of 3 + 1 pairs, 1 + 1 of 2 + 1, 0 + 1 of 1 + 1; equally long.
    expected = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert self_bleu([["a b c d", "a b c e"]]) == pytest.approx(expected)


def test_one_completion_of_a_prompt_has_nothing_to_repeat() -> None:
    assert math.isnan(self_bleu([["a b"], ["a b"]]))
    assert self_bleu([["a b"], ["c d", "c d"]]) == 1.0


def test_bleu_is_that_of_sacrebleu() -> None:
    rng = random.Random(0)
    other = BLEU(smooth_method="add-k", smooth_value=1, tokenize="none", effective_order=False)
    for _ in range(40):
        words, *references = [[rng.choice("abcde") for _ in range(rng.randint(4, 12))] for _ in range(4)]
        theirs = other.sentence_score(" ".join(words), [" ".join(each) for each in references]).score
        assert sentence_bleu(words, references) == pytest.approx(theirs / 100)
