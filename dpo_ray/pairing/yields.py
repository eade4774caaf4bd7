"""What became of a round's completions and of the pairs made of them, each counted once."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from dpo_ray.types import Pair

_PREFIX = "yield/"
_POOR = 0.1
CompletionLoss = Literal["unjudged", "empty", "degenerate", "identical"]
"""Why a completion is not paired."""
MatchLoss = Literal["tie", "near_identical", "length", "degenerate_chosen", "no_answer"]
"""Why what a rule has matched is no pair."""
COMPLETION_LOSSES: tuple[str, ...] = get_args(CompletionLoss)
MATCH_LOSSES: tuple[str, ...] = get_args(MatchLoss)
_ADVICE = {
    "unjudged": "take a judge that can rate these completions",
    "empty": "sample at a higher temperature",
    "degenerate": "raise sampling.max_new_tokens, or set pairing.degenerate to keep",
    "identical": "sample at a higher temperature",
    "tie": "sample more completions or at a higher temperature, lower pairing.min_margin, or take a judge "
    "that tells them apart",
    "near_identical": "sample at a higher temperature, or raise pairing.max_similarity",
    "length": "raise pairing.max_length_ratio",
    "degenerate_chosen": "raise sampling.max_new_tokens, or set pairing.degenerate to keep",
    "no_answer": "set pairing.answer_column to a column with an answer that fits into the model's context",
    "too_old": "raise buffer.max_age",
}
_NO_MATCH = "set pairing.rule to one that matches them"


@dataclass(frozen=True, slots=True)
class PairYield:
    """From completions to pairs that are trained on.

    What is left of the completions is matched by the rule; `matched` is the sum of all that follow it, but
    for `made`, which is the sum of the last three.
    """

    completions: int
    unjudged: int = 0
    """Completions that the judge could not rate."""
    empty: int = 0
    """Completions without a token."""
    degenerate: int = 0
    identical: int = 0
    """Completions with the text of another one."""
    matched: int = 0
    """What the rule chose: two completions, or for unpaired, one."""
    tie: int = 0
    near_identical: int = 0
    length: int = 0
    degenerate_chosen: int = 0
    no_answer: int = 0
    made: int = 0
    too_old: int = 0
    """Pairs that no snapshot of this live version takes."""
    not_drawn: int = 0
    """Pairs that were not drawn for this round's snapshot, and may be for later ones."""
    kept: int = 0
    """Pairs of this round that it trains on itself."""

    @property
    def usable(self) -> int:
        """Completions that were left to the rule."""
        return self.completions - sum(getattr(self, name) for name in COMPLETION_LOSSES)

    @property
    def is_poor(self) -> bool:
        """Whether less than a tenth of the completions or of the matches remained, or no pair at all."""
        few_matched = self.usable < _POOR * self.completions
        return self.completions > 0 and (few_matched or self.made < max(_POOR * self.matched, 1))

    def metrics(self) -> dict[str, float]:
        return {f"{_PREFIX}{name}": count for name, count in asdict(self).items()}

    @classmethod
    def from_metrics(cls, row: Mapping[str, Any]) -> "PairYield":
        """Of a round's row; nothing but 0 of a round that did not count."""
        return cls(**{field.name: row.get(f"{_PREFIX}{field.name}", 0) for field in fields(cls)})

    def sentence(self) -> str:
        """What was lost on the way, and what remained."""
        completions = self._losses(*COMPLETION_LOSSES)
        matches = self._losses(*MATCH_LOSSES)
        return (
            f"of {self.completions} completions {self.usable} could be paired{completions}; "
            f"of {self.matched} matches {self.made} became pairs{matches}"
        )

    def advice(self) -> str:
        """What to change first where no pair is left."""
        losses = {name: getattr(self, name) for name in _ADVICE}
        return _ADVICE[max(losses, key=lambda name: losses[name])] if any(losses.values()) else _NO_MATCH

    def _losses(self, *names: str) -> str:
        lost = [f"{getattr(self, name)} {name.replace('_', ' ')}" for name in names if getattr(self, name)]
        return f" ({', '.join(lost)})" if lost else ""


@dataclass(frozen=True, slots=True)
class MadePairs:
    """A round's pairs, and what became of its completions."""

    pairs: list[Pair]
    counts: PairYield

    def in_snapshot(self, pair_ids: Collection[str], *, min_policy_version: int) -> PairYield:
        """The counts to their end: which of the pairs are in a snapshot, and why the others are not."""
        left_out = [pair for pair in self.pairs if pair.pair_id not in pair_ids]
        too_old = sum(pair.policy_version < min_policy_version for pair in left_out)
        return replace(
            self.counts,
            kept=len(self.pairs) - len(left_out),
            too_old=too_old,
            not_drawn=len(left_out) - too_old,
        )
