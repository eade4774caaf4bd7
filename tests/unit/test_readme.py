"""The documents describe what is there."""

import re
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel

from dpo_ray.config import IterativeDPOConfig, OfflineDPOConfig, ServeConfig

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
PACKAGES = ("dpo_ray/", "serve/")


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
    known = settings(IterativeDPOConfig) | settings(OfflineDPOConfig) | settings(ServeConfig)
    named = set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)+)", read(document)))
    assert named <= known, named - known
    assert document != "README.md" or len(named) > 8


def test_every_setting_of_a_command_is_one_of_its_job() -> None:
    jobs: dict[str, type[BaseModel]] = {
        "jobs/iterative_dpo.py": IterativeDPOConfig,
        "jobs/offline_dpo.py": OfflineDPOConfig,
    }
    checked = 0
    for line in read("README.md").splitlines():
        for job, config in jobs.items():
            _, is_command, arguments = line.partition(f" {job} --")
            if is_command:
                known = settings(config) | {"config", "help"}
                assert set(re.findall(r"--([a-z_.]+)", f"--{arguments}")) <= known, line
                checked += 1
    assert checked >= 6


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
