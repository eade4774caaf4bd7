"""Where preferences are kept, and which of them a round trains on."""

from pydantic import Field

from dpo_ray.config.section import Section


class BufferConfig(Section):
    """Where pairs are kept, and which of them a round trains on."""

    url: str | None = None
    """SQLAlchemy URL of the store; unset: buffer.sqlite in the run's folder."""
    pairs_per_round: int = Field(default=256, ge=1)
    """Most pairs in one round's snapshot; more are drawn at random."""
    max_age: int | None = Field(default=None, ge=0)
    """Oldest pairs a round may train on, in policy versions; unset: all."""
