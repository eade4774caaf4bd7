"""Pairs, sources and lineage as tables for a terminal of 80 columns."""

from collections.abc import Collection, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text as RichText

from dpo_ray.buffer.lineage import Use
from dpo_ray.types import Text

_TEXTS = ("prompt", "chosen", "rejected")


def sources(rows: Sequence[dict]) -> Table:
    """What `PreferenceBuffer.sources` says, and its sum."""
    table = _table("source", "pairs", "people", "rounds", "versions", "cost", "newest (UTC)")
    for row in rows:
        table.add_row(
            row["source"],
            str(row["pairs"]),
            str(row["people"]),
            _span(row["first_round"], row["last_round"]),
            _span(row["first_version"], row["last_version"]),
            f"{row['cost']:.2f}",
            row["newest"][:16].replace("T", " "),
        )
    if len(rows) != 1:
        cost = sum(row["cost"] for row in rows)
        table.add_section()
        table.add_row("all", str(sum(row["pairs"] for row in rows)), "", "", "", f"{cost:.2f}")
    return table


def pair(row: dict) -> Table:
    """All of a pair but its token ids, whose number it gives."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in row.items():
        if name.endswith("_ids"):
            table.add_row(name, RichText(f"{len(value)} tokens"))
        elif value not in (None, "") and name != "content_sha256":
            table.add_row(name, RichText(_as_lines(value) if name in _TEXTS else str(value)))
    return table


def rounds(version: int, pairs: Mapping[int, Collection[str]]) -> Table:
    """The snapshots that made a version, and which of their pairs were new in it."""
    table = _table("round", "pairs", "new", title=f"What made version {version}")
    seen: set[str] = set()
    for round_, ids in pairs.items():
        table.add_row(str(round_), str(len(ids)), str(len(set(ids) - seen)))
        seen.update(ids)
    table.add_section()
    table.add_row("all", "", str(len(seen)))
    return table


def uses(rows: Sequence[Use], *, live: int | None) -> Table:
    """Which versions know some pairs, and from where."""
    table = _table("version", "its own round", "its whole line", "", title="How many of them each saw")
    for use in rows:
        known = len(use.own | use.inherited)
        table.add_row(str(use.version), str(len(use.own)), str(known), "live" if use.version == live else "")
    return table


def _table(first: str, *others: str, title: str | None = None) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _as_lines(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)
