"""What people's votes must satisfy before a round trains on them."""

from pydantic import Field

from dpo_ray.config.section import Section


class VotesConfig(Section):
    """How people vote on what the policy answers, and which votes become pairs.

    Votes wait in the buffer. A round takes those that satisfy these rules when it declares its snapshot.
    """

    min_wait_s: float = Field(default=10.0, ge=0)
    """Seconds that a vote waits at least, in which it can be undone."""
    min_trust: float = Field(default=0.0, ge=0, le=1)
    """Least trust of the person, as `python -m serve.tokens add --trust` gave it; votes below are refused."""
    weight_by_trust: bool = False
    """Weigh a pair's loss by the trust in the person who made it."""
    max_per_person_per_round: int | None = Field(default=None, ge=1)
    """Most votes of one person in one round, the oldest first; the others wait; unset: all."""
    min_agreement: float = Field(default=0.5, ge=0, le=1)
    """Least share of the people who voted on the same texts that must agree with a vote."""
    take_unpaired: bool = False
    """Train on thumbs too, where the loss takes single completions (kto, bco); until then they wait."""
    comparison_expires_s: float = Field(default=3600.0, gt=0)
    """Seconds in which a comparison can be voted on."""
    served_kept: int = Field(default=10_000, ge=0)
    """Latest completions of labelers that are kept for their thumbs; 0: none."""
