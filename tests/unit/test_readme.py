"""The documents describe what is there."""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from dpo_ray.config import (
    BetaSweepConfig,
    EvaluateConfig,
    HarnessConfig,
    IterativeDPOConfig,
    OfflineDPOConfig,
    RewardModelConfig,
    ServeConfig,
    Settings,
    SFTConfig,
    parse_config,
)
from dpo_ray.config.loss import LossType

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/scaling.md")
PACKAGES = ("dpo_ray/", "serve/", "jobs/")
JOBS: dict[str, type[Settings]] = {
    "jobs/iterative_dpo.py": IterativeDPOConfig,
    "jobs/offline_dpo.py": OfflineDPOConfig,
    "jobs/sft.py": SFTConfig,
    "jobs/beta_sweep.py": BetaSweepConfig,
    "jobs/reward_model.py": RewardModelConfig,
    "jobs/evaluate.py": EvaluateConfig,
    "jobs/harness.py": HarnessConfig,
}


def read(document: str) -> str:
    return (ROOT / document).read_text()


def block_below(document: str, heading: str) -> list[str]:
    """The lines of the first code block below a heading."""
    _, _, rest = read(document).partition(f"\n## {heading}\n")
    return rest.split("\n```")[1].splitlines()[1:]


def tree() -> tuple[list[str], dict[str, list[str]]]:
    """README's top-level entries, and what it lists below each."""
    top: list[str] = []
    below: dict[str, list[str]] = {}
    for line in block_below("README.md", "The tree"):
        name, comment = line.split(maxsplit=1)
        assert comment
        if line.startswith(" "):
            below.setdefault(top[-1], []).append(name)
        else:
            top.append(name)
    return top, below


def repository_files() -> list[str]:
    """What git tracks, or would if all were added."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).exists()]


def settings(section: type[BaseModel], prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, field in section.model_fields.items():
        names.add(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names |= settings(field.annotation, f"{prefix}{name}.")
    return names


def all_settings() -> set[str]:
    return set[str]().union(*map(settings, (*JOBS.values(), ServeConfig)))


def test_the_tree_names_the_repositorys_top_level_once() -> None:
    top, _ = tree()
    there = {f"{name.split('/')[0]}/" if "/" in name else name for name in repository_files()}
    assert sorted(top) == sorted(there)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tree_names_every_file_of_a_package_once(package: str) -> None:
    _, below = tree()
    files = [name.removeprefix(package) for name in repository_files() if name.startswith(package)]
    assert sorted(below[package]) == sorted(name for name in files if not name.endswith("__init__.py"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_setting_that_is_named_exists(document: str) -> None:
    known = all_settings()
    named = set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)+)", read(document)))
    assert named <= known, named - known
    assert document != "README.md" or len(named) > 8


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_setting_that_is_named_without_dashes_exists(document: str) -> None:
    known = all_settings()
    parts = {name.removeprefix("training.") for name in known}
    sections = {name.split(".")[0] for name in (*known, *parts) if "." in name}
    named = re.findall(r"`([a-z_]+)\.([a-z_.]+)(?: [a-z_0-9]+)?`", read(document))
    files = re.compile(r"(py|md|yaml|toml|jsonl?|csv|svg|html|pt|sqlite)$")
    used = {".".join(name) for name in named if name[0] in sections and not files.search(name[1])}
    assert used <= known | parts, used - known - parts
    assert document != "docs/scaling.md" or len(used) > 5


def test_every_setting_of_a_command_is_one_of_its_job() -> None:
    checked = 0
    for line in read("README.md").splitlines():
        for job, config in JOBS.items():
            _, is_command, arguments = line.partition(f" {job} --")
            if is_command:
                known = settings(config) | {"config", "help"}
                assert set(re.findall(r"--([a-z_.]+)", f"--{arguments}")) <= known, line
                checked += 1
    assert checked >= 9


def test_every_command_of_a_job_has_settings_that_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^[^`\n]* (jobs/\w+\.py) (--.*)$", read("README.md"), re.MULTILINE)
    assert {job for job, _ in commands} == set(JOBS)
    for job, arguments in commands:
        if arguments != "--help":
            parse_config(JOBS[job], shlex.split(arguments))


def test_the_losses_of_the_table_are_all_that_there_are() -> None:
    _, _, rest = read("README.md").partition("\n## Losses\n")
    rows = [line.split("|")[1] for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    named = [loss for row in rows for loss in re.findall(r"`(\w+)`", row)]
    known = [loss for group in get_args(LossType) for loss in (get_args(group) or (group,))]
    assert sorted(named) == sorted(known)
    assert f"any of {len(known)} losses" in read("README.md")


def test_architecture_is_read_in_one_sitting() -> None:
    assert len(read("ARCHITECTURE.md").splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    named = re.findall(r"(?<![\w/.])[\w.]+(?:/[\w.]+)*\.(?:py|md|yaml|toml|txt|jinja)\b", read(document))
    roots: Sequence[Path] = [ROOT, *(ROOT / name for name in ("dpo_ray", "serve", "jobs", "tests/unit"))]
    in_runs = {"config.yaml"}
    missing = {name for name in named if not any((root / name).exists() for root in roots)} - in_runs
    assert not missing


def test_the_layers_are_those_that_the_linter_holds() -> None:
    contracts = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    held = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    drawn = [line.split("   ")[0].strip() for line in block_below("ARCHITECTURE.md", "Layers")]
    assert drawn == held


def test_every_test_that_proves_an_invariant_exists() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", read("ARCHITECTURE.md")))
    assert len(named) > 20
    assert {name for name in named if f"def {name}(" not in tests} == set()
