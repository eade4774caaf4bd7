"""One self-contained page that tells what happened in a run."""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from dpo_ray.config import JudgeConfig
from dpo_ray.report_facts import Row, RunRecord, examples, result, setting
from dpo_ray.report_figures import over_rounds, over_steps, time_and_pairs
from dpo_ray.storage import Storage

_LONGEST_TEXT = 1200
_NONE = "\N{EN DASH}"
_KEY_SETTINGS = {
    "Model": "model",
    "Loss": "training.loss.type",
    "Beta": "training.loss.beta",
    "Learning rate": "training.learning_rate",
    "Pairs per step": "training.batch_size",
    "Training processes": "training.workers",
    "Rounds": "rounds",
    "Prompts per round": "sampling.prompts_per_round",
    "Samples per prompt": "sampling.samples_per_prompt",
    "Temperature": "sampling.temperature",
    "Pair rule": "pairing.rule",
    "Pairs per round": "buffer.pairs_per_round",
    "Oldest pair's age": "buffer.max_age",
    "Seed": "seed",
}


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where one policy version comes from, and what became of it."""

    version: int
    parent: int | None
    created_at: str
    snapshot: Row
    snapshot_is_declared: bool
    """Its hash is the one that the round's own manifest declares."""
    verdict: str
    is_live: bool


def write_report(run_dir: str) -> str:
    """Write the run's `report.html` and return where it is."""
    storage = Storage(run_dir)
    storage.write_text("report.html", render(read_run(storage)))
    return f"{storage.root}/report.html"


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
    )


def render(record: RunRecord) -> str:
    """The page, every text of the run escaped."""
    return page_template(Path(__file__).parent / "report.html.jinja").render(
        run=record,
        result=result(record),
        settings=_settings(record.config),
        config_text=_without_passwords(record.config_text),
        round_figures=over_rounds(record),
        step_figures=over_steps(record),
        cost_figures=time_and_pairs(record),
        examples=examples(record),
        lineage=_lineage(record),
    )


def page_template(path: Path) -> Template:
    """A page that escapes every text, and has filters for numbers, shares and long texts."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(num=format_number, percent=_percent, clip=_clip)
    return environment.get_template(path.name)


def format_number(value: object) -> str:
    """A number for a column: 0.746, 12.3, 1,024; a dash where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return _NONE
    decimals = 0 if isinstance(value, int) or abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


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


def _settings(config: Row) -> dict[str, Any]:
    values = {label: setting(config, path) for label, path in _KEY_SETTINGS.items()}
    if "judge" in config:
        values["Judge"] = JudgeConfig.model_validate(config["judge"]).full_name
    return {label: _without_passwords(str(value)) for label, value in values.items() if value is not None}


def _without_passwords(text: str) -> str:
    return re.sub(r"(://[^:/@\s]*):[^@/\s]+@", r"\1:***@", text)


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.0f}\N{NO-BREAK SPACE}%"


def _clip(text: str) -> str:
    left = len(text) - _LONGEST_TEXT
    return text if left <= 0 else f"{text[:_LONGEST_TEXT]} … ({left} more characters)"


def _lineage(record: RunRecord) -> list[Lineage]:
    return [_ancestry(record, version) for version in sorted(record.policies)]


def _ancestry(record: RunRecord, version: int) -> Lineage:
    manifest = record.policies[version]
    snapshot = manifest.get("snapshot") or {}
    declared = record.snapshots.get(snapshot.get("round", -1), {})
    return Lineage(
        version=version,
        parent=manifest.get("parent"),
        created_at=str(manifest.get("created_at") or ""),
        snapshot=snapshot,
        snapshot_is_declared=snapshot.get("sha256") == declared.get("sha256"),
        verdict=_fate(record, version),
        is_live=version == record.live,
    )


def _fate(record: RunRecord, version: int) -> str:
    """What the gate said of a version, and each time that it was taken out of service."""
    row = record.round_that_made(version)
    rollbacks = [m for m in record.moves if m["kind"] == "rollback" and m["previous"] == version]
    return "; ".join([_verdict(row), *(_rollback(move, row) for move in rollbacks)])


def _rollback(move: Row, row: Row) -> str:
    # The gate's own reason is told already.
    reason = "" if move["reason"] == row.get("gate/reason") else f": {move['reason']}"
    return f"rolled back to v{move['version']} by {move['by']}{reason}"


def _verdict(row: Row) -> str:
    match row.get("gate/passed"):
        case None:
            return _NONE
        case True | 1:
            return "passed"
        case _:
            return f"refused: {row.get('gate/reason') or 'no reason given'}"


def main(arguments: list[str] | None = None) -> int:
    """Write a run's report and print its path; 2 where there is no run."""
    parser = argparse.ArgumentParser(prog="python -m dpo_ray.report", description=__doc__)
    parser.add_argument("run_dir", help="folder or URL of a run")
    try:
        print(write_report(parser.parse_args(arguments).run_dir))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
