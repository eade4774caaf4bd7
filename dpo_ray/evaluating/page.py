"""One self-contained page with what an evaluation found, and its completions side by side."""

from pathlib import Path

from dpo_ray.config import EvaluateConfig
from dpo_ray.evaluating import sentences
from dpo_ray.evaluating.examples import examples
from dpo_ray.evaluating.findings import QUANTILES, Measures
from dpo_ray.evaluating.outcome import Outcome
from dpo_ray.report import page_template
from dpo_ray.report.charts import Curve, line_chart
from dpo_ray.report.facts import Point

_LEGEND = 24
"""Characters."""
_TEMPLATE = Path(__file__).parent / "page.html.jinja"


def render(outcome: Outcome, config: EvaluateConfig) -> str:
    """The page, every text escaped."""
    return page_template(_TEMPLATE).render(
        outcome=outcome,
        verdicts=[sentences.verdict(each) for each in outcome.comparisons],
        errors=[
            sentence for each in outcome.measures for sentence in sentences.errors(each.policy, each.errors)
        ],
        judged=sentences.judged(outcome.bill),
        rewards=line_chart(_reward_curves(outcome.measures), x_label="Completions, % from the lowest reward"),
        examples=examples(outcome),
        settings=config.model_dump_json(indent=2),
    )


def _reward_curves(measures: list[Measures]) -> list[Curve]:
    return [
        Curve(
            _end_of(each.policy),
            [
                Point(100 * share, reward, reward, reward)
                for share, reward in zip(QUANTILES, each.reward_quantiles, strict=True)
            ],
        )
        for each in measures
        if each.reward_quantiles is not None
    ]


def _end_of(name: str) -> str:
    """What fits into a legend: paths differ at their ends."""
    return name if len(name) <= _LEGEND else f"…{name[1 - _LEGEND :]}"
