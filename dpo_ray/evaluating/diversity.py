"""How much the completions of a policy repeat each other; words are what white space separates."""

import math
from collections import Counter
from collections.abc import Sequence

from dpo_ray.evaluation import mean

Words = Sequence[str]
_LONGEST_NGRAM = 4


def distinct_share(texts: Sequence[str], *, n: int) -> float:
    """Different n-grams per n-gram of all texts together (distinct-n, arXiv:1510.03055); NaN of none.

    It falls as texts get more: compare only where the policies have as many.
    """
    grams = [gram for text in texts for gram in _ngrams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(groups: Sequence[Sequence[str]]) -> float:
    """Mean BLEU of each text against the others of its group (arXiv:1802.01886), from 0 to 1; NaN of none.

    1: all completions of a prompt are the same.
    """
    scores: list[float] = []
    for group in groups:
        texts = [text.split() for text in group]
        for place, words in enumerate(texts):
            others = [other for at, other in enumerate(texts) if at != place]
            if others:
                scores.append(sentence_bleu(words, others))
    return mean(scores)


def sentence_bleu(words: Words, references: Sequence[Words]) -> float:
    """BLEU-4 of one text, from 0 to 1; 1 is added to counts above unigrams (Lin and Och, ACL 2004)."""
    if not words:
        return 0.0
    logs = [_log_precision(words, references, n) for n in range(1, _LONGEST_NGRAM + 1)]
    closest = min((abs(len(each) - len(words)), len(each)) for each in references)[1]
    brevity = min(0.0, 1 - closest / len(words))
    return math.exp(brevity + sum(logs) / _LONGEST_NGRAM)


def _log_precision(words: Words, references: Sequence[Words], n: int) -> float:
    """Log of the share of n-grams that a reference has too, each as often as the one with the most has it."""
    grams, allowed = Counter(_ngrams(words, n)), Counter[tuple[str, ...]]()
    for reference in references:
        allowed |= Counter(_ngrams(reference, n))
    added = 0 if n == 1 else 1
    matched = (grams & allowed).total() + added
    return math.log(matched / (grams.total() + added)) if matched else -math.inf


def _ngrams(words: Words, n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
