"""The report's pages as HTML: what they are filled with, and where they are written."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from dpo_ray.config import JudgeConfig
from dpo_ray.report.comparison import (
    Named,
    curves_of_all,
    differing_settings,
    last_numbers,
    run_names,
    steps_of_all,
)
from dpo_ray.report.costs import costs
from dpo_ray.report.examples import chosen, ends, sorted_by_change
from dpo_ray.report.facts import result, setting
from dpo_ray.report.figures import over_rounds, over_steps, time_and_pairs
from dpo_ray.report.lineage import graph, lineage
from dpo_ray.report.record import Row, RunRecord, Samples, read_run, read_samples
from dpo_ray.report.rounds import round_pages
from dpo_ray.run_warnings import RunWarning, WarningName
from dpo_ray.storage import Storage

_HERE = Path(__file__).parent
_LONGEST_TEXT = 1200
_MOST_PROMPTS = 200
"""In the list of all that are sorted by change."""
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
class Repeated:
    """A warning, and all rounds in which it fired."""

    last: RunWarning
    rounds: list[int]


def write_report(run_dir: str, *, out: str | None = None) -> str:
    """Write the run's page, `report.html` in its folder unless told otherwise, and return where it is."""
    storage = Storage(run_dir)
    html = render(read_run(storage), functools.partial(read_samples, storage))
    if out is not None:
        return _write(out, html)
    storage.write_text("report.html", html)
    return f"{storage.root}/report.html"


def write_comparison(run_dirs: Sequence[str], *, out: str) -> str:
    """Write a page with runs side by side, and return where it is. ValueError: there is no such run."""
    runs = {
        name: read_run(Storage(run_dir)) for name, run_dir in zip(run_names(run_dirs), run_dirs, strict=True)
    }
    return _write(out, render_comparison(runs))


def render(record: RunRecord, samples_of: Callable[[int], Samples]) -> str:
    """The page of a run, every text of the run escaped."""
    reached, versions = result(record), lineage(record)
    changes = sorted_by_change(record, 0, reached.version) if reached.version else []
    return page_template(_HERE / "page.html.jinja").render(
        run=record,
        result=reached,
        warnings=warnings_of(record),
        settings=_settings(record.config),
        config_text=_without_passwords(record.config_text),
        round_figures=over_rounds(record),
        step_figures=over_steps(record),
        cost_figures=time_and_pairs(record),
        costs=costs(record),
        examples=chosen(changes),
        changes=ends(changes, _MOST_PROMPTS),
        num_changes=len(changes),
        rounds=round_pages(record, samples_of),
        lineage=versions,
        graph=graph(versions, record.moves),
    )


def render_comparison(runs: Named) -> str:
    """The page of several runs."""
    return page_template(_HERE / "comparison.html.jinja").render(
        runs=runs,
        numbers=last_numbers(runs),
        settings={
            name: [_without_passwords(value) for value in values]
            for name, values in differing_settings(runs).items()
        },
        round_figures=curves_of_all(runs),
        step_figures=steps_of_all(runs),
    )


def warnings_of(record: RunRecord) -> list[Repeated]:
    """Each warning that fired, as it was said last."""
    rounds: dict[WarningName, list[int]] = {}
    last: dict[WarningName, RunWarning] = {}
    for row in record.rounds:
        for warning in record.warnings(row):
            rounds.setdefault(warning.name, []).append(row["round"])
            last[warning.name] = warning
    return [Repeated(last[name], rounds[name]) for name in last]


def format_number(value: object) -> str:
    """A number for a column: 0.746, 12.3, 1,024; a dash where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return _NONE
    decimals = 0 if isinstance(value, int) or abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


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


def _write(path: str, html: str) -> str:
    target = Path(path).expanduser().absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html)
    return str(target)


def _settings(config: Row) -> dict[str, Any]:
    values = {label: setting(config, path) for label, path in _KEY_SETTINGS.items()}
    if "judge" in config:
        values["Judge"] = JudgeConfig.model_validate(config["judge"]).full_name
    return {label: _without_passwords(str(value)) for label, value in values.items() if value is not None}


def _without_passwords(text: str) -> str:
    return re.sub(r"(://[^:/@\s]*):[^@/\s]+@", r"\1:***@", text)


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.0f}\N{NO-BREAK SPACE}%"


def _clip(text: str, longest: int = _LONGEST_TEXT) -> str:
    left = len(text) - longest
    return text if left <= 0 else f"{text[:longest]} … ({left} more characters)"
