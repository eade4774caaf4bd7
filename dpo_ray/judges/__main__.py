"""A table of how far judges can be trusted: `python -m dpo_ray.judges`."""

import math
import random
import sys
from collections.abc import Sequence

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dpo_ray.buffer import read_snapshot, read_snapshot_manifest
from dpo_ray.comparisons import UnusableError, read_comparison
from dpo_ray.config import JudgeConfig, JudgeQualityConfig, exit_with, parse_config
from dpo_ray.film_reviews import generate_pairs
from dpo_ray.judges import JudgeError, make_single_judge
from dpo_ray.judges.budget import Spending
from dpo_ray.judges.function import Question
from dpo_ray.judges.quality import JudgeQuality, as_question, as_questions, measure_judge
from dpo_ray.prompts import GENERATED
from dpo_ray.records import Row, naming_row, read_rows
from dpo_ray.storage import Storage

_NUM_GENERATED = 1000
_SHARES = ("agreement", "self_agreement", "first_wins", "flips", "unjudged")


def main(config: JudgeQualityConfig) -> None:
    """Measure each judge, and print a line for each."""
    try:
        questions = read_questions(config)
        rows = measure(judge_settings(config), questions)
    except (ValueError, FileNotFoundError) as error:
        exit_with(str(error), code=1 if isinstance(error, JudgeError) else 2)
    console = Console(highlight=False)
    console.print(quality_table(rows))
    for row in rows:
        if row.reason:
            console.print(f"{row.judge} left out: {row.reason}", soft_wrap=True, markup=False)


def measure(judge: JudgeConfig, questions: Sequence[Question]) -> list[JudgeQuality]:
    """Of each judge by itself; what is kept in the cache is asked anew."""
    spending = Spending(judge.budget)
    rows: list[JudgeQuality] = []
    for term in judge.terms:
        asked_anew = term.model_copy(update={"keep_answers": False})
        rows.append(measure_judge(make_single_judge(asked_anew, spending), term.name, questions))
    return rows


def judge_settings(config: JudgeQualityConfig) -> JudgeConfig:
    """Those given, or the run's."""
    storage = Storage(config.run_dir)
    if "judge" in config.model_fields_set or not storage.exists("config.yaml"):
        return config.judge
    return JudgeConfig.model_validate(yaml.safe_load(storage.read_text("config.yaml"))["judge"])


def read_questions(config: JudgeQualityConfig) -> list[Question]:
    """At most `max_pairs`, the better side first."""
    if config.pairs == GENERATED:
        rows = [dict(pair._asdict()) for pair in generate_pairs(_NUM_GENERATED, seed=config.seed)]
        questions = _file_questions(rows, GENERATED)
    elif config.pairs:
        questions = _file_questions(read_rows(config.pairs, split=config.pairs_split), config.pairs)
    else:
        questions = _votes(Storage(config.run_dir))
    if not questions:
        place = config.pairs or f"the snapshots of {config.run_dir}"
        raise ValueError(f"no pairs that people judged in {place}: give a file with --pairs")
    return random.Random(config.seed).sample(questions, min(config.max_pairs, len(questions)))


def quality_table(rows: Sequence[JudgeQuality]) -> Table:
    table = Table("judge", "pairs", *(name.replace("_", " ") for name in _SHARES), "cost", box=SIMPLE_HEAD)
    for row in rows:
        shares = (getattr(row, name) for name in _SHARES)
        cells = ["–" if math.isnan(share) else f"{share:.3f}" for share in shares]
        table.add_row(row.judge, str(row.pairs), *cells, f"{row.cost:.4g}")
    return table


def _votes(storage: Storage) -> list[Question]:
    manifests = [
        read_snapshot_manifest(storage, int(name)) for name in storage.list("rounds") if name.isdigit()
    ]
    pairs = [pair for manifest in manifests if manifest for pair in read_snapshot(storage, manifest)]
    human = {pair.pair_id: pair for pair in pairs if pair.source == "human"}
    return as_questions(list(human.values()))


def _file_questions(rows: Sequence[Row], source: str) -> list[Question]:
    questions: list[Question] = []
    for number, row in enumerate(rows, start=1):
        try:
            with naming_row(source, number):
                comparison = read_comparison(row, None)
        except UnusableError:
            continue
        if comparison.chosen is not None and comparison.rejected is not None:
            sides = (comparison.prompt, comparison.chosen, comparison.rejected)
            questions.append(as_question(number, *sides, row))
    return questions


if __name__ == "__main__":
    main(parse_config(JudgeQualityConfig, sys.argv[1:]))
