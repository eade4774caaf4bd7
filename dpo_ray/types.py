"""The frozen values that flow from prompt to pair, and of a version on its way."""

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
    reason: str = ""
    """Why there is no reward, where that is known: `budget`, or what failed."""


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
    author: str = ""
    """The person whose vote it is."""
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
        author = (self.author,) if self.author else ()
        identity = (
            self.prompt_ids,
            self.chosen_ids,
            self.rejected_ids,
            self.policy_version,
            self.round,
            self.source,
            self.judge,
            *author,
        )
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Stream:
    """Where sender and receivers of a version meet; whoever is missing, nobody waits for over a minute."""

    version: int
    part: str
    """The subfolder that is sent; empty: all of it."""
    host: str
    port: int
    receivers: tuple[str, ...]
    """By name, in the order of their ranks; the sender is rank 0."""
    device: str
    """`cuda` where all have a GPU of their own, else `cpu`."""

    @property
    def world_size(self) -> int:
        return 1 + len(self.receivers)

    def rank(self, receiver: str) -> int:
        return 1 + self.receivers.index(receiver)
