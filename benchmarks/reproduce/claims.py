"""What was claimed, what was measured for it with each seed, and whether the one bears out the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

Relation = Literal["<", "<=", ">", ">="]


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence, a bound on a number, and that number with each seed."""

    name: str
    relation: Relation
    bound: float
    measured: Mapping[int, float]

    @property
    def passed(self) -> bool:
        """Whether the number keeps to the bound with every seed; without any seed nothing is shown."""
        return bool(self.measured) and all(map(self._holds, self.measured.values()))

    @property
    def verdict(self) -> str:
        return "PASS" if self.passed else "FAIL"

    def _holds(self, value: float) -> bool:
        match self.relation:
            case "<":
                return value < self.bound
            case "<=":
                return value <= self.bound
            case ">":
                return value > self.bound
            case ">=":
                return value >= self.bound
            case _:
                assert_never(self.relation)


def claims_table(claims: Sequence[Claim]) -> str:
    """One line per claim, one column per seed."""
    seeds = sorted({seed for claim in claims for seed in claim.measured})
    header = ["claim", "bound", *(f"seed {seed}" for seed in seeds), ""]
    rows = [
        [
            claim.name,
            f"{claim.relation} {claim.bound:g}",
            *(f"{claim.measured[seed]:.3g}" if seed in claim.measured else "–" for seed in seeds),
            f"**{claim.verdict}**",
        ]
        for claim in claims
    ]
    return markdown(header, rows, words=1)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> str:
    """A Markdown table; its first `words` columns are text, the others numbers."""
    rule = ["---"] * words + ["--:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
