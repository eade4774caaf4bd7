"""A page of the report for each round: what it gave, how judges agreed, and what it changed."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from dpo_ray.metrics import number
from dpo_ray.pairing import PairYield
from dpo_ray.report.examples import Example, ends, sorted_by_change
from dpo_ray.report.histograms import histogram
from dpo_ray.report.record import Row, RunRecord, Samples
from dpo_ray.run_warnings import RunWarning

_NUM_EXAMPLES = 6


@dataclass(frozen=True, slots=True)
class Stage:
    """How much was left at a stage between completions and pairs."""

    name: str
    count: int
    share: float
    """Of what there was at first."""


@dataclass(frozen=True, slots=True)
class RoundPage:
    """All that is shown of one round."""

    row: Row
    parent: int
    candidate: int
    warnings: list[RunWarning]
    stages: list[Stage]
    what_became: str
    """Of the completions, as a sentence."""
    agreement: dict[str, str]
    """What was measured of the judges, by what it means."""
    histograms: list[Markup]
    examples: list[Example]
    """Answers of the parent and of the candidate to held-out prompts."""


def round_pages(record: RunRecord, samples_of: Callable[[int], Samples]) -> list[RoundPage]:
    """A page for each finished round; `samples_of` gives what a round has sampled."""
    if not record.rounds:
        return []
    first = samples_of(record.rounds[0]["round"])
    return [_page(record, row, samples_of(row["round"]), first) for row in record.rounds]


def _page(record: RunRecord, row: Row, samples: Samples, first: Samples) -> RoundPage:
    candidate = row["round"] + 1
    parent = record.parent(candidate)
    counts = PairYield.from_metrics(row)
    drawn = [
        histogram(samples.rewards, first.rewards, label="reward"),
        histogram(samples.lengths, first.lengths, label="length, tokens"),
    ]
    return RoundPage(
        row=row,
        parent=parent,
        candidate=candidate,
        warnings=record.warnings(row),
        stages=_stages(counts),
        what_became=counts.sentence() if counts.completions else "",
        agreement=_agreement(row, record.steps_of(row["round"])),
        histograms=[svg for svg in drawn if svg],
        examples=ends(sorted_by_change(record, parent, candidate), _NUM_EXAMPLES),
    )


def _stages(counts: PairYield) -> list[Stage]:
    """Completions fall to what can be paired; matches to pairs, and to those that this round trains on."""
    if not counts.completions:
        return []
    usable, matched = counts.usable, max(counts.matched, 1)
    return [
        Stage("completions", counts.completions, 1.0),
        Stage("could be paired", usable, usable / counts.completions),
        Stage("matches of the pair rule", counts.matched, 1.0),
        Stage("became pairs", counts.made, counts.made / matched),
        Stage("trained on in this round", counts.kept, counts.kept / matched),
    ]


def _agreement(row: Row, steps: list[Row]) -> dict[str, str]:
    half = steps[len(steps) // 2 :]
    late = [value for step in half if (value := number(step, "rewards/accuracies")) is not None]
    said = {
        "standard deviation of the judges' rewards for one completion": _said(
            row, "judge/disagreement", ".3f"
        ),
        "comparisons that turn when the two answers change places": _said(row, "judge/flips", ".0%"),
        "comparisons that the first answer wins": _said(row, "judge/first_wins", ".0%"),
        "completions that no judge could rate": _said(row, "samples/unjudged", ".0f"),
        "pairs that the trained policy orders as the judge does": f"{fmean(late):.0%}" if late else "",
        "held-out pairs that it orders as the judge does": _said(row, "eval/rewards/accuracies", ".0%"),
    }
    return {meaning: value for meaning, value in said.items() if value}


def _said(row: Row, key: str, form: str) -> str:
    value = number(row, key)
    return "" if value is None else format(value, form)
