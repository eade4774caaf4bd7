"""Tasks of lm-evaluation-harness on policy versions that answer over HTTP, and what each version scored."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dpo_ray.config import HarnessConfig
from dpo_ray.evaluating.endpoint import api_key
from dpo_ray.models import load_context_length
from dpo_ray.node_files import sha256_file
from dpo_ray.registry import PolicyRegistry
from dpo_ray.storage import Storage, files_below

_Z95 = 1.96
_LOG_LINES = 12
_ANSWER_S = 30.0


class HarnessError(Exception):
    """The harness failed."""


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of a task."""

    value: float
    error: float | None
    """Its standard error; None where the harness gives none."""


Scores = dict[str, Score]
"""By task and metric."""


def check_installed() -> None:
    """ValueError where the harness is missing."""
    missing = [name for name in ("lm_eval", "tenacity") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} is not installed: install the extra, as pip install 'dpo-ray[eval]'"
        )


def find_versions(config: HarnessConfig) -> list[int]:
    """ValueError: one is no version of the run."""
    registry = PolicyRegistry(Storage(config.run_dir))
    versions: list[int] = []
    for name in config.versions:
        version = registry.live() if name == "live" else int(name) if name.isdigit() else None
        if version is None or not registry.has(version):
            raise ValueError(
                f"versions: {name}: {config.run_dir} has {registry.versions()}: give some of these, or live"
            )
        versions.append(version)
    return list(dict.fromkeys(versions))


def check_loaded(config: HarnessConfig, versions: Sequence[int]) -> None:
    """ValueError: one of the versions does not answer at the url of the settings."""
    headers = {"authorization": f"Bearer {api_key(config.api_key_variable) or 'none'}"}
    try:
        listed = httpx.get(f"{config.url}/models", headers=headers, timeout=_ANSWER_S).raise_for_status()
    except httpx.HTTPError as error:
        raise ValueError(f"url={config.url}: nobody answers there: {error}") from None
    names = [model["id"] for model in listed.json()["data"]]
    for version in versions:
        if f"policy@v{version}" not in names:
            raise ValueError(
                f"url={config.url}: version {version} is not loaded there, but {', '.join(names)}: "
                "unset url to have a copy of the run served"
            )


def run_tasks(config: HarnessConfig, version: int, url: str, folder: Path) -> Scores:
    """What the version scores that answers at `url`; its `folder` has the tokenizer."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            "-m",
            "lm_eval",
            *_arguments(config, version, url, folder),
            f"--output_path={out}",
        ]
        ended = subprocess.run(command, env=_environment(config), capture_output=True, text=True)
        results = list(Path(out).rglob("results*.json"))
        if ended.returncode != 0 or not results:
            log = "\n".join((ended.stdout + ended.stderr).splitlines()[-_LOG_LINES:])
            raise HarnessError(f"lm_eval failed on version {version}:\n{log}")
        return read_scores(json.loads(results[0].read_text())["results"])


def read_scores(results: dict[str, dict[str, Any]]) -> Scores:
    """`metric,filter` of each task, with `metric_stderr,filter`."""
    scores: Scores = {}
    for task, metrics in sorted(results.items()):
        for name, value in metrics.items():
            metric, comma, chosen = name.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = metrics.get(f"{metric}_stderr,{chosen}")
                label = f"{task} {metric}" if chosen == "none" else f"{task} {metric} ({chosen})"
                scores[label] = Score(float(value), float(error) if isinstance(error, int | float) else None)
    return scores


def keep(storage: Storage, config: HarnessConfig, version: int, scores: Scores) -> None:
    """Beside the version's other evaluations, with what was asked."""
    values = {name: [score.value, score.error] for name, score in scores.items()}
    text = json.dumps({"version": version, "asked": _asked(config), "scores": values}, indent=2)
    storage.write_text(_file(version), f"{text}\n")


def kept(storage: Storage, config: HarnessConfig, version: int) -> Scores | None:
    """None where these tasks were not asked in this way yet."""
    if not storage.exists(_file(version)):
        return None
    found = json.loads(storage.read_text(_file(version)))
    if found["asked"] != _asked(config):
        return None
    return {name: Score(*values) for name, values in found["scores"].items()}


def scores_table(scores: dict[int, Scores]) -> Table:
    """A line for each metric; of several versions, at the end what the last one gained over the first."""
    first, last = next(iter(scores.values())), next(reversed(scores.values()))
    table = Table("", *(f"v{version}" for version in scores), box=SIMPLE_HEAD)
    if len(scores) > 1:
        table.add_column("gain")
    for name in first:
        gains = [gain(first[name], last[name])] if len(scores) > 1 else []
        table.add_row(name, *(_cell(of_version[name]) for of_version in scores.values()), *gains)
    return table


def gain(before: Score, after: Score) -> str:
    """The difference, and whether it is within noise: within 1.96 standard errors of two independent scores.

    The versions answer the same rows, so their scores are mostly not independent, and the bound is wide.
    """
    difference = after.value - before.value
    if before.error is None or after.error is None:
        return f"{difference:+.3f}"
    half = _Z95 * math.hypot(before.error, after.error)
    return f"{difference:+.3f} ± {half:.3f}" + (" (noise)" if abs(difference) <= half else "")


def _cell(score: Score) -> str:
    return f"{score.value:.3f}" if score.error is None else f"{score.value:.3f} ± {_Z95 * score.error:.3f}"


def _arguments(config: HarnessConfig, version: int, url: str, folder: Path) -> list[str]:
    model = {
        "model": f"policy@v{version}",
        "base_url": f"{url}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": folder,
        "max_length": load_context_length(folder),
        "num_concurrent": config.concurrency,
    }
    given = {"limit": config.limit, "num_fewshot": config.num_fewshot, "include_path": config.task_folder}
    return [
        "--model=local-completions",
        f"--model_args={','.join(f'{name}={value}' for name, value in model.items())}",
        f"--tasks={','.join(config.tasks)}",
        f"--seed={config.seed}",
        *(f"--{name}={value}" for name, value in given.items() if value not in (None, "")),
        *(["--apply_chat_template"] if config.apply_chat_template else []),
    ]


def _environment(config: HarnessConfig) -> dict[str, str]:
    """The harness wants a key even where none is asked for."""
    return {**os.environ, "OPENAI_API_KEY": api_key(config.api_key_variable) or "none"}


def _asked(config: HarnessConfig) -> dict[str, Any]:
    """All that decides the scores of a version."""
    folder = Path(config.task_folder) if config.task_folder else None
    files = [name for name in files_below(folder) if name.endswith((".yaml", ".py"))] if folder else []
    return {
        "tasks": sorted(config.tasks),
        "task_files": {name: sha256_file(folder / name) for name in files} if folder else {},
        "limit": config.limit,
        "num_fewshot": config.num_fewshot,
        "apply_chat_template": config.apply_chat_template,
        "seed": config.seed,
    }


def _file(version: int) -> str:
    return f"evaluation/harness/v{version:05d}.json"
