"""All completions are accounted for: each is paired, or lost for one reason."""

from random import Random

import pytest
from scored import config, scored

from dpo_ray.config import PairingConfig
from dpo_ray.pairing import MadePairs, PairYield, make_pairs
from dpo_ray.pairing.yields import COMPLETION_LOSSES, MATCH_LOSSES
from dpo_ray.types import ScoredCompletion

STRICT = {"min_margin": 1.0, "max_similarity": 0.6, "max_length_ratio": 3.0}
PAIRINGS = [
    *(
        config(rule, degenerate="drop", **STRICT)
        for rule in ("best_vs_worst", "random_pair", "best_vs_random")
    ),
    config("all_pairs", degenerate="reject_only", **STRICT),
    config("unpaired", degenerate="reject_only", min_margin=1.0),
    config("all_pairs"),
]


def total(counts: PairYield, *names: str) -> int:
    return sum(getattr(counts, name) for name in names)


def random_completions(random: Random) -> list[ScoredCompletion]:
    return [
        scored(
            "".join(random.choices("ab", k=random.randint(0, 6))),
            random.choice([None, *map(float, range(5))]),
            prompt=random.choice("PQ"),
            end=random.choice(["stop", "stop", "length"]),
        )
        for _ in range(random.randint(0, 30))
    ]


@pytest.mark.parametrize("pairing", PAIRINGS, ids=lambda pairing: f"{pairing.rule} {pairing.degenerate}")
def test_the_counts_add_up(pairing: PairingConfig) -> None:
    random = Random(0)
    for _ in range(50):
        completions = random_completions(random)
        made = make_pairs(completions, pairing, round_=0, seed=0)
        kept = {pair.pair_id for pair in made.pairs if random.random() < 0.5}
        counts = made.in_snapshot(kept, min_policy_version=random.choice([0, 4]))
        assert counts.completions == len(completions)
        assert counts.completions == total(counts, *COMPLETION_LOSSES, "usable")
        assert counts.matched == total(counts, *MATCH_LOSSES, "made")
        assert counts.made == len(made.pairs) == total(counts, "too_old", "not_drawn", "kept")
        assert counts.kept == len(kept)


def test_every_completion_and_match_is_counted_for_the_first_reason() -> None:
    completions = [
        *(scored("unjudged", None), scored("", 1), scored("cut", 9, end="length")),
        *(scored("abcdef", 5), scored("abcdef", 4)),
        *(scored("abcdeg", 3), scored("abc", 5), scored("z" * 15, 1)),
    ]
    pairing = config("all_pairs", degenerate="drop", min_margin=1, max_similarity=0.8, max_length_ratio=2)
    assert make_pairs(completions, pairing, round_=0, seed=0).counts == PairYield(
        completions=8,
        unjudged=1,
        empty=1,
        degenerate=1,
        identical=1,
        matched=6,  # Of abcdef, abcdeg, abc and the z.
        tie=1,  # abcdef and abc.
        near_identical=1,  # abcdef and abcdeg.
        length=3,  # Each with the z.
        made=1,
    )


@pytest.fixture
def made() -> MadePairs:
    completions = [
        scored(text, reward, prompt=f"prompt {version}", version=version)
        for version in (1, 2, 3)
        for text, reward in (("good", 1), ("bad", 0))
    ]
    return make_pairs(completions, config(), round_=0, seed=0)


def test_pairs_not_in_the_snapshot_are_too_old_or_over_its_limit(made: MadePairs) -> None:
    counts = made.in_snapshot({made.pairs[2].pair_id, "of another round"}, min_policy_version=2)
    assert (counts.made, counts.too_old, counts.not_drawn, counts.kept) == (3, 1, 1, 1)


def test_counts_come_back_from_the_metrics_of_a_round(made: MadePairs) -> None:
    counts = made.in_snapshot(set(), min_policy_version=2)
    metrics = counts.metrics()
    assert metrics["yield/too_old"] == 1
    assert PairYield.from_metrics({"round": 3, **metrics}) == counts
    assert PairYield.from_metrics({"round": 3}) == PairYield(completions=0)


@pytest.mark.parametrize(
    ("counts", "is_poor"),
    [
        (PairYield(completions=0), False),
        (PairYield(completions=20, matched=10, tie=9, made=1), False),
        (PairYield(completions=22, matched=11, tie=10, made=1), True),
        (PairYield(completions=10, unjudged=9, matched=1, made=1), False),
        (PairYield(completions=11, unjudged=10, matched=1, made=1), True),
        (PairYield(completions=10), True),
        (PairYield(completions=100, matched=10, made=10, not_drawn=10), False),
    ],
)
def test_a_yield_below_a_tenth_is_poor(counts: PairYield, is_poor: bool) -> None:
    assert counts.is_poor == is_poor


def test_the_sentence_names_what_was_lost() -> None:
    counts = PairYield(completions=16, unjudged=4, matched=9, tie=7, near_identical=1, made=1)
    assert counts.sentence() == (
        "of 16 completions 12 could be paired (4 unjudged); "
        "of 9 matches 1 became pairs (7 tie, 1 near identical)"
    )


@pytest.mark.parametrize(
    ("counts", "advice"),
    [
        (PairYield(completions=8, unjudged=6, matched=1, tie=1), "take a judge that can rate"),
        (PairYield(completions=8, identical=1, matched=4, tie=4), "lower pairing.min_margin"),
        (PairYield(completions=8, matched=4, no_answer=4), "set pairing.answer_column"),
        (PairYield(completions=8), "set pairing.rule"),
    ],
)
def test_the_advice_is_for_the_greatest_loss(counts: PairYield, advice: str) -> None:
    assert advice in counts.advice()


@pytest.mark.parametrize("name", [*COMPLETION_LOSSES, *MATCH_LOSSES, "too_old"])
def test_there_is_advice_for_each_loss(name: str) -> None:
    none = PairYield(completions=9).advice()
    assert PairYield(completions=9, **{name: 9}).advice() != none
