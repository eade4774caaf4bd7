"""A run's folder is made once, opened again as it is, and refuses to become another run."""

import json
import math
from pathlib import Path

import pytest
import yaml
from fake_cluster import publish_weights

from dpo_ray.config import (
    EvaluationConfig,
    GateConfig,
    IterativeDPOConfig,
    JudgeConfig,
    PairingConfig,
    SamplingConfig,
)
from dpo_ray.evaluation import EvaluatedCompletion, write_evaluation
from dpo_ray.gate import NO_VOTES, Verdict
from dpo_ray.metrics import write_steps
from dpo_ray.models import load_model, load_tokenizer, make_canaries, make_scorer
from dpo_ray.registry import PolicyManifest
from dpo_ray.run import Run, open_run
from dpo_ray.terminal import Terminal
from dpo_ray.types import Completion, Judgement, Prompt, ScoredCompletion

WORDS = ["film", "movie", "story", "plot", "script", "acting", "music", "pacing", "ending"]


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> IterativeDPOConfig:
    prompts = [{"prompt": f"{which} {word}", "key": word} for which in ("the", "this") for word in WORDS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return IterativeDPOConfig(
        run_dir=str(tmp_path / "run"),
        model=str(tiny_model),
        prompts=str(tmp_path / "prompts.jsonl"),
        rounds=3,
        tensorboard=False,
        judge=JudgeConfig(function="statistics:fmean"),
        sampling=SamplingConfig(prompts_per_round=5, samples_per_prompt=2, max_new_tokens=16),
        evaluation=EvaluationConfig(prompts=6),
    )


@pytest.fixture
def run(config: IterativeDPOConfig) -> Run:
    return open_run(config, Terminal())


def changed(config: IterativeDPOConfig, **settings: object) -> IterativeDPOConfig:
    return config.model_copy(update=settings)


def scored(text: str, reward: float | None) -> ScoredCompletion:
    prompt = Prompt([{"role": "user", "content": text}], (1, 2), {"key": [1, None, {"a": "b"}]})
    completion = Completion(prompt, text, (3, 4), -0.1 - 0.2, 5, "length")
    return ScoredCompletion(completion, Judgement(reward, {"fluent": 1 / 3}), "taste")


def evaluate(run: Run, version: int, reward: float | None) -> None:
    row = EvaluatedCompletion(0, "the film", "is good", reward, version, 2, -1.0, -1.0)
    write_evaluation(run.storage, version, [row])


def test_version_0_is_the_model_live_and_proven_by_its_canaries(run: Run, tiny_model: Path) -> None:
    assert run.registry.versions() == [0]
    assert run.registry.live() == 0
    ours, theirs = load_model(run.registry.fetch(0)).state_dict(), load_model(tiny_model).state_dict()
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    canaries = run.registry.manifest(0).canaries
    assert canaries == make_canaries(make_scorer(tiny_model), run.canary_sequences())
    assert len(canaries) == 2


def test_opening_again_changes_nothing(run: Run, config: IterativeDPOConfig) -> None:
    manifest = run.registry.manifest(0)
    publish_weights(run.registry, PolicyManifest(version=1), "trained")
    run.registry.promote(1, by="ann")
    again = open_run(config, Terminal())
    assert again.registry.manifest(0) == manifest
    assert again.registry.live() == 1
    assert again.held_out == run.held_out


def test_a_candidate_whose_round_is_not_finished_is_no_longer_live(
    run: Run, config: IterativeDPOConfig
) -> None:
    """Replicas start before its trial starts over, and it may be one that they cannot prove."""
    publish_weights(run.registry, PolicyManifest(version=1, parent=0), "trained")
    run.registry.promote(1)
    assert open_run(config, Terminal()).registry.live() == 0
    assert run.registry.events()[-1].reason == "the job ended before this version's round did"
    run.registry.offer(1, share=0.5)
    assert open_run(config, Terminal()).registry.candidate() is None


def test_what_a_finished_round_promoted_stays_live(run: Run, config: IterativeDPOConfig) -> None:
    publish_weights(run.registry, PolicyManifest(version=1, parent=0), "trained")
    run.registry.promote(1)
    for version in (0, 1):
        evaluate(run, version, 1.0)
    run.start()
    run.finish(0, {}, Verdict(True))
    assert open_run(config, Terminal()).registry.live() == 1


def test_a_candidate_is_judged_against_its_parent_and_the_start(run: Run) -> None:
    """Version 1 is better than the start, version 2 worse than version 1, and no worse than the start."""
    config = changed(run.config, run_dir=f"{run.config.run_dir}_2", gate=GateConfig(min_reward_gain=0.0))
    run = Run(config, run.prompts(0))
    for version, rewards in enumerate([(1.0, 1.0), (3.0, 3.0), (2.0, 1.9)]):
        publish_weights(run.registry, PolicyManifest(version=version, parent=max(0, version - 1)), "trained")
        rows = [
            EvaluatedCompletion(index, "the film", "is good", reward, version, 2, -1.0, -1.0)
            for index, reward in enumerate(rewards)
        ]
        write_evaluation(run.storage, version, rows)
    assert run.verdict(1, NO_VOTES) == Verdict(True)
    assert not run.verdict(2, NO_VOTES).passed
    assert "reward changed by -1.050 against the version before" in run.verdict(2, NO_VOTES).reason


def test_rounds_and_evaluation_share_no_prompt(run: Run) -> None:
    held_out = {prompt.token_ids for prompt in run.held_out}
    trained_on = [prompt.token_ids for round_ in range(6) for prompt in run.prompts(round_)]
    assert len(held_out) == 6
    assert not set(trained_on) & held_out
    assert len(set(trained_on)) == 12
    assert run.prompts(2) == run.prompts(2)
    assert run.prompts(0)[0].fields.keys() == {"key"}


def test_canary_sequences_say_something_of_the_weights(run: Run) -> None:
    sequences = run.canary_sequences()
    assert all(34 <= len(ids) <= 64 for ids in sequences)
    assert sequences == run.canary_sequences()


@pytest.mark.parametrize(
    ("setting", "value", "name"),
    [
        ("seed", 3, "seed"),
        ("model", "elsewhere", "model"),
        ("sampling", SamplingConfig(temperature=0.5), "sampling.temperature"),
        ("evaluation", EvaluationConfig(prompts=2), "evaluation.prompts"),
    ],
)
def test_another_setting_is_refused_by_name(
    run: Run, config: IterativeDPOConfig, setting: str, value: object, name: str
) -> None:
    kept = run.storage.read_text("config.yaml")
    with pytest.raises(
        ValueError, match=rf"holds a run with other settings \(.*{name}: .* there, .* now.*\)"
    ):
        Run(changed(config, **{setting: value}), run.prompts(0))
    assert run.storage.read_text("config.yaml") == kept


@pytest.mark.parametrize(("setting", "value"), [("rounds", 9), ("tensorboard", True)])
def test_what_may_change_is_written_down(
    run: Run, config: IterativeDPOConfig, setting: str, value: object
) -> None:
    Run(changed(config, **{setting: value}), run.prompts(0))
    assert yaml.safe_load(run.storage.read_text("config.yaml"))[setting] == value


def test_the_resolved_config_is_the_config(run: Run, config: IterativeDPOConfig) -> None:
    assert IterativeDPOConfig(**yaml.safe_load(run.storage.read_text("config.yaml"))) == config


def test_kept_completions_come_back_whatever_they_hold(run: Run) -> None:
    texts = ["plain", "two\nlines", "line\u2028separator", "next\x85line", "Zwölf €", ""]
    given = [scored(text, None if text == "plain" else 1 / 3) for text in texts]
    assert run.scored(1) is None
    assert run.keep_scored(1, given) == given
    assert run.scored(1) == given
    assert run.scored(0) is None


def test_a_round_is_done_when_its_row_is_written(run: Run) -> None:
    evaluate(run, 0, None)
    publish_weights(run.registry, PolicyManifest(version=1, parent=0), "trained")
    run.start()
    run.start()
    assert run.remaining_rounds() == range(3)
    write_steps(run.storage, 0, [{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan}])
    row = run.finish(0, {"sample_version": 0, "reward/mean": math.nan}, Verdict(False, "fell"))
    assert run.remaining_rounds() == range(1, 3)
    start, *steps, last = run.folder.rows()
    assert (start["kind"], start["round"], start["win_rate/vs_start"]) == ("start", -1, None)
    assert [(step["kind"], step["step"], step["loss"]) for step in steps] == [
        ("step", 1, 0.5),
        ("step", 2, None),
    ]
    assert (last["step"], last["policy_version"], last["reward/mean"]) == (2, 0, None)
    assert (
        (last["gate/passed"], last["gate/reason"])
        == (row["gate/passed"], row["gate/reason"])
        == (False, "fell")
    )


def test_the_win_rates_are_against_the_start_and_against_the_parent(run: Run) -> None:
    for version, reward, parent in [(0, 1.0, None), (1, 3.0, 0), (2, 2.0, 1)]:
        publish_weights(run.registry, PolicyManifest(version=version, parent=parent), "trained")
        evaluate(run, version, reward)
    run.start()
    run.registry.promote(2)
    row = run.finish(0, {"sample_version": 1}, Verdict(True))
    assert (row["win_rate/vs_start"], row["win_rate/vs_previous"]) == (1.0, 0.0)


def test_an_answer_longer_than_the_context_is_refused(config: IterativeDPOConfig) -> None:
    with pytest.raises(ValueError, match=r"sampling\.max_new_tokens=64 leaves no room .* of 64 tokens"):
        open_run(changed(config, sampling=SamplingConfig(max_new_tokens=64)), Terminal())


def test_the_answer_of_a_row_is_paired_with_what_the_policy_said(config: IterativeDPOConfig) -> None:
    """The key of "the film" is "film"."""
    pairing = PairingConfig(rule="answer_vs_worst", answer_column="key")
    run = open_run(changed(config, pairing=pairing), Terminal())
    (prompt, *_) = run.prompts(0)
    completion = Completion(prompt, "no answer", (3, 4), -1.0, 0, "stop")
    (pair,) = run.make_pairs(0, [ScoredCompletion(completion, Judgement(0.5), "taste")]).pairs
    tokenizer = load_tokenizer(run.registry.fetch(0))
    assert pair.chosen == prompt.fields["key"]
    assert pair.chosen_ids[-1] == tokenizer.eos_token_id
    assert str(tokenizer.decode(list(pair.chosen_ids[:-1]))).strip() == pair.chosen
    assert (pair.prompt_ids, pair.rejected_ids) == (prompt.token_ids, (3, 4))


@pytest.mark.parametrize(
    ("pairing", "message"),
    [
        ({"rule": "statistics:nope"}, "pairing.rule .* is no function of 'statistics'"),
        (
            {"rule": "answer_vs_worst", "answer_column": "nope"},
            "'nope' is in no prompt's row: give one of key",
        ),
    ],
)
def test_a_pair_rule_that_cannot_be_is_refused_before_anything_is_written(
    config: IterativeDPOConfig, pairing: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_run(changed(config, pairing=PairingConfig.model_validate(pairing)), Terminal())
    assert not Path(config.run_dir).exists()


def test_a_judge_that_is_not_there_is_refused_before_anything_is_written(
    config: IterativeDPOConfig,
) -> None:
    with pytest.raises(ValueError, match="is no function of 'statistics'"):
        open_run(changed(config, judge=JudgeConfig(function="statistics:nope")), Terminal())
    assert not Path(config.run_dir).exists()
