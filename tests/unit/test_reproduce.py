"""The numbers of the reproductions: exact ones against brute force, and claims that can fail."""

from itertools import combinations, islice, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.reproduce import closed_form
from benchmarks.reproduce.baselines import best_of, leave_one_out, surrogate
from benchmarks.reproduce.claims import Claim, claims_table
from benchmarks.reproduce.displacement import edited_pairs
from benchmarks.reproduce.language import (
    LENGTH,
    LETTERS,
    NUM_PROMPTS,
    SENTENCES,
    Language,
    build,
    exact_logps,
    sentence_number,
    train,
)
from benchmarks.reproduce.preferences import labelled_pairs, reward_margin, turned
from benchmarks.reproduce.results import Arm, Results
from dpo_ray.models import load_model, make_scorer
from dpo_ray.rounds import RoundPlan
from dpo_ray.types import TokenSequence

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "evidence"


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Language:
    return build(0, tmp_path_factory.mktemp("language"), sft_steps=20)


def other_policy(language: Language, seed: int, *, scale: float = 1.0) -> Tensor:
    """[P, S] log-probs of some policy."""
    noise = torch.randn(
        language.reference.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (language.reference + scale * noise).log_softmax(1)


def test_the_sentences_are_all_that_there_are() -> None:
    assert [tuple(row) for row in SENTENCES.tolist()] == list(product(range(len(LETTERS)), repeat=LENGTH))
    assert [sentence_number(row) for row in SENTENCES.tolist()] == list(range(len(SENTENCES)))


def test_probabilities_of_all_sentences_sum_to_one(language: Language) -> None:
    for logps in (language.reference, language.corpus):
        assert logps.exp().sum(1).tolist() == pytest.approx([1.0] * NUM_PROMPTS, abs=1e-6)


def test_exact_log_probs_are_those_that_the_learner_trains(language: Language) -> None:
    drawn = torch.randint(len(SENTENCES), (NUM_PROMPTS, 25), generator=torch.Generator().manual_seed(1))
    sequences = [
        TokenSequence((prompt,), tuple(SENTENCES[number].tolist()))
        for prompt, numbers in enumerate(drawn.tolist())
        for number in numbers
    ]
    ours = language.reference.gather(1, drawn).flatten().tolist()
    assert language.learner().logps(sequences) == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("places", combinations(range(LENGTH), 2))
def test_letters_earn_together_where_they_are_neighbours_and_else_apart(
    language: Language, places: tuple[int, int]
) -> None:
    def reward(one: int, other: int) -> float:
        letters = [0, 1, 2, 3, 4]
        letters[places[0]], letters[places[1]] = one, other
        return language.rewards[2, sentence_number(letters)].item()

    together = reward(0, 1) - reward(3, 1) - reward(0, 2) + reward(3, 2)
    assert (abs(together) > 1e-3) == (places[1] - places[0] == 1)


def test_kl_is_zero_for_the_reference_and_above_for_others(language: Language) -> None:
    assert language.point(language.reference).kl == 0
    assert all(language.point(other_policy(language, seed)).kl > 0 for seed in range(5))


def test_kl_and_reward_are_those_of_many_samples(language: Language) -> None:
    policy = other_policy(language, 0)
    generator = torch.Generator().manual_seed(0)
    scored = language.sample(policy, num_prompts=4000, per_prompt=5, generator=generator)
    numbers = [
        (item.completion.prompt.token_ids[0], sentence_number(item.completion.token_ids)) for item in scored
    ]
    ratios = [(policy - language.reference)[place].item() for place in numbers]
    rewards = [item.judgement.reward for item in scored if item.judgement.reward is not None]
    point = language.point(policy)
    assert sum(ratios) / len(ratios) == pytest.approx(point.kl, abs=0.03)
    assert sum(rewards) / len(rewards) == pytest.approx(point.reward, abs=0.03)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_the_frontier_is_where_the_optima_lie(language: Language, beta: float) -> None:
    best = language.point(language.optimum(beta))
    assert language.frontier(best.kl) == pytest.approx(best.reward, abs=1e-9)
    assert language.gap(best) == pytest.approx(0, abs=1e-9)


def test_no_policy_lies_above_the_frontier(language: Language) -> None:
    tilted = [
        (language.optimum(1.0) + 0.1 * other_policy(language, seed)).log_softmax(1) for seed in range(5)
    ]
    random = [other_policy(language, seed, scale=scale) for seed in range(3) for scale in (0.1, 1.0, 3.0)]
    assert all(language.gap(language.point(policy)) > 0 for policy in [*tilted, *random])


def test_training_is_measured_on_the_way_and_moves_the_policy_up(language: Language) -> None:
    generator = torch.Generator().manual_seed(0)
    scored = language.sample(language.reference, num_prompts=40, per_prompt=4, generator=generator)
    pairs = labelled_pairs(scored, "certain", per_prompt=4, seed=0)
    learner = language.learner(loss={"type": "sigmoid", "beta": 0.5}, learning_rate=2e-3, epochs=4)
    trace = train(language, learner, RoundPlan(pairs, seed=0), every=5)
    assert [measured.step for measured in trace[:2]] == [5, 10]
    assert trace[-1].point == language.point(exact_logps(learner.model))
    assert trace[-1].point.reward > language.point(language.reference).reward + 0.1


def test_labels_err_as_often_as_bradley_and_terry_say(language: Language) -> None:
    generator = torch.Generator().manual_seed(0)
    scored = language.sample(language.reference, num_prompts=800, per_prompt=4, generator=generator)
    certain = labelled_pairs(scored, "certain", per_prompt=4, seed=0)
    noisy = labelled_pairs(scored, "bradley_terry", per_prompt=4, seed=0)
    margins = torch.tensor([reward_margin(pair) for pair in certain])
    assert margins.min() > 0
    expected = torch.sigmoid(-margins).mean().item()
    assert sum(reward_margin(pair) < 0 for pair in noisy) / len(noisy) == pytest.approx(expected, abs=0.02)
    assert [pair.pair_id for pair in map(turned, map(turned, noisy))] == [pair.pair_id for pair in noisy]
    for pair in noisy:
        for ids, reward, logp in (
            (pair.chosen_ids, pair.chosen_reward, pair.chosen_logp),
            (pair.rejected_ids, pair.rejected_reward, pair.rejected_logp),
        ):
            place = pair.prompt_ids[0], sentence_number(ids)
            assert (reward, logp) == (language.rewards[place].item(), language.reference[place].item())


def test_the_leave_one_out_gradient_is_that_of_the_objective_on_average() -> None:
    """Over all pairs of draws of three answers, each as likely as the policy makes it."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    rewards, beta = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.7
    logps = logits.log_softmax(0)
    objective = (logps.exp() * (rewards - beta * (logps - reference))).sum()
    exact = torch.autograd.grad(objective, logits, retain_graph=True)[0]
    returns = (rewards - beta * (logps - reference)).detach()
    mean = torch.zeros(3, dtype=torch.float64)
    for draw in product(range(3), repeat=2):
        advantages = leave_one_out(returns[list(draw)][None])[0]
        estimate = torch.autograd.grad((advantages * logps[list(draw)]).mean(), logits, retain_graph=True)[0]
        mean += logps.detach().exp()[list(draw)].prod() * estimate
    assert mean.tolist() == pytest.approx(exact.tolist())


def test_the_surrogate_is_the_advantages_times_the_log_probs(language: Language) -> None:
    prompts, drawn = torch.tensor([0, 3]), torch.tensor([[5, 3124], [77, 5]])
    advantages = torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64)
    expected = -(advantages * language.reference[prompts[:, None], drawn]).mean().item()
    scorer = make_scorer(language.folder, flat=False)
    assert surrogate(scorer, prompts, drawn, advantages).item() == pytest.approx(expected, abs=1e-5)


def test_the_best_of_n_is_what_all_draws_make_it() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64)
    for draw in product(range(4), repeat=3):
        winner = max(draw, key=lambda answer: rewards[0, answer].item())  # Of equal ones the first.
        expected[winner] += probabilities[0, list(draw)].prod()
    assert best_of(probabilities.log(), rewards, 3).exp()[0].tolist() == pytest.approx(expected.tolist())
    assert best_of(probabilities.log(), rewards, 1).exp()[0].tolist() == pytest.approx(
        probabilities[0].tolist()
    )


def test_an_edited_answer_differs_in_one_of_the_last_letters_and_is_worse(language: Language) -> None:
    pairs = list(islice(edited_pairs(language, torch.Generator().manual_seed(0)), 300))
    assert len({(pair.prompt_ids, pair.chosen_ids) for pair in pairs}) == 300
    for pair in pairs:
        differ = [place for place in range(LENGTH) if pair.chosen_ids[place] != pair.rejected_ids[place]]
        assert len(differ) == 1
        assert differ[0] >= LENGTH - 3
        reward = language.rewards[pair.prompt_ids[0]]
        fall = reward[sentence_number(pair.chosen_ids)] - reward[sentence_number(pair.rejected_ids)]
        assert fall > 0.3


def test_the_same_seed_builds_the_same_language(language: Language, tmp_path: Path) -> None:
    again = build(0, tmp_path, sft_steps=0)
    assert torch.equal(again.rewards, language.rewards)
    assert torch.equal(again.corpus, language.corpus)
    assert torch.equal(exact_logps(load_model(tmp_path / "random")), again.reference)


def test_a_claim_fails_with_one_seed_that_breaks_its_bound() -> None:
    kept = Claim("small", "<", 1.0, {0: 0.5, 1: 0.9})
    broken = Claim("small", "<", 1.0, {0: 0.5, 1: 1.0})
    assert kept.passed
    assert not broken.passed
    assert not Claim("small", "<", 1.0, {0: float("nan")}).passed
    assert not Claim("never measured", "<", 1.0, {}).passed
    assert claims_table([kept, broken]).splitlines()[2:] == [
        "| small | < 1 | 0.5 | 0.9 | **PASS** |",
        "| small | < 1 | 0.5 | 1 | **FAIL** |",
    ]


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def arm() -> Arm:
        calls.append("arm")
        return {"loss": 0.123456789, "tiny": 1.23456e-9}

    for _ in range(2):
        results = Results(tmp_path, "some", [0])
        results.run(0, "arm", arm)
        assert {**results.of(0, "arm"), "cpu_s": 0} == {"loss": 0.12346, "tiny": 1.23e-9, "cpu_s": 0}
    assert calls == ["arm"]


def test_all_claims_of_the_closed_form_hold(tmp_path: Path) -> None:
    results = Results(tmp_path, "closed_form", [3])
    closed_form.measure(results, 3)
    claims = closed_form.claims(results)
    assert [claim.name for claim in claims if not claim.passed] == []
    assert len(claims) == 9


def test_the_document_has_the_tables_that_the_commands_wrote() -> None:
    document = EVIDENCE.with_suffix(".md").read_text()
    tables = sorted(EVIDENCE.glob("*.md"))
    assert tables
    for path in tables:
        assert path.read_text().strip() in document, path
        assert f"(evidence/{path.stem}.svg)" in document, path
