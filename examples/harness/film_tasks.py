"""Rows of the film tasks, generated here: what a review goes on with after its first verb.

`film_praise.yaml` and `film_grammar.yaml` name these functions, and `jobs/harness.py` runs them. A task of
your own is such a YAML file: with rows of a file (`dataset_path: json`), or of a function like these.
"""

import random
from typing import Any

from datasets import Dataset

from dpo_ray.film_reviews import CONNECTIVES, NEGATIVE, POSITIVE, SINGULAR, generate_reviews

NUM_ROWS = 200


def praise(**_: Any) -> dict[str, Dataset]:
    """A praising word, then a blaming one: a policy that only imitates takes either."""
    rng = random.Random(0)
    return _as_task([(opening, [rng.choice(POSITIVE), rng.choice(NEGATIVE)]) for opening in _openings()])


def grammar(**_: Any) -> dict[str, Dataset]:
    """An opinion, then three words that cannot come here."""
    rng = random.Random(0)
    wrong = (CONNECTIVES, SINGULAR.determiners, SINGULAR.nouns)
    return _as_task(
        [
            (opening, [rng.choice(POSITIVE + NEGATIVE), *(rng.choice(words) for words in wrong)])
            for opening in _openings()
        ]
    )


def _openings() -> list[str]:
    """Reviews up to their first opinion."""
    opinions = {*POSITIVE, *NEGATIVE}
    reviews = [review.split() for review in generate_reviews(NUM_ROWS, seed=1)]
    return [
        " ".join(words[: next(at for at, word in enumerate(words) if word in opinions)]) for words in reviews
    ]


def _as_task(rows: list[tuple[str, list[str]]]) -> dict[str, Dataset]:
    """The first choice is the right one."""
    return {
        "test": Dataset.from_list(
            [{"prompt": prompt, "choices": choices, "answer": 0} for prompt, choices in rows]
        )
    }
