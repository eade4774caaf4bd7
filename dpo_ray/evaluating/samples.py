"""What one policy gave to one prompt, once."""

from dataclasses import dataclass, replace

from dpo_ray.evaluation import Flaw, flaw
from dpo_ray.types import Completion


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion, or why there is none."""

    prompt: int
    """Which one: the same number is the same prompt for every policy."""
    number: int
    """Which of the policy's samples of that prompt."""
    completion: Completion | None
    num_tokens: int | None = None
    """Of the completion; None where an endpoint does not count them."""
    error: str = ""
    kl: float | None = None
    """KL to the baseline in nats, summed over the tokens, each over the whole vocabulary."""
    logp_gain: float | None = None
    """Log-prob under the policy less that under the baseline, in nats: its mean is the sampled KL."""

    @property
    def flaw(self) -> Flaw:
        """Why it is degenerate; of an endpoint's completion, words stand for the tokens."""
        assert self.completion is not None
        if self.completion.token_ids:
            return flaw(self.completion)
        words = self.completion.text.split()
        numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        return flaw(replace(self.completion, token_ids=tuple(numbers[word] for word in words)))
