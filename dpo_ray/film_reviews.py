"""Short film reviews from a small grammar: text whose sentiment and fluency are exact.

    review      = [opener] clause (connective clause){MIN_CLAUSES - 1, MAX_CLAUSES - 1} "."
    clause      = noun phrase verb [adverb] opinion
    noun phrase = determiner noun                 (the determiner, noun and verb agree in number)

Each clause praises or blames by the toss of a coin, whatever its neighbours say, so a policy
that imitates the reviews is positive half of the time and has everything to learn.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dpo_ray.types import Completion, Judgement, Text

MIN_CLAUSES = 3
MAX_CLAUSES = 4
END = "."

OPENERS = ("overall", "honestly", "frankly", "somehow", "again")
CONNECTIVES = ("and", "but", "while", "yet", "although", "whereas")
ADVERBS = ("very", "quite", "rather", "truly", "really", "so", "often", "mostly")
POSITIVE = (
    *("superb", "great", "brilliant", "moving", "charming", "fresh", "gripping", "elegant"),
    *("lovely", "clever", "warm", "bright", "tender", "honest", "vivid", "graceful"),
)
NEGATIVE = (
    *("dull", "weak", "boring", "bland", "clumsy", "stale", "flat", "awful"),
    *("messy", "tedious", "shallow", "silly", "noisy", "lazy", "cold", "hollow"),
)


@dataclass(frozen=True, slots=True)
class _Number:
    """The words that agree with each other: singular or plural."""

    determiners: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]


class ReviewPair(NamedTuple):
    """Two ways to go on with an opening, and the judge's rewards for them."""

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float


SINGULAR = _Number(
    determiners=("the", "this", "that"),
    nouns=("film", "movie", "story", "plot", "script", "acting", "music", "pacing", "ending"),
    verbs=("is", "was", "seems", "felt"),
)
PLURAL = _Number(
    determiners=("the", "these", "those"),
    nouns=("actors", "jokes", "songs", "scenes", "effects", "twists"),
    verbs=("are", "were", "seem", "felt"),
)

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        word
        for words in (
            *(OPENERS, CONNECTIVES, ADVERBS, POSITIVE, NEGATIVE, (END,)),
            *(SINGULAR.determiners, SINGULAR.nouns, SINGULAR.verbs),
            *(PLURAL.determiners, PLURAL.nouns, PLURAL.verbs),
        )
        for word in words
    )
)
"""Every word of the grammar once, in a fixed order."""


def generate_review(rng: random.Random) -> str:
    """One review: lower-case words and the final full stop, separated by single spaces."""
    words = [rng.choice(OPENERS)] if rng.random() < 0.5 else []
    words += _generate_clause(rng)
    for _ in range(rng.randint(MIN_CLAUSES, MAX_CLAUSES) - 1):
        words += [rng.choice(CONNECTIVES), *_generate_clause(rng)]
    return " ".join([*words, END])


def _generate_clause(rng: random.Random) -> list[str]:
    return [*_generate_stem(rng), rng.choice(rng.choice((POSITIVE, NEGATIVE)))]


def _generate_stem(rng: random.Random) -> list[str]:
    """A clause up to its opinion."""
    number = rng.choice((SINGULAR, PLURAL))
    adverb = [rng.choice(ADVERBS)] if rng.random() < 0.5 else []
    return [rng.choice(number.determiners), rng.choice(number.nouns), rng.choice(number.verbs), *adverb]


def generate_reviews(num: int, seed: int) -> list[str]:
    """`num` reviews, the same ones for the same seed."""
    rng = random.Random(seed)
    return [generate_review(rng) for _ in range(num)]


def generate_prompts(num: int, seed: int) -> list[str]:
    """`num` openings of reviews, cut after two words or later but before the first opinion.

    The same ones for the same seed; an opening may come more than once.
    """
    rng = random.Random(seed)
    return [_cut_opening(generate_review(rng), rng) for _ in range(num)]


def _cut_opening(review: str, rng: random.Random) -> str:
    words = review.split()
    first_opinion = next(index for index, word in enumerate(words) if word in _OPINIONS)
    return " ".join(words[: rng.randint(2, first_opinion)])


def generate_pairs(num: int, seed: int) -> list[ReviewPair]:
    """`num` openings, each with a completion that only praises and one that does not.

    A completion begins with a space, and with its opening it is one review of the grammar. The same pairs
    for the same seed.
    """
    rng = random.Random(seed)
    return [_generate_pair(rng) for _ in range(num)]


def _generate_pair(rng: random.Random) -> ReviewPair:
    start = [rng.choice(OPENERS)] if rng.random() < 0.5 else []
    start += _generate_stem(rng)
    cut = rng.randint(2, len(start))
    chosen = rejected = _go_on(start[cut:], (POSITIVE,), rng)
    while (blamed := sentiment(rejected) or 0.0) == 1.0:
        rejected = _go_on(start[cut:], (POSITIVE, NEGATIVE), rng)
    return ReviewPair(" ".join(start[:cut]), chosen, rejected, sentiment(chosen) or 0.0, blamed)


def _go_on(stem: Sequence[str], opinions: Sequence[Sequence[str]], rng: random.Random) -> str:
    """The rest of a review whose first clause lacks `stem` and an opinion."""
    words = [*stem, rng.choice(rng.choice(opinions))]
    for _ in range(rng.randint(MIN_CLAUSES, MAX_CLAUSES) - 1):
        words += [rng.choice(CONNECTIVES), *_generate_stem(rng), rng.choice(rng.choice(opinions))]
    return "".join(f" {word}" for word in [*words, END])


def is_grammatical(text: str) -> bool:
    """Whether the whole text is one complete review of the grammar."""
    return _REVIEW.fullmatch(text) is not None


def sentiment(text: str) -> float | None:
    """Share of positive words among the opinion words of the text; None where it has none."""
    opinions = [word for word in text.split() if word in _OPINIONS]
    if not opinions:
        return None
    return sum(word in POSITIVE for word in opinions) / len(opinions)


def judge_reviews(completions: Sequence[Completion]) -> list[Judgement]:
    """Reward the sentiment of what the policy wrote itself, from 0 to 1.

    A completion without any opinion word failed at the task and gets 0. The metric
    `grammatical` is 1 where prompt and completion together are one complete review that the
    policy ended by itself; the reward does not see it.
    """
    return [_judge(completion) for completion in completions]


def _judge(completion: Completion) -> Judgement:
    review = f"{_last_content(completion.prompt.text)} {completion.text.strip()}"
    is_complete = completion.finish_reason == "stop" and is_grammatical(review)
    return Judgement(
        reward=sentiment(completion.text) or 0.0,
        metrics={"grammatical": float(is_complete)},
    )


def _last_content(text: Text) -> str:
    return text if isinstance(text, str) else text[-1]["content"]


def _any_of(words: Sequence[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, words))})"


def _make_pattern() -> re.Pattern[str]:
    """The grammar as a regular expression: it has no recursion."""
    subjects = "|".join(
        f"{_any_of(number.determiners)} {_any_of(number.nouns)} {_any_of(number.verbs)}"
        for number in (SINGULAR, PLURAL)
    )
    clause = f"(?:{subjects})(?: {_any_of(ADVERBS)})? {_any_of(POSITIVE + NEGATIVE)}"
    more = f"(?: {_any_of(CONNECTIVES)} {clause}){{{MIN_CLAUSES - 1},{MAX_CLAUSES - 1}}}"
    return re.compile(f"(?:{_any_of(OPENERS)} )?{clause}{more} {re.escape(END)}")


_OPINIONS = frozenset(POSITIVE + NEGATIVE)
_REVIEW = _make_pattern()
