"""Where each policy version comes from, what became of it, and the graph of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from markupsafe import Markup, escape

from dpo_ray.report.record import Row, RunRecord

Fate = Literal["start", "kept", "refused", "rolled back", "not tried"]
_ROW, _LANE, _LEFT, _TOP, _TEXT = 40, 34, 44, 26, 200
_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#6b7280"


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where one policy version comes from, and what became of it."""

    version: int
    parent: int | None
    created_at: str
    snapshot: Row
    snapshot_is_declared: bool
    """Its hash is the one that the round's own manifest declares."""
    fate: Fate
    verdict: str
    is_live: bool
    num_warnings: int


def lineage(record: RunRecord) -> list[Lineage]:
    """Of all versions, the oldest first."""
    return [_ancestry(record, version) for version in sorted(record.policies)]


def graph(versions: Sequence[Lineage], moves: Sequence[Row]) -> Markup:
    """Versions below each other, those that led to the live one in the first lane; empty of fewer than two.

    A line goes from parent to child, a dashed arrow from a version that was taken back to what came after.
    """
    if len(versions) < 2:
        return Markup("")
    lanes = lanes_of(versions)
    at = {
        item.version: (_LEFT + _LANE * lanes[item.version], _TOP + _ROW * row)
        for row, item in enumerate(versions)
    }
    text_x = _LEFT + _LANE * max(lanes.values()) + 26
    width, height = text_x + _TEXT, _TOP + _ROW * len(versions) - 14
    drawn = [
        *(_edge(at[item.parent], at[item.version]) for item in versions if item.parent in at),
        *(_way_back(at[m["previous"]], at[m["version"]]) for m in _ways_back(moves) if m["previous"] in at),
        *(_node(item, at[item.version], text_x) for item in versions),
    ]
    arrow = (
        '<marker id="back" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        f'<path d="M0 0L8 4L0 8Z" fill="{_RED}"/></marker>'
    )
    return Markup(
        f'<svg class="graph" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="Lineage of the policy versions"><defs>{arrow}</defs>{"".join(drawn)}</svg>'
    )


def lanes_of(versions: Sequence[Lineage]) -> dict[int, int]:
    """0 for the live version and its ancestors; a branch that ended has a lane of its own to the right."""
    parents = {item.version: item.parent for item in versions}
    trunk: set[int | None] = set()
    version = next((item.version for item in versions if item.is_live), max(parents))
    while version is not None and version not in trunk:
        trunk.add(version)
        version = parents.get(version)
    lanes: dict[int, int] = {}
    for item in versions:
        above = lanes.get(item.parent, 0) if item.parent is not None else 0
        lanes[item.version] = 0 if item.version in trunk else max(1, above)
    return lanes


def _ancestry(record: RunRecord, version: int) -> Lineage:
    manifest, row = record.policies[version], record.round_that_made(version)
    snapshot = manifest.get("snapshot") or {}
    declared = record.snapshots.get(snapshot.get("round", -1), {})
    return Lineage(
        version=version,
        parent=manifest.get("parent"),
        created_at=str(manifest.get("created_at") or ""),
        snapshot=snapshot,
        snapshot_is_declared=snapshot.get("sha256") == declared.get("sha256"),
        fate=_fate(record, version),
        verdict=_words(record, version),
        is_live=version == record.live,
        num_warnings=len(record.warnings(row)) if row else 0,
    )


def _fate(record: RunRecord, version: int) -> Fate:
    if version == 0:
        return "start"
    row = record.round_that_made(version)
    if row.get("gate/passed") not in (None, True, 1):
        return "refused"
    if any(move["previous"] == version for move in _ways_back(record.moves)):
        return "rolled back"
    return "kept" if row else "not tried"


def _words(record: RunRecord, version: int) -> str:
    """What the gate said of a version, and each time that it was taken out of service."""
    row = record.round_that_made(version)
    rollbacks = [move for move in _ways_back(record.moves) if move["previous"] == version]
    return "; ".join([_verdict(row), *(_rollback(move, row) for move in rollbacks)])


def _ways_back(moves: Sequence[Row]) -> list[Row]:
    return [move for move in moves if move["kind"] == "rollback"]


def _rollback(move: Row, row: Row) -> str:
    # The gate's own reason is told already.
    reason = "" if move["reason"] == row.get("gate/reason") else f": {move['reason']}"
    return f"rolled back to v{move['version']} by {move['by']}{reason}"


def _verdict(row: Row) -> str:
    match row.get("gate/passed"):
        case None:
            return "\N{EN DASH}"
        case True | 1:
            return "passed"
        case _:
            return f"refused: {row.get('gate/reason') or 'no reason given'}"


def _edge(parent: tuple[int, int], child: tuple[int, int]) -> str:
    (x, y), (to_x, to_y) = parent, child
    bend = f"V{to_y - _ROW + 8}C{x} {to_y - 8} {to_x} {to_y - _ROW + 14} {to_x} {to_y - 8}"
    way = f"M{x} {y}{bend if x != to_x else ''}L{to_x} {to_y}"
    return f'<path d="{way}" fill="none" stroke="{_GREY}" stroke-width="2"/>'


def _way_back(start: tuple[int, int], end: tuple[int, int]) -> str:
    (x, y), (to_x, to_y) = start, end
    left = _LEFT - 34
    return (
        f'<path d="M{x - 9} {y}C{left} {y} {left} {to_y} {to_x - 10} {to_y}" fill="none" stroke="{_RED}" '
        'stroke-width="1.6" stroke-dasharray="4 3" marker-end="url(#back)"/>'
    )


def _node(item: Lineage, place: tuple[int, int], text_x: int) -> str:
    x, y = place
    ring = f'<circle cx="{x}" cy="{y}" r="11" fill="none" stroke="{_BLUE}" stroke-width="2"/>'
    words = [item.fate, *(["live"] if item.is_live else [])]
    words += [f"⚠ {item.num_warnings}"] if item.num_warnings else []
    said = f'<tspan font-weight="600">v{item.version}</tspan> · {escape(" · ".join(words))}'
    text = f'<text x="{text_x}" y="{y + 5}" font-size="14" fill="#1f2937">{said}</text>'
    drawn = f"{ring if item.is_live else ''}{_shape(item.fate, x, y)}{text}"
    return drawn if item.version == 0 else f'<a href="#round-{item.version - 1}">{drawn}</a>'


def _shape(fate: Fate, x: int, y: int) -> str:
    """A form for each fate: nobody needs to see the colours."""
    match fate:
        case "start":
            return f'<rect x="{x - 7}" y="{y - 7}" width="14" height="14" fill="{_BLUE}"/>'
        case "kept":
            return f'<circle cx="{x}" cy="{y}" r="7" fill="{_BLUE}"/>'
        case "refused":
            return (
                f'<circle cx="{x}" cy="{y}" r="8" fill="#fff" stroke="{_RED}" stroke-width="2"/>'
                f'<path d="M{x - 4} {y - 4}l8 8m0 -8l-8 8" stroke="{_RED}" stroke-width="2"/>'
            )
        case "rolled back":
            dash = 'stroke-dasharray="3 2"'
            return f'<circle cx="{x}" cy="{y}" r="8" fill="#fff" stroke="{_RED}" stroke-width="2" {dash}/>'
        case "not tried":
            return f'<circle cx="{x}" cy="{y}" r="7" fill="#fff" stroke="{_GREY}" stroke-width="2"/>'
        case _:
            assert_never(fate)
