"""Which completions make a pair."""

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from dpo_ray.config.section import Section

MatchingRule = Literal["best_vs_worst", "all_pairs", "best_vs_random", "random_pair", "best_vs_two_sigma"]
"""Rules that pair completions with each other."""
RuleName = Literal[MatchingRule, "answer_vs_worst", "unpaired"]


class PairingConfig(Section):
    """How scored completions become pairs."""

    rule: str = "best_vs_worst"
    """Which completions of one prompt are paired: best_vs_worst, all_pairs, best_vs_random, random_pair,
    best_vs_two_sigma (the rejected is nearest to mean - 2 standard deviations, arXiv:2502.16825),
    answer_vs_worst (the row's own answer is chosen), unpaired (single completions, praised or blamed, for
    kto and bco), or a function of yours, module:function."""
    answer_column: str | None = None
    """answer_vs_worst: the column of a prompt's row that has its answer."""
    threshold: float | None = None
    """unpaired: a higher reward is praise, a lower one blame; unset: the mean of the prompt's rewards."""
    min_margin: float = Field(default=0.0, ge=0.0)
    """Pairs whose rewards differ by this much or less are dropped as ties; unpaired: from the threshold."""
    max_similarity: float | None = Field(default=None, ge=0, lt=1)
    """Most that two sides may have in common, as a share of their tokens, in order; unset: no bound."""
    max_length_ratio: float | None = Field(default=None, ge=1)
    """Most tokens of the longer side, as a multiple of the shorter one's; unset: no bound."""
    degenerate: Literal["keep", "reject_only", "drop"] = "keep"
    """Completions that are empty, cut off or loops: keep takes them as any other, reject_only never as
    the chosen side, drop not at all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [name for group in get_args(RuleName) for name in (get_args(group) or (group,))]
        if self.rule not in names and ":" not in self.rule:
            raise ValueError(
                f"rule={self.rule} is no rule: take {', '.join(names)}, or your own as module:function"
            )
        if (self.rule == "answer_vs_worst") != (self.answer_column is not None):
            raise ValueError(
                f"rule={self.rule} and answer_column={self.answer_column}: answer_vs_worst needs the column "
                "that has the answer, and no other rule reads it"
            )
        for name, readers in self._unread().items():
            if getattr(self, name) != PairingConfig.model_fields[name].default:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not read by rule={self.rule}: "
                    f"unset it, or take {readers}"
                )
        return self

    def _unread(self) -> dict[str, str]:
        """Settings that the rule does not read, and who does."""
        match self.rule:
            case "unpaired":
                return dict.fromkeys(("max_similarity", "max_length_ratio"), "a rule that compares two")
            case "answer_vs_worst":
                return {"threshold": "unpaired", "min_margin": "a rule whose two sides have rewards"}
            case _:
                return {"threshold": "unpaired"}
