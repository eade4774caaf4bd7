"""The frozen values that flow from prompt to pair."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from typing_extensions import TypedDict


class Message(TypedDict):
    """One turn of a conversation, as OpenAI and TRL write it."""

    role: str
    content: str


Text = str | list[Message]
"""Plain text, or a list of messages: a prompt as its owner wrote it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy continues."""

    text: Text
    token_ids: tuple[int, ...]
    """What the sampler sees, chat template and special tokens included: never tokenized again."""
    fields: dict[str, object] = field(default_factory=dict)
    """The other columns of the prompt's row, for the judge (an answer key, say)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of the policy, with the version that gave it."""

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]
    """Generated ids, the end-of-sequence token included where the policy wrote one."""
    logp: float
    """Log-prob of `token_ids` under the sampling policy at temperature 1: summed, in nats."""
    policy_version: int
    """The version that wrote the last token."""
    finish_reason: str
    """`stop` where the policy ended by itself, `length` where `max_new_tokens` cut it off."""


class TokenSequence(NamedTuple):
    """A prompt and one completion of it, as token ids."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge says of one completion."""

    reward: float | None
    """Higher is better. None: the judge could not say, which is never a low score."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further measurements worth a curve, by name."""
    cost: float = 0.0
    """Money that it cost, in the judge's currency."""


@dataclass(frozen=True, slots=True)
class ScoredCompletion:
    """A completion and its judgement."""

    completion: Completion
    judgement: Judgement
    judge: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, one preferred; or one that was praised or blamed by itself.

    The side that unpaired feedback lacks has the text "" and no ids: a thumb up has no rejected
    completion, a thumb down no chosen one.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    chosen_logp: float | None = None
    """Summed log-prob under the policy that wrote it, in nats; None where no policy of ours did."""
    rejected_logp: float | None = None
    policy_version: int = 0
    round: int = 0
    source: str = "judge"
    judge: str = ""
    weight: float = 1.0
    """Weight of this pair's loss among the others': finite and above 0."""
    cost: float = 0.0
    """Money that the judgement cost, in the judge's currency."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight={self.weight} of a pair: give a finite number above 0")

    @property
    def is_unpaired(self) -> bool:
        return not (self.chosen_ids and self.rejected_ids)

    @property
    def pair_id(self) -> str:
        """Hash of what makes this pair this pair: its tokens and where they come from."""
        identity = (
            self.prompt_ids,
            self.chosen_ids,
            self.rejected_ids,
            self.policy_version,
            self.round,
            self.source,
            self.judge,
        )
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
