"""What people call a policy, and where it is then."""

import re
from dataclasses import dataclass
from pathlib import Path

from dpo_ray.config.settings import resolve_run_dir
from dpo_ray.registry import PolicyRegistry
from dpo_ray.storage import Storage

_URL = re.compile(r"https?://")
_OF_RUN = re.compile(r"(?P<run>.+)@v?(?P<version>\d+|live)")


@dataclass(frozen=True, slots=True)
class RunVersion:
    """A version of a run."""

    name: str
    run_dir: str
    version: int | None
    """None: the one that is live."""


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A Hugging Face folder or hub name."""

    name: str


@dataclass(frozen=True, slots=True)
class EndpointModel:
    """A model of an OpenAI-compatible endpoint."""

    name: str
    url: str
    """Its base: http://host:8000/v1."""
    model: str


@dataclass(frozen=True, slots=True)
class LocalPolicy:
    """A policy whose weights can be loaded."""

    name: str
    source: Path | str
    """A folder, or a hub name."""
    version: int = 0
    """That of its run; 0 where it is of none."""


PolicyName = RunVersion | NamedModel | EndpointModel


def parse_policy(name: str) -> PolicyName:
    """ValueError: what is written there names no policy."""
    if _URL.match(name):
        url, _, model = name.partition("#")
        if not model:
            raise ValueError(f"policies: {name} names no model: add one that it has, as {url}#policy")
        if "@" in url:
            raise ValueError(
                f"policies: {url.partition('//')[0]}//…@{url.rpartition('@')[2]} holds a name or password: "
                "take it out, and set endpoint.api_key_variable"
            )
        return EndpointModel(name, url, model)
    if match := _OF_RUN.fullmatch(name):
        version = None if match["version"] == "live" else int(match["version"])
        return RunVersion(name, resolve_run_dir(match["run"]), version)
    if "@" in name and not Path(name).exists():
        raise ValueError(
            f"policies: {name}: after @ comes a version's number or live, as {name.partition('@')[0]}@live"
        )
    return NamedModel(name)


def fetch_version(policy: RunVersion) -> LocalPolicy:
    """The version's files, their hashes checked. ValueError: the run does not have it."""
    registry = PolicyRegistry(Storage(policy.run_dir))
    version = registry.live() if policy.version is None else policy.version
    if version is None:
        raise ValueError(f"policies: {policy.name}: there is no run with a live policy in {policy.run_dir}")
    if not registry.has(version):
        raise ValueError(f"policies: {policy.name}: {policy.run_dir} has versions {registry.versions()}")
    return LocalPolicy(policy.name, registry.fetch(version), version)


def find_model(policy: NamedModel) -> LocalPolicy:
    """ValueError: it is the folder of a run, which has several policies."""
    if (Path(policy.name) / "policies").is_dir():
        raise ValueError(
            f"policies: {policy.name} is the folder of a run: name a version, as {policy.name}@live"
        )
    return LocalPolicy(policy.name, policy.name)
