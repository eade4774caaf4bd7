"""What a vote says of which texts, and the pair that it makes."""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, assert_never

from dpo_ray.buffer.feedback import ServedCompletion, ShownAnswer, ShownPair
from dpo_ray.types import Pair, Text

Choice = Literal["first", "second", "tie", "both_bad"]
VoteKind = Literal["comparison", "record", "thumb"]


@dataclass(frozen=True, slots=True)
class Opinion:
    """One vote, but for the person."""

    kind: VoteKind
    subject: str
    """What was voted on: a person votes once on each."""
    choice: str
    versions: dict[str, int]
    """Which policy version wrote what was voted on."""
    texts_sha256: str
    """Votes on the same texts can agree, repeat or contradict each other."""
    prefers: str
    """Says what the vote prefers, equal in votes that agree; empty: nothing."""
    pair: Pair | None
    why: str = ""
    """Why there is no pair."""


def of_comparison(shown: ShownPair, choice: Choice) -> Opinion:
    """What a choice between two shown answers says."""
    first, second = shown.first, shown.second
    pair, why = None, ""
    match choice:
        case "first":
            pair, why = _pair(shown, first, second)
        case "second":
            pair, why = _pair(shown, second, first)
        case "tie" | "both_bad":
            why = f"{choice} prefers neither answer"
        case _:
            assert_never(choice)
    return Opinion(
        kind="comparison",
        subject=shown.comparison_id,
        choice=choice,
        versions={"first": first.policy_version, "second": second.policy_version},
        texts_sha256=sha256(shown.prompt, *sorted((first.text, second.text))),
        prefers="" if pair is None else sha256(_plain(pair.chosen)),
        pair=pair,
        why=why,
    )


def of_completion(served: ServedCompletion, *, is_good: bool) -> Opinion:
    """What a thumb says of one completion: it makes an unpaired pair."""
    answer, nothing = _as_answer(served.text, served.prompt), ("", ())
    liked, disliked = ((answer, served.token_ids), nothing)[:: 1 if is_good else -1]
    pair = Pair(
        prompt=served.prompt,
        chosen=liked[0],
        rejected=disliked[0],
        prompt_ids=served.prompt_ids,
        chosen_ids=liked[1],
        rejected_ids=disliked[1],
        chosen_logp=served.logp if is_good else None,
        rejected_logp=None if is_good else served.logp,
        policy_version=served.policy_version,
        source="human",
    )
    choice = "up" if is_good else "down"
    return Opinion(
        kind="thumb",
        subject=f"{served.completion_id} {served.index}",
        choice=choice,
        versions={"completion": served.policy_version},
        texts_sha256=sha256(served.prompt, served.text),
        prefers=choice,
        pair=pair,
    )


def of_record(pair: Pair) -> Opinion:
    """What a preference says that a person brings along."""
    chosen, rejected = _plain(pair.chosen), _plain(pair.rejected)
    return Opinion(
        kind="record",
        subject=sha256(pair.prompt, chosen, rejected),
        choice="chosen",
        versions={},
        texts_sha256=sha256(pair.prompt, *sorted((chosen, rejected))),
        prefers=sha256(chosen),
        pair=pair,
    )


def sha256(*parts: object) -> str:
    """Of what JSON can spell."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _pair(shown: ShownPair, chosen: ShownAnswer, rejected: ShownAnswer) -> tuple[Pair | None, str]:
    """The pair of two answers, or why they make none."""
    if chosen.text == rejected.text:
        return None, "both answers have the same text"
    if not (chosen.token_ids and rejected.token_ids):
        return None, "an answer has no tokens"
    pair = Pair(
        prompt=shown.prompt,
        chosen=_as_answer(chosen.text, shown.prompt),
        rejected=_as_answer(rejected.text, shown.prompt),
        prompt_ids=shown.prompt_ids,
        chosen_ids=chosen.token_ids,
        rejected_ids=rejected.token_ids,
        chosen_logp=chosen.logp,
        rejected_logp=rejected.logp,
        policy_version=min(chosen.policy_version, rejected.policy_version),
        source="human",
    )
    return pair, ""


def _as_answer(text: str, prompt: Text) -> Text:
    """In the form of its prompt: text after text, a message after messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _plain(text: Text) -> str:
    """What there is to read in an answer, be it text or a message."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)
