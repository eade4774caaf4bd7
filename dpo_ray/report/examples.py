"""What two versions answer to the same held-out prompts, sorted by how the reward changed."""

import random
from dataclasses import dataclass, replace

from dpo_ray.metrics import number
from dpo_ray.report.record import Row, RunRecord

_NUM_EXAMPLES, _NUM_BEST, _NUM_WORST = 12, 4, 3


@dataclass(frozen=True, slots=True)
class Example:
    """One held-out prompt with the first completion of each of two versions."""

    index: int
    prompt: str
    before: str
    after: str
    before_reward: float | None
    after_reward: float | None
    why: str = ""
    """Why this prompt is shown."""

    @property
    def change(self) -> float | None:
        """Reward after less reward before; None where the judge could not rate both."""
        if self.before_reward is None or self.after_reward is None:
            return None
        return self.after_reward - self.before_reward


def sorted_by_change(record: RunRecord, before: int, after: int) -> list[Example]:
    """The biggest gain first; at the end what the judge could not rate."""
    old, new = (_first_by_prompt(record.evaluations.get(version, [])) for version in (before, after))
    both = [_example(index, old[index], new[index]) for index in sorted(old.keys() & new.keys())]
    return sorted(both, key=lambda e: (e.change is None, -(e.change or 0.0)))


def chosen(examples: list[Example]) -> list[Example]:
    """About a dozen of those sorted by change: the biggest gains, the worst changes, others at random."""
    rated = [example for example in examples if example.change is not None]
    best = [example for example in rated[:_NUM_BEST] if (example.change or 0.0) > 0]
    worst = rated[len(best) :][-_NUM_WORST:][::-1]
    taken = {example.index for example in best + worst}
    others = sorted((e for e in examples if e.index not in taken), key=lambda e: e.index)
    count = min(len(others), _NUM_EXAMPLES - len(taken))
    drawn = sorted(random.Random(0).sample(others, count), key=lambda e: e.index)
    labelled = (("Biggest improvement", best), ("Drawn at random", drawn), ("Worst change", worst))
    return [replace(example, why=why) for why, group in labelled for example in group]


def ends(examples: list[Example], most: int) -> list[Example]:
    """At most `most` of those sorted by change: from both ends, the middle left out."""
    if len(examples) <= most:
        return examples
    return examples[: most - most // 2] + examples[len(examples) - most // 2 :]


def as_text(prompt: object) -> str:
    """A prompt for reading: text as it is, messages as `role: content` paragraphs."""
    if not isinstance(prompt, list):
        return str(prompt)
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _example(index: int, before: Row, after: Row) -> Example:
    return Example(
        index=index,
        prompt=as_text(before.get("prompt", "")),
        before=str(before.get("text", "")),
        after=str(after.get("text", "")),
        before_reward=number(before, "reward"),
        after_reward=number(after, "reward"),
    )


def _first_by_prompt(rows: list[Row]) -> dict[int, Row]:
    # Later rows must not replace earlier ones: picking a version's best answer would flatter it.
    return {row["index"]: row for row in reversed(rows)}
