"""Each rule, against the plainest way to say what it does."""

import hashlib
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from random import Random

import numpy as np
import pytest
from scored import config, pairs_of, scored, texts

from dpo_ray.pairing import PairingError, make_pairs
from dpo_ray.types import Pair, ScoredCompletion

Rewards = dict[str, float]
"""By text, in the order in which the completions were sampled."""
Sides = tuple[str, str]


def best_vs_worst(rewards: Rewards) -> set[Sides]:
    ranked = sorted(rewards, key=lambda text: rewards[text])
    return {(ranked[-1], ranked[0])}


def all_pairs(rewards: Rewards) -> set[Sides]:
    return {(a, b) for a, b in permutations(rewards, 2) if rewards[a] > rewards[b]}


def best_vs_any(rewards: Rewards) -> set[Sides]:
    return {(a, b) for a, b in all_pairs(rewards) if rewards[a] == max(rewards.values())}


def best_vs_two_sigma(rewards: Rewards) -> set[Sides]:
    values = np.array(list(rewards.values()))
    target = values.mean() - 2 * values.std()
    best = max(rewards, key=lambda text: rewards[text])
    _, rejected = min((abs(reward - target), text) for text, reward in rewards.items() if text != best)
    return {(best, rejected)}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("best_vs_worst", best_vs_worst), ("all_pairs", all_pairs), ("best_vs_two_sigma", best_vs_two_sigma)],
)
def test_pairs_are_those_of_the_plain_rule(rule: str, expected: Callable[[Rewards], set[Sides]]) -> None:
    for rewards in random_rewards():
        assert sides(rewards, rule) == expected(rewards)


@pytest.mark.parametrize(("rule", "allowed"), [("best_vs_random", best_vs_any), ("random_pair", all_pairs)])
def test_each_random_choice_is_as_likely_as_another(
    rule: str, allowed: Callable[[Rewards], set[Sides]]
) -> None:
    rewards = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.0}
    drawn = Counter(chosen for seed in range(1000) for chosen in sides(rewards, rule, seed=seed))
    assert drawn.keys() == allowed(rewards)
    expected = 1000 / len(drawn)
    chi_squared = sum((count - expected) ** 2 / expected for count in drawn.values())
    assert chi_squared < 15  # Of 2 or 4 degrees of freedom: less than 1 in 200.


@pytest.mark.parametrize("rule", ["best_vs_random", "random_pair"])
def test_a_choice_depends_on_seed_round_and_prompt_alone(rule: str) -> None:
    prompts = [f"prompt {number}" for number in range(20)]
    candidates = {prompt: [scored(text, ord(text), prompt=prompt) for text in "abcdef"] for prompt in prompts}

    def choices(order: list[str], *, round_: int = 0, seed: int = 0) -> dict[str, Sides]:
        everything = [item for prompt in order for item in candidates[prompt]]
        made = make_pairs(everything, config(rule), round_=round_, seed=seed).pairs
        return {str(pair.prompt): (str(pair.chosen), str(pair.rejected)) for pair in made}

    first = choices(prompts)
    assert choices(prompts[::-1]) == choices(prompts) == first
    assert choices(prompts[:3]) == {prompt: first[prompt] for prompt in prompts[:3]}
    assert choices(prompts, round_=1) != first
    assert choices(prompts, seed=1) != first
    assert len(set(first.values())) > 1


def test_mean_less_two_sigma_passes_over_the_outlier() -> None:
    """Mean -1, sum of squares 520 over 20, so sigma 5 and the target -11: -7 is nearer than -20."""
    rewards = [-20, 7, -7, 3, -3, 1, 1, -1, -1, *[0] * 11]
    candidates = [scored(f"{place} {reward}", reward) for place, reward in enumerate(rewards)]
    (pair,) = pairs_of(candidates, config("best_vs_two_sigma"))
    assert (pair.chosen_reward, pair.rejected_reward) == (7, -7)


def test_of_two_as_near_to_the_target_the_lower_one_is_rejected() -> None:
    """Mean 0, sum of squares 44 over 11, so sigma 2 and the target -4: -3 and -5 are as near."""
    rewards = [0, -3, 1, 1, 1, -5, 1, 1, 1, 0, 2]
    candidates = [scored(f"{place} {reward}", reward) for place, reward in enumerate(rewards)]
    (pair,) = pairs_of(candidates, config("best_vs_two_sigma"))
    assert (pair.chosen_reward, pair.rejected_reward) == (2, -5)


@pytest.fixture
def own_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The import path of a rule that returns the value of an expression."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str) -> str:
        name = f"rule_{hashlib.sha256(body.encode()).hexdigest()[:8]}"
        (tmp_path / f"{name}.py").write_text(f"def mine(contenders, random):\n    return {body}\n")
        return f"{name}:mine"

    return write


def test_a_rule_that_pairs_a_completion_twice_makes_one_pair(own_rule: Callable[[str], str]) -> None:
    rule = own_rule("[(contenders[0], contenders[1]), (contenders[1], contenders[0])]")
    made = make_pairs([scored("a", 1), scored("b", 0)], config(rule), round_=0, seed=0)
    assert texts(made.pairs) == [("a", "b")]
    assert made.counts.matched == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", r"pairing.rule .*mine failed on 2 completions of 'Q': ZeroDivisionError: division by zero"),
        ("None", "failed on 2 completions of 'Q': TypeError"),
        ("[contenders * 2]", "failed on 2 completions of 'Q': ValueError: too many values to unpack"),
        ("[(contenders[0], 'b')]", "paired what is no completion of 'Q': pair those that it is called with"),
    ],
)
def test_a_rule_that_fails_is_named(own_rule: Callable[[str], str], body: str, message: str) -> None:
    with pytest.raises(PairingError, match=message):
        pairs_of([scored("a", 1), scored("b", 0)], config(own_rule(body)))


def random_rewards() -> list[Rewards]:
    """All rewards of one prompt are different."""
    random = Random(0)
    return [
        {f"answer {place}": random.gauss(0, 1) for place in range(random.randint(2, 12))} for _ in range(200)
    ]


def sides(rewards: Rewards, rule: str, *, seed: int = 0) -> set[Sides]:
    candidates: list[ScoredCompletion] = [scored(text, reward) for text, reward in rewards.items()]
    made: list[Pair] = make_pairs(candidates, config(rule), round_=0, seed=seed).pairs
    return {(str(pair.chosen), str(pair.rejected)) for pair in made}
