"""Which prompts are shown side by side: the clearest wins and losses, and others by chance."""

import random
from dataclasses import dataclass

from dpo_ray.evaluating.duels import reward_gain
from dpo_ray.evaluating.outcome import Outcome
from dpo_ray.evaluating.samples import Sample
from dpo_ray.evaluation import mean
from dpo_ray.judges.llm import as_transcript

_EACH = 4


@dataclass(frozen=True, slots=True)
class Side:
    """One policy's first completion of a prompt."""

    policy: str
    text: str
    remark: str
    """What the judge says of it, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Example:
    """All policies on one prompt."""

    why: str
    prompt: str
    sides: list[Side]


def examples(outcome: Outcome) -> list[Example]:
    """At most a dozen prompts, by how much all other policies together gain over the baseline."""
    gains = _gains(outcome)
    ranked = sorted(gains, key=lambda prompt: -gains[prompt])
    won = [prompt for prompt in ranked[:_EACH] if gains[prompt] > 0]
    lost = [prompt for prompt in ranked[::-1][:_EACH] if gains[prompt] < 0]
    others = [prompt for prompt in range(len(outcome.prompts)) if prompt not in {*won, *lost}]
    drawn = sorted(random.Random(0).sample(others, min(_EACH, len(others))))
    labelled = (("Clearest win", won), ("Drawn at random", drawn), ("Clearest loss", lost))
    return [_example(outcome, prompt, why) for why, prompts in labelled for prompt in prompts]


def _gains(outcome: Outcome) -> dict[int, float]:
    """Of each prompt, the mean gain of the completions that are shown."""
    gains: dict[int, list[float]] = {}
    for contests in outcome.verdicts.contests.values():
        for ours, theirs in ((contest.ours, contest.theirs) for contest in contests):
            gain = reward_gain(ours, theirs)
            if gain is not None and ours.sample.number == theirs.sample.number == 0:
                gains.setdefault(ours.sample.prompt, []).append(gain)
    return {prompt: mean(of_prompt) for prompt, of_prompt in gains.items()}


def _example(outcome: Outcome, prompt: int, why: str) -> Example:
    firsts = [
        (policy, next(each for each in samples if each.prompt == prompt))
        for policy, samples in outcome.samples.items()
    ]
    sides = [
        Side(policy, _text(sample), ", ".join(_remarks(outcome, policy, sample))) for policy, sample in firsts
    ]
    return Example(why, as_transcript(outcome.prompts[prompt].text), sides)


def _text(sample: Sample) -> str:
    return sample.completion.text if sample.completion else f"(none: {sample.error})"


def _remarks(outcome: Outcome, policy: str, sample: Sample) -> list[str]:
    place = (sample.prompt, sample.number)
    reward, share = outcome.rewards(policy).get(place), outcome.win_shares(policy).get(place)
    remarks = [] if reward is None else [f"reward {reward:.3g}"]
    if share is not None:
        remarks.append("wins" if share > 0.5 else "loses" if share < 0.5 else "tie")
    return [*remarks, sample.flaw] if sample.completion and sample.flaw else remarks
