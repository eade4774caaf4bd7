"""What a person at the terminal sees of a job."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from dpo_ray.pairing import PairYield

OnProgress = Callable[[int, int], None]
_PHASES = ("sample", "judge", "train", "push")
_NO_COLUMNS = {
    *("reward_mean", "reward_std", "length_mean"),
    *("unjudged", "unjudged_budget", "retries", "cached", "first_wins", "flips", "truncated", "disagreement"),
}
_COLUMNS: dict[str, tuple[str, str]] = {
    "round": ("round", "d"),
    "policy_version": ("version", "d"),
    "eval/reward_mean": ("reward", ".3f"),
    "win_rate/vs_start": ("win rate", ".2f"),
    "kl/start": ("KL", ".2f"),
    "pairs/kept": ("pairs", "d"),
    "time/sample_s": ("sample s", ".1f"),
    "time/judge_s": ("judge s", ".1f"),
    "time/train_s": ("train s", ".1f"),
    "time/push_s": ("push s", ".2f"),
    "time/round_s": ("round s", ".1f"),
}


class Terminal:
    """Progress of the phase that runs, one line per round, a table at the end."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.times: dict[str, float] = {}
        """Seconds of each phase since `start_round`."""
        self._started = time.perf_counter()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def start_round(self) -> None:
        """Forget the times of the round before."""
        self.times, self._started = {}, time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """`time/<phase>_s` of each phase of this round, and of the round itself."""
        times = {**dict.fromkeys(_PHASES, 0.0), **self.times}  # After a crash, a round may need no sampling.
        phases = {f"time/{name}_s": seconds for name, seconds in times.items()}
        return {**phases, "time/round_s": time.perf_counter() - self._started}

    @contextmanager
    def phase(self, name: str, text: str = "") -> Iterator[OnProgress]:
        """Show and time a phase; what it yields takes (done, total)."""
        started = time.perf_counter()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            task = progress.add_task(text or name, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - started

    def round_line(self, row: dict) -> None:
        """One line for a finished round."""
        cells = [f"{title} {_cell(row, name)}" for name, (title, _) in _COLUMNS.items()]
        extra = [f"{name.removeprefix('eval/')} {row[name]:.2f}" for name in _judge_metrics([row])]
        self.say(" · ".join([*cells[:5], *extra, *cells[5:]]))
        counts = PairYield.from_metrics(row)
        if counts.is_poor:
            self.say(f"  [yellow]few pairs: {counts.sentence()}[/yellow]")
        if not row.get("gate/passed", True):
            refusal = f"  the gate refused this candidate: {row['gate/reason']}"
            self.console.print(refusal, style="yellow", soft_wrap=True, markup=False)
        self.warn(row)

    def warn(self, row: dict) -> None:
        """A line for each warning of a finished round."""
        for warning in row["warnings"]:
            line = f"  warning {warning['name']}: {warning['message']}"
            self.console.print(line, style="yellow", soft_wrap=True, markup=False)

    def round_table(self, rows: Sequence[dict]) -> None:
        """All rounds, below each other; narrow enough for 80 columns."""
        names = [name for name in _COLUMNS if name not in ("time/judge_s", "time/push_s")]
        extra = _judge_metrics(rows)
        titles = [*(_COLUMNS[name][0] for name in names), *(name.removeprefix("eval/") for name in extra)]
        table = Table(*titles, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in rows:
            cells = [f"{row.get(name, float('nan')):.2f}" for name in extra]
            table.add_row(*(_cell(row, name) for name in names), *cells)
        self.console.print(table)


def _judge_metrics(rows: Sequence[dict]) -> list[str]:
    """What the judge measures of a policy, and not how the judge itself did."""
    names = {name.removeprefix("eval/") for row in rows for name in row if re.fullmatch("eval/[^/]+", name)}
    return sorted(f"eval/{name}" for name in names - _NO_COLUMNS)


def _cell(row: dict, name: str) -> str:
    value = row.get(name)
    return "–" if value is None else format(value, _COLUMNS[name][1])
