"""What the reproductions through the real system compute: labels that err, budgets, frontiers, claims."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reproduce import staleness
from benchmarks.reproduce.film_bed import HELD_OUT, PER_PROMPT, as_pairs
from benchmarks.reproduce.film_labels import SCALE, bradley_terry, certain
from benchmarks.reproduce.language import Language, build
from benchmarks.reproduce.language_rounds import Rounds, drawn, improve
from benchmarks.reproduce.results import Results
from benchmarks.reproduce.sentiment_evidence import ARMS, Trained, claims, errors_above, growth
from benchmarks.reproduce.tilted import most_reward, tilted
from dpo_ray.buffer import PreferenceBuffer, default_url
from dpo_ray.config import IterativeDPOConfig
from dpo_ray.evaluation import EvaluatedCompletion, write_evaluation
from dpo_ray.storage import Storage
from dpo_ray.types import Completion, Pair, Prompt, ScoredCompletion

HALF = [0.0, 1.0]


def review(text: str, number: int) -> Completion:
    return Completion(Prompt("the film", (1, 2)), text, (number, 7), -1.0, 0, "stop")


def rewards(judge: Any, completions: list[Completion]) -> list[float]:
    return [judgement.reward for judgement in judge(completions)]


def pair(number: int) -> Pair:
    return Pair("p", "c", "r", (1,), (number,), (0,))


@pytest.mark.parametrize("praised", [1, 2, 3])
def test_a_better_review_is_preferred_as_often_as_bradley_and_terry_say(praised: int) -> None:
    num = 8000
    better = [review("great " * praised + "dull " * (4 - praised), n) for n in range(num)]
    worse = [review("dull", num + n) for n in range(num)]
    assert rewards(certain, better[:1] + worse[:1]) == [SCALE * praised / 4, 0.0]
    one, other = rewards(bradley_terry, better), rewards(bradley_terry, worse)
    rate = sum(a > b for a, b in zip(one, other, strict=True)) / num
    expected = 1 / (1 + math.exp(-SCALE * praised / 4))
    assert rate == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / num))


def test_a_review_has_the_same_noise_whenever_it_is_judged_and_keeps_its_true_reward() -> None:
    (first,), (again,) = bradley_terry([review("great dull", 3)]), bradley_terry([review("great dull", 3)])
    assert first == again
    assert first.metrics["true"] == SCALE / 2 != first.reward


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_the_best_of_two_rewards_is_the_logistic_of_their_difference(beta: float) -> None:
    share = 1 / (1 + math.exp(-1 / beta))
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    point = tilted(HALF, beta)
    assert point.reward == pytest.approx(share)
    assert point.kl == pytest.approx(math.log(2) - entropy)
    assert most_reward(HALF, point.kl) == pytest.approx(point.reward)


def test_the_frontier_starts_at_the_mean_and_ends_where_only_the_best_is_left() -> None:
    assert most_reward([0.0, 0.0, 3.0], 0.0) == pytest.approx(1.0, abs=1e-4)
    assert most_reward([0.0, 0.0, 3.0], math.log(3)) == pytest.approx(3.0)
    assert most_reward([0.0, 0.0, 3.0], 99.0) == pytest.approx(3.0)


def test_the_frontier_is_that_of_the_enumerable_language(language: Language) -> None:
    samples = language.sample(
        language.reference,
        num_prompts=4,
        per_prompt=20_000,
        generator=torch.Generator().manual_seed(0),
    )
    for prompt in range(4):
        scored = samples[prompt * 20_000 : (prompt + 1) * 20_000]
        best = language.reference[prompt] + language.rewards[prompt]
        probabilities = best.softmax(0)
        reward = float((probabilities * language.rewards[prompt]).sum())
        kl = float((probabilities * (best.log_softmax(0) - language.reference[prompt])).sum())
        point = tilted([item.judgement.reward or 0.0 for item in scored], 1.0)
        assert (point.kl, point.reward) == pytest.approx((kl, reward), abs=0.05)


def test_pairs_are_drawn_alike_often() -> None:
    pairs = [pair(number) for number in range(5)]
    times = Counter(each.chosen_ids for each in drawn(pairs, 13, seed=0))
    assert sorted(times.values()) == [2, 2, 3, 3, 3]
    assert drawn(pairs, 13, seed=0) != drawn(pairs, 13, seed=1)


def test_every_completion_is_chosen_once_for_its_kl() -> None:
    completions = [review("great", number) for number in range(3)]
    assert [each.chosen_ids for each in as_pairs(completions)] == [(0, 7), (1, 7), (2, 7)]


@dataclass(frozen=True, slots=True)
class Recording(Language):
    """Notes who is sampled."""

    sampled: list[torch.Tensor] = field(default_factory=list)

    def sample(self, logps: torch.Tensor, **settings: Any) -> list[ScoredCompletion]:
        self.sampled.append(logps)
        return Language.sample(self, logps, **settings)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Language:
    return build(0, tmp_path_factory.mktemp("language"), sft_steps=0)


@pytest.mark.parametrize(("push_every", "writers"), [(1, [0, 1, 2, 3]), (2, [0, 0, 2, 2]), (4, [0, 0, 0, 0])])
def test_between_pushes_the_same_policy_is_sampled(
    language: Language, push_every: int, writers: list[int]
) -> None:
    recording = Recording(language.folder, language.rewards, language.corpus, language.reference)
    improve(recording, Rounds(0.3, num=4, steps=2, prompts=4, push_every=push_every), seed=0)
    first = recording.sampled[0]
    assert first is recording.reference
    distinct = [
        next(place for place, other in enumerate(recording.sampled) if other is logps)
        for logps in recording.sampled
    ]
    assert distinct == writers
    assert [staleness.writer(round_, push_every) for round_ in range(4)] == writers


def test_online_and_offline_have_one_label_budget(language: Language) -> None:
    arms = [
        improve(language, Rounds(0.3, num=2, steps=2, prompts=8, push_every=each), seed=0) for each in (1, 2)
    ]
    assert [arm["labels"] for arm in arms] == [2 * 8 * 6] * 2
    for arm in arms:
        assert arm["J"] == pytest.approx(arm["reward"] - 0.3 * arm["kl"])


def test_the_settings_of_the_staleness_jobs_hold_and_refuse_no_candidate() -> None:
    config = IterativeDPOConfig.model_validate(staleness.SETTINGS)
    assert config.gate.min_win_rate is config.gate.max_degenerate_rise is None
    assert config.rounds == max(staleness.INTERVALS)


def test_a_run_is_measured_by_its_last_version_and_its_pairs_by_who_wrote_them(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    rows = [
        EvaluatedCompletion(0, "p", "t", 9.0, 16, 5, logp, -4.0, {"true": true, "grammatical": 1.0})
        for logp, true in ((-2.0, 1.0), (-3.0, 3.0))
    ]
    write_evaluation(storage, staleness.ROUNDS, rows)
    buffer = PreferenceBuffer(default_url(storage), storage)
    buffer.put([replace(pair(n), round=n, policy_version=n // 4 * 4) for n in range(1, 8)])
    buffer.put([replace(pair(9), round=9, policy_version=9)])  # The sampler holds 8 then.
    buffer.close()
    measured = staleness.measured(tmp_path, 4)
    assert (measured["reward"], measured["kl"]) == (2.0, 1.5)
    assert measured["J"] == pytest.approx(2.0 - 0.3 * 1.5)
    assert (measured["labels"], measured["wrong_version"]) == (8, 1)


def made_results(tmp_path: Path) -> Results:
    """All points on the frontier of two rewards, the KL of each epoch twice that before."""
    results = Results(tmp_path, "made", [0])
    kls = [0.02, 0.04, 0.08, 0.16, 0.32]
    measured = {"kl": kls, "kl_of_tokens": kls, "reward": [most_reward(HALF, kl) for kl in kls]}
    results.arms = {"0": {"start": {"rewards": HALF}, **{arm.name: measured for arm in ARMS}}}
    return results


def test_a_point_above_the_frontier_is_told_in_standard_errors(tmp_path: Path) -> None:
    results = made_results(tmp_path)
    assert errors_above(results, 0) == pytest.approx(0.0, abs=1e-6)
    arm = results.arms["0"][ARMS[3].name]
    error = 0.5 / math.sqrt(HELD_OUT * PER_PROMPT)
    results.arms["0"][ARMS[3].name] = {**arm, "reward": [*arm["reward"][:-1], arm["reward"][-1] + 4 * error]}
    assert errors_above(results, 0) == pytest.approx(4.0)
    assert not claims(results)[0].passed


def test_claims_of_growth_hold_for_a_kl_that_grows_and_fail_for_one_that_should_not(tmp_path: Path) -> None:
    results = made_results(tmp_path)
    assert growth(results, 0, Trained("ipo", "certain", 1.0)) == pytest.approx(16.0)
    verdicts = {claim.name: claim.verdict for claim in claims(results)}
    assert verdicts["certain labels, β 1: DPO's KL, last over first epoch"] == "PASS"
    assert verdicts["the same, from above"] == "FAIL"
