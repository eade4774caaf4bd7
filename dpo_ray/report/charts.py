"""Curves and bars as SVG that a page can hold inline."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

from dpo_ray.report.facts import Point

# Okabe and Ito's palette, which colour-blind readers tell apart; line and marker differ too, for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "---", "ooo")
_MOST_MARKED = 30
_GREY = "#6b7280"
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    # Fixed: the same run gives the same page.
    "svg.hashsalt": "dpo_ray",
    "font.size": 9,
    "hatch.color": "white",
    "hatch.linewidth": 0.8,
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line through points."""

    label: str
    points: list[Point]


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line that a curve is read against."""

    label: str
    y: float


@dataclass(frozen=True, slots=True)
class Bars:
    """A named height for each x."""

    label: str
    heights: tuple[float, ...]


def line_chart(curves: Sequence[Curve], *, x_label: str, level: Level | None = None) -> Markup:
    """Lines with their bands; empty text where no curve has a point."""
    drawn = {place: curve for place, curve in enumerate(curves) if curve.points}
    if not drawn:
        return Markup("")
    with rc_context(_STYLE):
        figure, axes = _axes(x_label)
        for place, curve in drawn.items():
            _draw_curve(axes, curve, place)
        if any(point.x % 1 for curve in drawn.values() for point in curve.points):
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
        if level:
            axes.axhline(level.y, color=_GREY, linewidth=1, linestyle=(0, (2, 3)), label=level.label)
        has_band = any(map(_has_band, drawn.values()))
        if has_band:
            axes.fill_between([], [], [], color=_GREY, alpha=0.25, linewidth=0, label="95 % interval")
        _draw_legend(axes, len(drawn) + bool(level) + has_band)
        return _svg(figure)


def stacked_bars(xs: Sequence[int], bars: Sequence[Bars], *, x_label: str) -> Markup:
    """One bar per x, its parts on top of each other; empty text where all heights are zero."""
    bars = [part for part in bars if any(part.heights)]
    if not bars:
        return Markup("")
    with rc_context(_STYLE):
        figure, axes = _axes(x_label)
        floor = [0.0] * len(xs)
        for place, part in enumerate(bars):
            drawn = axes.bar(xs, part.heights, bottom=floor, width=0.7, label=part.label)
            _fill(drawn, place)
            floor = [low + height for low, height in zip(floor, part.heights, strict=True)]
        _draw_legend(axes, len(bars))
        return _svg(figure)


def grouped_bars(xs: Sequence[int], bars: Sequence[Bars], *, x_label: str) -> Markup:
    """Bars side by side at each x; empty text where all heights are zero."""
    bars = [group for group in bars if any(group.heights)]
    if not bars:
        return Markup("")
    with rc_context(_STYLE):
        figure, axes = _axes(x_label)
        width = 0.8 / len(bars)
        for place, group in enumerate(bars):
            shifted = [x + (place - (len(bars) - 1) / 2) * width for x in xs]
            _fill(axes.bar(shifted, group.heights, width=width, label=group.label), place)
        _draw_legend(axes, len(bars))
        return _svg(figure)


def _axes(x_label: str) -> tuple[Figure, Axes]:
    # Small on purpose: shown at a phone's width, its text is still as large as the page's.
    figure = Figure(figsize=(4.4, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    return figure, axes


def _draw_curve(axes: Axes, curve: Curve, place: int) -> None:
    xs, ys, lows, highs = (list(column) for column in zip(*curve.points, strict=True))
    axes.plot(
        xs,
        ys,
        color=_colour(place),
        linestyle=_LINES[place % len(_LINES)],
        marker=_MARKERS[place % len(_MARKERS)] if len(xs) <= _MOST_MARKED else "",
        markersize=3.5,
        linewidth=1.6,
        label=curve.label,
    )
    if _has_band(curve):
        axes.fill_between(xs, lows, highs, color=_colour(place), alpha=0.18, linewidth=0)


def _has_band(curve: Curve) -> bool:
    return any(point.low != point.high for point in curve.points)


def _draw_legend(axes: Axes, count: int) -> None:
    if count > 1:
        columns = math.ceil(count / 2) if count > 3 else count
        axes.figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5)


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _fill(bars: BarContainer, place: int) -> None:
    for bar in bars:
        bar.set_facecolor(_colour(place))
        bar.set_hatch(_HATCHES[place % len(_HATCHES)])


def _svg(figure: Figure) -> Markup:
    drawing = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(drawing, format="svg", transparent=True, metadata=unsaid)
    text = drawing.getvalue()
    # The page gives the width; without a fixed one the viewBox keeps the proportions.
    head, rest = text[text.index("<svg") :].split(">", 1)
    return Markup(re.sub(r'\s(width|height)="[^"]*"', "", head) + ">" + rest)
