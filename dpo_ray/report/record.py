"""What a run's folder holds, as a report reads it."""

import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

from dpo_ray.config import WarningsConfig
from dpo_ray.metrics import number
from dpo_ray.run_folder import PAUSED
from dpo_ray.run_warnings import RunWarning, round_warnings
from dpo_ray.storage import Storage

Row = dict[str, Any]
"""One JSON object, as a file of the run's folder has it; any measurement may be absent or null."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All that a report reads from a run's folder, but for the samples of its rounds."""

    config_text: str
    config: Row
    start: Row
    """Measurements of version 0; empty where it was not measured."""
    rounds: tuple[Row, ...]
    steps: tuple[Row, ...]
    evaluations: dict[int, list[Row]]
    """Judged held-out completions, by policy version."""
    policies: dict[int, Row]
    """Manifests, by policy version."""
    snapshots: dict[int, Row]
    """Manifests, by round."""
    live: int | None
    moves: tuple[Row, ...] = ()
    """Moves of LIVE: promotions and rollbacks."""
    paused: str = ""
    """Why no round begins, where the run waits for a person."""

    def round_of(self, version: int) -> Row:
        """The row of the round that made `version`; empty where there is none."""
        return next((row for row in self.rounds if row.get("policy_version") == version), {})

    def round_that_made(self, version: int) -> Row:
        """The row of the round whose candidate `version` was; empty while it is not finished."""
        return next((row for row in self.rounds if row["round"] == version - 1), {})

    def parent(self, version: int) -> int:
        """What `version` was trained from."""
        parent = self.policies.get(version, {}).get("parent")
        return max(0, version - 1) if parent is None else parent

    def steps_of(self, round_: int) -> list[Row]:
        return [step for step in self.steps if step.get("round") == round_]

    def result_version(self) -> int | None:
        """The version that the run is judged by: the live one, or the newest while the start is live."""
        made = [row["policy_version"] for row in self.rounds if row.get("policy_version")]
        return self.live if self.live in made else max(made, default=None)

    def warnings(self, row: Row) -> list[RunWarning]:
        """What fired in a round; in a run that kept none, what would fire now."""
        if "warnings" in row:
            return [RunWarning(**warning) for warning in row["warnings"]]
        config = WarningsConfig.model_validate(self.config.get("warnings") or {})
        return round_warnings(row, self.steps_of(row["round"]), start=self.start, config=config)


@dataclass(frozen=True, slots=True)
class Samples:
    """Of a round's completions, what histograms are made of."""

    rewards: tuple[float, ...]
    lengths: tuple[float, ...]
    """Tokens."""


def read_run(storage: Storage) -> RunRecord:
    """What the run's folder holds so far."""
    if not storage.exists("config.yaml") and not storage.exists("metrics.jsonl"):
        raise ValueError(
            f"no run in {storage.root}: it has neither config.yaml nor metrics.jsonl; "
            "give the folder that a job wrote as its run_dir"
        )
    config_text = _read_if_there(storage, "config.yaml")
    rows = _metrics(_json_lines(_read_if_there(storage, "metrics.jsonl")))
    live = _read_if_there(storage, "policies/LIVE").strip()
    return RunRecord(
        config_text=config_text,
        config=yaml.safe_load(config_text) or {},
        start=next((row for row in rows if row["kind"] == "start"), {}),
        rounds=tuple(row for row in rows if row["kind"] == "round"),
        steps=tuple(row for row in rows if row["kind"] == "step"),
        evaluations=_evaluations(storage),
        policies=_manifests(storage, "policies", "v"),
        snapshots=_manifests(storage, "rounds", ""),
        live=int(live) if live else None,
        moves=tuple(_json_lines(_read_if_there(storage, "policies/events.jsonl"))),
        paused=_read_if_there(storage, PAUSED).strip(),
    )


def read_samples(storage: Storage, round_: int) -> Samples:
    """Of a round that sampled nothing, nothing."""
    rows = _json_lines(_read_if_there(storage, f"rounds/{round_:05d}/samples.jsonl"))
    rewards = [number(row["judgement"], "reward") for row in rows]
    return Samples(
        rewards=tuple(reward for reward in rewards if reward is not None),
        lengths=tuple(float(len(row["completion"]["token_ids"])) for row in rows),
    )


def _read_if_there(storage: Storage, path: str) -> str:
    return storage.read_text(path) if storage.exists(path) else ""


def _json_lines(text: str) -> list[Row]:
    *whole, last = text.split("\n")
    return [json.loads(line) for line in whole if line.strip()] + _row_if_finished(last)


def _row_if_finished(line: str) -> list[Row]:
    """The row of a file's last line, unless the job is still writing it."""
    try:
        return [json.loads(line)]
    except json.JSONDecodeError:
        return []


def _metrics(rows: list[Row]) -> list[Row]:
    """One row per step and per round: where a crash made it be done again, the last."""
    return list(
        {(row["kind"], row["step" if row["kind"] == "step" else "round"]): row for row in rows}.values()
    )


def _evaluations(storage: Storage) -> dict[int, list[Row]]:
    files = {name: re.fullmatch(r"v(\d+)\.jsonl", name) for name in storage.list("evaluation")}
    return {
        int(match[1]): _json_lines(storage.read_text(f"evaluation/{name}"))
        for name, match in files.items()
        if match
    }


def _manifests(storage: Storage, folder: str, prefix: str) -> dict[int, Row]:
    """Manifests by number; a folder without one is not finished and left out."""
    numbered = {name: re.fullmatch(rf"{prefix}(\d+)", name) for name in storage.list(folder)}
    texts = {
        int(match[1]): _read_if_there(storage, f"{folder}/{name}/manifest.json")
        for name, match in numbered.items()
        if match
    }
    return {number_: json.loads(text) for number_, text in texts.items() if text}
