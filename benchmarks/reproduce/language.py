"""A language of few enough sentences to add them all up: rewards, KLs and the best trade are exact."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dpo_ray.config import TrainingConfig
from dpo_ray.learner import Learner
from dpo_ray.models import load_model, save_policy
from dpo_ray.parallel import Peers
from dpo_ray.rounds import RoundPlan, train_round
from dpo_ray.types import Completion, Judgement, Pair, Prompt, ScoredCompletion

LETTERS = "abcde"
LENGTH = 5
"""Letters in every completion: there is no end-of-sequence token to wait for."""
NUM_PROMPTS = 4
"""Prompt k is the letter number k."""
SENTENCES = torch.cartesian_prod(*[torch.arange(len(LETTERS))] * LENGTH)
"""[S, T] all completions that there are, in alphabetical order."""
TRAINING: dict[str, Any] = {
    "workers": 1,
    "packing": False,  # Rows are of one length: padded ones hold nothing else, and cost less.
    "tokens_per_pass": 1 << 20,
    "reference": {"keep_logps": False},
    "optimizer": "rmsprop",
    "learning_rate": 5e-4,
    "batch_size": 64,
}
"""Settings that all reproductions share, where they name no others."""


class Point(NamedTuple):
    """What a policy costs and what it earns, as means over the prompts."""

    kl: float
    """KL of the sentence's distribution to the reference, in nats."""
    reward: float


@dataclass(frozen=True, slots=True)
class Language:
    """S sentences after each of P prompts, their rewards, and a reference policy that writes them."""

    folder: Path
    """The reference policy, as transformers and the learner load it."""
    rewards: Tensor
    """[P, S] half the sum of the rewards of neighbouring letters."""
    corpus: Tensor
    """[P, S] log-probs of the texts that the reference imitates."""
    reference: Tensor
    """[P, S] log-probs under the reference."""

    def point(self, logps: Tensor) -> Point:
        """Where a policy with these [P, S] log-probs stands."""
        probabilities = logps.exp()
        kl = (probabilities * (logps - self.reference)).sum(1).mean()
        return Point(kl.item(), (probabilities * self.rewards).sum(1).mean().item())

    def optimum(self, beta: float) -> Tensor:
        """[P, S] log-probs of the policy with the greatest reward - beta KL. Eq. 4 of arXiv:2305.18290."""
        return (self.reference + self.rewards / beta).log_softmax(1)

    def frontier(self, kl: float) -> float:
        """The greatest reward that any policy can have at this KL."""
        low, high = -10.0, 10.0  # Of log beta: of all its optima, the one with this KL is found by halving.
        for _ in range(60):
            middle = (low + high) / 2
            if self.point(self.optimum(10**middle)).kl > kl:
                low = middle
            else:
                high = middle
        return self.point(self.optimum(10**high)).reward

    def gap(self, point: Point) -> float:
        """How far a point lies below the frontier, in reward."""
        return self.frontier(point.kl) - point.reward

    def learner(self, **settings: Any) -> Learner:
        """A learner that starts at the reference; `settings` change those of `TRAINING`."""
        return Learner(
            self.folder, self.folder, TrainingConfig.model_validate({**TRAINING, **settings}), Peers()
        )

    def sample(
        self, logps: Tensor, *, num_prompts: int, per_prompt: int, generator: torch.Generator
    ) -> list[ScoredCompletion]:
        """What a policy with these log-probs writes, `per_prompt` in a row for each draw of a prompt."""
        scored = []
        for draw in range(num_prompts):
            prompt = draw % NUM_PROMPTS
            drawn = torch.multinomial(
                logps[prompt].exp(), per_prompt, replacement=True, generator=generator
            ).tolist()
            scored += [self._scored(prompt, number, logps[prompt, number].item()) for number in drawn]
        return scored

    def _scored(self, prompt: int, number: int, logp: float) -> ScoredCompletion:
        token_ids = tuple(SENTENCES[number].tolist())
        completion = Completion(
            Prompt(LETTERS[prompt], (prompt,)), spell(token_ids), token_ids, logp, 0, "stop"
        )
        return ScoredCompletion(completion, Judgement(self.rewards[prompt, number].item()), "true reward")


class Measured(NamedTuple):
    """A policy after some steps."""

    step: int
    point: Point
    metrics: dict[str, float]
    """Of the step, and of held-out pairs where they were looked at."""
    logps: Tensor
    """[P, S] log-probs of the policy."""


def build(seed: int, folder: Path, *, sft_steps: int = 400) -> Language:
    """A language of its own for each seed; the reference is trained on its texts and left in `folder`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_PROMPTS, len(LETTERS), len(LETTERS))
    rewards, transitions = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    corpus = _neighbour_sums(transitions.log_softmax(-1))
    _save_random(folder / "random", seed)
    model = _imitate(folder, corpus, steps=sft_steps, generator=generator) if sft_steps else None
    save_policy(model or load_model(folder / "random"), _tokenizer(), folder)
    return Language(folder, _neighbour_sums(rewards) / 2, corpus, exact_logps(load_model(folder)))


@torch.no_grad()
def exact_logps(model: PreTrainedModel) -> Tensor:
    """[P, S] log-probs of all sentences after each prompt, in float64."""
    rows = torch.cartesian_prod(torch.arange(NUM_PROMPTS), *[torch.arange(len(LETTERS))] * (LENGTH - 1))
    log_probs = model(input_ids=rows, use_cache=False).logits.double().log_softmax(-1)
    before_last = log_probs[:, :-1].gather(-1, rows[:, 1:, None]).squeeze(-1).sum(-1)
    return (before_last[:, None] + log_probs[:, -1]).view(NUM_PROMPTS, -1)


def train(language: Language, learner: Learner, plan: RoundPlan, *, every: int) -> list[Measured]:
    """One round of the learner, measured every so many steps and where it ended."""
    trace: list[Measured] = []

    def measure(metrics: dict[str, float], num_steps: int) -> None:
        seen.append(metrics)
        if len(seen) % every == 0:
            trace.append(measured(metrics))

    def measured(metrics: dict[str, float]) -> Measured:
        logps = exact_logps(learner.model)
        return Measured(learner.step, language.point(logps), metrics, logps)

    seen: list[dict[str, float]] = []
    train_round(learner, plan, on_step=measure)
    return [*trace, measured(seen[-1])]


def spell(token_ids: Sequence[int]) -> str:
    return " ".join(LETTERS[token] for token in token_ids)


def sentence_number(token_ids: Sequence[int]) -> int:
    """Where a completion stands in `SENTENCES`."""
    number = 0
    for token in token_ids:
        number = number * len(LETTERS) + token
    return number


def _neighbour_sums(table: Tensor) -> Tensor:
    """[P, S] sums over each sentence, its prompt in front, of a [P, V, V] table's entries of neighbours."""
    sums = []
    for prompt in range(NUM_PROMPTS):
        letters = torch.cat([torch.full((len(SENTENCES), 1), prompt), SENTENCES], dim=1)
        sums.append(table[prompt][letters[:, :-1], letters[:, 1:]].sum(1))
    return torch.stack(sums)


def _imitate(folder: Path, corpus: Tensor, *, steps: int, generator: torch.Generator) -> PreTrainedModel:
    """A policy that has seen `steps` batches of fresh texts, by the likelihood loss of the learner."""
    settings = {**TRAINING, "loss": {"type": "sft"}, "optimizer": "adamw", "learning_rate": 3e-3}
    config = TrainingConfig.model_validate({**settings, "schedule": "linear"})
    learner = Learner(folder / "random", folder / "random", config, Peers())
    drawn = torch.multinomial(
        corpus.exp(), steps * config.batch_size // NUM_PROMPTS, replacement=True, generator=generator
    )
    texts = [_text(prompt, number) for column in drawn.T.tolist() for prompt, number in enumerate(column)]
    train_round(learner, RoundPlan(texts, seed=0), on_step=lambda metrics, num_steps: None)
    return learner.model


def _text(prompt: int, number: int) -> Pair:
    token_ids = tuple(SENTENCES[number].tolist())
    return Pair(LETTERS[prompt], spell(token_ids), "", (prompt,), token_ids, ())


def _save_random(folder: Path, seed: int) -> None:
    config = Qwen3Config(
        vocab_size=len(LETTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=LENGTH + 1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_policy(Qwen3ForCausalLM(config), _tokenizer(), folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter; the last also stands for the end, which no completion waits for."""
    backend = Tokenizer(
        models.WordLevel({letter: n for n, letter in enumerate(LETTERS)}, unk_token=LETTERS[0])
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=LETTERS[-1])
