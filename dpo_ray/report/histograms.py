"""Histograms as small inline SVG: a report has two for each round."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

_WIDTH, _HEIGHT, _FLOOR, _TOP = 320, 150, 112, 10
_MOST_BINS = 24


def histogram(values: Sequence[float], first: Sequence[float], *, label: str) -> Markup:
    """Shares of the values as bars, and as an outline those of the run's first round; empty of nothing."""
    if not values:
        return Markup("")
    every = (*values, *first)
    edges = bin_edges(min(every), max(every), whole=all(value == int(value) for value in every))
    shares, outline = bin_shares(values, edges), bin_shares(first, edges)
    scale = (_FLOOR - _TOP) / max(*shares, *outline)
    bars, line = _bars([scale * share for share in shares]), _outline([scale * share for share in outline])
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{bars}{line}'
        f'<path d="M0 {_FLOOR}H{_WIDTH}" stroke="#9ca3af"/><g font-size="12" fill="#4b5563">'
        f'<text x="0" y="128">{edges[0]:g}</text>'
        f'<text x="{_WIDTH}" y="128" text-anchor="end">{edges[-1]:g}</text>'
        f'<text x="{_WIDTH / 2}" y="144" text-anchor="middle">{escape(label)}</text></g></svg>'
    )


def _bars(heights: Sequence[float]) -> str:
    width = _WIDTH / len(heights)
    return "".join(
        f'<rect x="{place * width + 1:.1f}" y="{_FLOOR - height:.1f}" width="{width - 2:.1f}" '
        f'height="{height:.1f}" fill="#0072B2"/>'
        for place, height in enumerate(heights)
        if height
    )


def _outline(heights: Sequence[float]) -> str:
    width = _WIDTH / len(heights)
    steps = "".join(
        f"V{_FLOOR - height:.1f}H{(place + 1) * width:.1f}" for place, height in enumerate(heights)
    )
    look = 'fill="none" stroke="#D55E00" stroke-width="2" stroke-dasharray="5 3"'
    return f'<path d="M0 {_FLOOR}{steps}V{_FLOOR}" {look}/>'


def bin_edges(low: float, high: float, *, whole: bool) -> list[float]:
    """Edges of equal bins of a round width around all values; of whole numbers, around each or several."""
    step = _round_width((high - low) / _MOST_BINS or 1.0)
    if whole:
        step = max(1.0, math.ceil(step))
        return [low - 0.5 + step * place for place in range(int((high - low) // step) + 2)]
    begin = math.floor(low / step)
    end = max(math.ceil(high / step), begin + 1)
    return [round(place * step, 9) for place in range(begin, end + 1)]


def bin_shares(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """What part of the values is in each bin; the last bin has its upper edge."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(int((value - edges[0]) / (edges[1] - edges[0]) + 1e-9), len(counts) - 1)] += 1
    return [count / max(len(values), 1) for count in counts]


def _round_width(least: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))
