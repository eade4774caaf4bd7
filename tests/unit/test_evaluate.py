"""The job from names to files, with models that are here."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from characters import write_jsonl
from judge_server import Body, JudgeServer, serving

from dpo_ray.config import EvaluateConfig, IterativeDPOConfig, parse_config
from dpo_ray.evaluating.examples import examples
from dpo_ray.evaluating.outcome import Outcome, evaluate
from dpo_ray.evaluating.results import write_results
from dpo_ray.models import load_model, load_tokenizer, save_policy
from dpo_ray.prompts import load_prompts, split_prompts
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage
from dpo_ray.terminal import Terminal
from jobs.evaluate import main

SHORT = ("--max_prompts=6", "--max_new_tokens=8", "--resamples=100")


def run(folder: Path, *arguments: str) -> Outcome:
    config = parse_config(EvaluateConfig, [f"--run_dir={folder}", *SHORT, *arguments])
    outcome = evaluate(config, Terminal())
    write_results(outcome, config)
    return outcome


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def test_two_models_are_compared_and_the_files_say_how(
    tmp_path: Path, tiny_model: Path, near_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["--policies", str(tiny_model), str(near_model), "--prompts=film_reviews"]
    main(parse_config(EvaluateConfig, [f"--run_dir={tmp_path}", *SHORT, *names]))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{near_model} against {tiny_model}: within noise, wins" in printed
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [each["policy"] for each in found["policies"]] == [str(tiny_model), str(near_model)]
    assert found["policies"][0]["kl"] is None
    kl, sampled = found["policies"][1]["kl"], found["policies"][1]["kl_sampled"]
    assert 0 < kl["low"] <= kl["value"] <= kl["high"]
    assert sampled["value"] == pytest.approx(kl["value"], abs=1.5)
    assert found["judge"]["judgements"] == len(rows(tmp_path)) == 2 * 6 * 2
    assert {row["prompt_index"] for row in rows(tmp_path)} == set(range(6))
    assert (tmp_path / "evaluation.html").read_text().count('<article class="example">') >= 4


def test_the_clearest_win_is_one_of_the_completions_that_are_shown(
    tmp_path: Path, tiny_model: Path, near_model: Path
) -> None:
    judge = ["--judge.kind=regex", "--judge.pattern=s .*s"]
    outcome = run(tmp_path, "--policies", str(tiny_model), str(near_model), "--prompts=film_reviews", *judge)
    rewards = {"Clearest win": ("reward 0", "reward 1"), "Clearest loss": ("reward 1", "reward 0")}
    shown = [example for example in examples(outcome) if example.why in rewards]
    assert shown
    for example in shown:
        before, after = (side.remark.split(",")[0] for side in example.sides)
        assert (before, after) == rewards[example.why]


def test_a_policy_ties_with_itself(tmp_path: Path, tiny_model: Path) -> None:
    other = tmp_path / "the_same"
    other.symlink_to(tiny_model)
    outcome = run(tmp_path, "--policies", str(tiny_model), str(other), "--prompts=film_reviews")
    (comparison,) = outcome.comparisons
    assert (comparison.win_rate.value, comparison.is_settled) == (0.5, False)
    kl = outcome.measures[1].kl
    assert kl is not None
    assert kl.value == pytest.approx(0.0, abs=1e-4)


def hostile(body: Body) -> Body:
    choice = {"index": 0, "finish_reason": "stop", "text": "<script>alert(1)</script>"}
    return {"id": "1", "object": "text_completion", "created": 0, "model": "fake", "choices": [choice]}


def test_an_endpoint_beside_a_model_has_no_kl_and_cannot_write_into_the_page(
    tmp_path: Path, tiny_model: Path
) -> None:
    with serving(JudgeServer(hostile, faults=[400])) as server:
        endpoint = f"{server.url}#policy"
        outcome = run(tmp_path, "--policies", str(tiny_model), endpoint, "--prompts=film_reviews")
    assert outcome.notes == [f"{endpoint} has no KL: an endpoint does not show its weights"]
    assert sum(outcome.measures[1].errors.values()) == 1
    page = (tmp_path / "evaluation.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    missing = [row for row in rows(tmp_path) if row["error"]]
    assert [(row["text"], row["reward"]) for row in missing] == [(None, None)]


def test_endpoints_alone_need_no_model(tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", {"prompt": "Who?"}, {"prompt": "Why?"})
    with serving(JudgeServer(hostile)) as server:
        names = ["--policies", f"{server.url}#old", f"{server.url}#new"]
        judge = ["--judge.kind=regex", "--judge.pattern=alert"]
        outcome = run(tmp_path, *names, f"--prompts={prompts}", "--text_prompts=continue", *judge)
    assert {body["model"] for body in server.requests} == {"old", "new"}
    assert [each.reward.value for each in outcome.measures if each.reward] == [1.0, 1.0]


@pytest.fixture
def run_dir(tmp_path: Path, tiny_model: Path, near_model: Path) -> Path:
    """A run of which version 1 is live."""
    folder = tmp_path / "run"
    registry = PolicyRegistry(Storage(str(folder)))
    for version, model in enumerate((tiny_model, near_model)):
        made = tmp_path / "made" / str(version)
        save_policy(load_model(model), load_tokenizer(model), made)
        registry.publish(made, PolicyManifest(version=version))
    registry.promote(1)
    config = parse_config(IterativeDPOConfig, ["--evaluation.prompts=5", "--sampling.max_new_tokens=7"])
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder


def test_a_run_brings_its_held_out_prompts_its_judge_and_its_longest_completion(
    tmp_path: Path, run_dir: Path, tiny_model: Path
) -> None:
    names = ["--policies", f"{run_dir}@0", f"{run_dir}@live"]
    config = parse_config(EvaluateConfig, [f"--run_dir={tmp_path}/out", "--resamples=100", *names])
    outcome = evaluate(config, Terminal())
    prompts = load_prompts(
        "film_reviews", split="train", column="prompt", tokenizer=load_tokenizer(tiny_model), max_tokens=57
    ).prompts
    held_out = split_prompts(prompts, held_out=5, seed=0)[1]
    assert {prompt.token_ids for prompt in outcome.prompts} == {prompt.token_ids for prompt in held_out}
    assert [each.versions for each in outcome.measures] == [[0], [1]]
    assert outcome.judge == "dpo_ray.film_reviews:judge_reviews"
    longest = {sample.num_tokens for own in outcome.samples.values() for sample in own}
    assert max(length or 0 for length in longest) == 7


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where mine.jsonl has a prompt."""
    monkeypatch.chdir(tmp_path)
    return write_jsonl(tmp_path / "mine.jsonl", {"prompt": "the film"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "prompts is unset, and the first run among the policies holds none out: give a file"),
        (("--prompts=mine.jsonl",), "the judge of film reviews cannot score prompts of mine.jsonl"),
        (
            ("--prompts=film_reviews", "--max_new_tokens=64"),
            "leaves room for max_new_tokens=64 in the shortest context, which has room for 0 tokens",
        ),
        (
            ("--prompts=film_reviews", "--judge.kind=llm", "--judge.model=m", "--judge.url=live"),
            "judge.url=live: here no policy is live: give the URL of an endpoint",
        ),
    ],
)
def test_what_cannot_be_used_ends_with_code_2_and_a_remedy(
    tiny_model: Path,
    near_model: Path,
    in_folder: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ["--policies", str(tiny_model), str(near_model)]
    with pytest.raises(SystemExit) as ended:
        main(parse_config(EvaluateConfig, [*names, *arguments]))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
