"""Where preferences are kept, and which of them a round trains on."""

import re

from pydantic import Field, field_serializer, field_validator

from dpo_ray.config.section import Section


class BufferConfig(Section):
    """Where pairs are kept, and which of them a round trains on."""

    url: str | None = None
    """URL of the store, sqlite:///… or postgresql://…; unset: buffer.sqlite in the run's folder."""
    pairs_per_round: int = Field(default=256, ge=1)
    """Most pairs in one round's snapshot; more are drawn at random."""
    max_age: int | None = Field(default=None, ge=0)
    """Oldest pairs a round may train on, in policy versions; unset: all."""
    mix: dict[str, float] = Field(default={})
    """Shares of a snapshot by source, as {"human": 2, "judge": 1}: 1 where not named, 0 leaves one out."""
    freshness_half_life: float | None = Field(default=None, gt=0)
    """With each so many policy versions of age, a pair is half as likely to be drawn; unset: all alike."""
    max_pairs_per_prompt: int | None = Field(default=None, ge=1)
    """Most pairs of one prompt in a snapshot; unset: all."""
    max_author_share: float = Field(default=0.25, gt=0, le=1)
    """Most that one person's votes may fill of a snapshot's places, or of those that mix gives to votes."""
    retention_rounds: int | None = Field(default=None, ge=0)
    """Pairs older than this many rounds are deleted once a round's snapshot is declared; unset: kept."""

    @field_validator("mix")
    @classmethod
    def _check_mix(cls, mix: dict[str, float]) -> dict[str, float]:
        if mix and (min(mix.values()) < 0 or max(mix.values()) == 0):
            raise ValueError(f"{mix}: give numbers of at least 0, and one above it")
        return mix

    @field_serializer("url", when_used="json")
    def _without_password(self, url: str | None) -> str | None:
        """What is written of it: a run's folder is read by others."""
        if url is None:
            return None
        return re.sub(r"([?&]password=)[^&]*", r"\1***", re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url))
