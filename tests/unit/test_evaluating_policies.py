"""What policies are called, and what is said where nothing is called so."""

from pathlib import Path

import pytest

from dpo_ray.config import EvaluateConfig, parse_config
from dpo_ray.evaluating.policies import (
    EndpointModel,
    LocalPolicy,
    NamedModel,
    RunVersion,
    fetch_version,
    find_model,
    parse_policy,
)
from dpo_ray.models import load_model, load_tokenizer, save_policy
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.storage import Storage


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/runs/demo@0", RunVersion("/runs/demo@0", "/runs/demo", 0)),
        ("/runs/demo@v12", RunVersion("/runs/demo@v12", "/runs/demo", 12)),
        ("s3://bucket/demo@live", RunVersion("s3://bucket/demo@live", "s3://bucket/demo", None)),
        ("Qwen/Qwen3-0.6B", NamedModel("Qwen/Qwen3-0.6B")),
        ("some/folder", NamedModel("some/folder")),
        (
            "http://host:8000/v1#policy@v3",
            EndpointModel("http://host:8000/v1#policy@v3", "http://host:8000/v1", "policy@v3"),
        ),
        (
            "https://api.example.com/v1#org/model",
            EndpointModel("https://api.example.com/v1#org/model", "https://api.example.com/v1", "org/model"),
        ),
    ],
)
def test_a_name_says_what_it_is(name: str, expected: object) -> None:
    assert parse_policy(name) == expected


def test_a_run_is_looked_for_where_the_job_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_policy("runs/demo@1") == RunVersion("runs/demo@1", f"{tmp_path}/runs/demo", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://host:8000/v1", "names no model: add one that it has, as http://host:8000/v1#policy"),
        ("runs/demo@best", "runs/demo@best: after @ comes a version's number or live, as runs/demo@live"),
        ("https://me:secret@host/v1#m", "holds a name or password: take it out"),
    ],
)
def test_another_name_is_refused_with_the_remedy(name: str, message: str) -> None:
    with pytest.raises(ValueError, match="policies: ") as refusal:
        parse_policy(name)
    assert message in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_a_folder_with_an_at_sign_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "me@home").mkdir()
    assert parse_policy(f"{tmp_path}/me@home") == NamedModel(f"{tmp_path}/me@home")


def publish(run_dir: Path, model: Path) -> PolicyRegistry:
    """Versions 0 and 1, of which 1 is live."""
    registry = PolicyRegistry(Storage(str(run_dir)))
    for version in range(2):
        folder = run_dir / "made" / str(version)
        save_policy(load_model(model), load_tokenizer(model), folder)
        registry.publish(folder, PolicyManifest(version=version))
    registry.promote(1)
    return registry


def test_live_is_the_version_that_is_live(tmp_path: Path, tiny_model: Path) -> None:
    registry = publish(tmp_path, tiny_model)
    live, start = RunVersion("run@live", str(tmp_path), None), RunVersion("run@0", str(tmp_path), 0)
    assert fetch_version(live) == LocalPolicy("run@live", registry.fetch(1), 1)
    assert fetch_version(start) == LocalPolicy("run@0", registry.fetch(0), 0)
    with pytest.raises(ValueError, match=r"run@7: .* has versions \[0, 1\]"):
        fetch_version(RunVersion("run@7", str(tmp_path), 7))
    with pytest.raises(ValueError, match=f"name a version, as {tmp_path}@live"):
        find_model(NamedModel(str(tmp_path)))


def test_a_folder_without_a_run_has_no_live_policy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run with a live policy"):
        fetch_version(RunVersion("x@live", str(tmp_path), None))


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a"], "give two or more, the baseline first"), (["a", "b", "a"], "policies has a more than once")],
)
def test_policies_are_two_or_more_different_ones(
    names: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_config(EvaluateConfig, ["--policies", *names])
    assert message in capsys.readouterr().err


def test_policies_follow_each_other_on_the_command_line() -> None:
    config = parse_config(EvaluateConfig, ["--policies", "runs/a@0", "http://h:1/v1#p", "--seed", "2"])
    assert (config.policies, config.seed) == (("runs/a@0", "http://h:1/v1#p"), 2)
