"""The files that a reproduction leaves: raw numbers, kept as they come so that a stopped one goes on."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.reproduce.claims import Claim, claims_table

DIGITS = 5
"""After the decimal point, of the raw numbers."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's palette, which colour-blind readers tell apart, and grey."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

Arm = dict[str, Any]
"""The numbers of one run: what was measured, and `cpu_s`, its processor time."""


@dataclass(slots=True)
class Results:
    """Numbers by seed and arm, in `name`.json."""

    out: Path
    name: str
    seeds: Sequence[int]
    arms: dict[str, dict[str, Arm]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if self._json.exists():
            self.arms = json.loads(self._json.read_text())

    def lacks(self, seed: int, names: Sequence[str]) -> bool:
        return any(name not in self.arms.get(str(seed), {}) for name in names)

    def run(self, seed: int, name: str, arm: Callable[[], Arm]) -> None:
        """Measure an arm, unless it was measured before; then it is on disk."""
        of_seed = self.arms.setdefault(str(seed), {})
        if name in of_seed:
            return
        began = time.process_time()
        measured = _rounded(arm())
        of_seed[name] = {**measured, "cpu_s": round(time.process_time() - began, 2)}
        print(f"seed {seed}: {name}, {of_seed[name]['cpu_s']} s", flush=True)
        self._save()

    def _save(self) -> None:
        """One line for each arm; aside first, so that a killed run leaves what was there."""
        seeds = []
        for seed, arms in sorted(self.arms.items()):
            lines = (f"{json.dumps(n, ensure_ascii=False)}: {json.dumps(arm)}" for n, arm in arms.items())
            seeds.append(f'"{seed}": {{\n' + ",\n".join(lines) + "\n}")
        aside = self._json.with_suffix(".tmp")
        aside.write_text("{\n" + ",\n".join(seeds) + "\n}\n")
        aside.replace(self._json)

    def of(self, seed: int, name: str) -> Arm:
        return self.arms[str(seed)][name]

    def by_seed(self, number: Callable[[int], float]) -> dict[int, float]:
        return {seed: number(seed) for seed in self.seeds}

    @property
    def cpu_s(self) -> float:
        """Processor time of all arms of all seeds."""
        return sum(arm["cpu_s"] for seed in self.seeds for arm in self.arms[str(seed)].values())

    def write(self, claims: Sequence[Claim], tables: Sequence[str], figure: Figure) -> None:
        """`name`.md and `name`.svg."""
        seeds = ", ".join(map(str, self.seeds))
        time_line = f"Seeds {seeds}; {self.cpu_s:.0f} s of one processor core."
        text = "\n\n".join([claims_table(claims), *tables, time_line]) + "\n"
        (self.out / f"{self.name}.md").write_text(text)
        with rc_context({"svg.hashsalt": self.name, "svg.fonttype": "none", "font.size": 9}):
            figure.savefig(self.out / f"{self.name}.svg", metadata={"Date": None})
        print(text)

    @property
    def _json(self) -> Path:
        return self.out / f"{self.name}.json"


def results_of(name: str, description: str | None, arguments: Sequence[str] | None) -> Results:
    """As the command line says."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one language each (0 1 2)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/evidence"),
        help="folder of table, numbers and plot (%(default)s)",
    )
    options = parser.parse_args(arguments)
    return Results(options.out, name, options.seeds)


def _rounded(value: Any) -> Any:
    """The same with shorter numbers; tiny ones keep their magnitude."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return round(value, DIGITS) if abs(value) > 1e-3 else float(f"{value:.3g}")
    return value
