"""What preference losses are compared with: RL on a reward, learned or true, best-of-n, unlikelihood."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import set_verbosity_error

from benchmarks.reproduce.language import (
    NUM_PROMPTS,
    SENTENCES,
    TRAINING,
    Language,
    exact_logps,
)
from dpo_ray.batching import PromptGroup, pair_groups
from dpo_ray.config import RewardModelConfig, TrainingConfig
from dpo_ray.judges.reward_model import load_reward_model, score_rows
from dpo_ray.judges.reward_training import Example, accuracy, train_reward_model
from dpo_ray.lm_head import CompletionSums
from dpo_ray.logprobs import CompletionScorer
from dpo_ray.models import make_scorer
from dpo_ray.rounds import RoundPlan
from dpo_ray.types import Pair


@dataclass(frozen=True, slots=True)
class Reinforce:
    """REINFORCE with a leave-one-out baseline (arXiv:2402.14740) on reward - beta log(policy / reference)."""

    rewards: Tensor
    """[P, S] what it is rewarded with."""
    beta: float
    num_draws: int = 32
    """Prompts in a step, each with `per_prompt` fresh completions."""
    per_prompt: int = 4
    learning_rate: float = 3e-3
    """At the first step; it falls linearly to 0."""
    steps: int = 400

    def train(self, language: Language, *, seed: int) -> Iterator[PreTrainedModel]:
        """The policy after each step."""
        scorer = make_scorer(language.folder, flat=False)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(scorer.parameters(), lr=self.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
        for _ in range(self.steps):
            logps = exact_logps(scorer.model)
            prompts = torch.arange(self.num_draws) % NUM_PROMPTS
            drawn = torch.multinomial(
                logps[prompts].exp(), self.per_prompt, replacement=True, generator=generator
            )
            advantages = leave_one_out(self.returns(language, logps, prompts, drawn))
            surrogate(scorer, prompts, drawn, advantages).backward()
            torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            yield scorer.model

    def returns(self, language: Language, logps: Tensor, prompts: Tensor, drawn: Tensor) -> Tensor:
        """[N, K] rewards less beta times the log-ratio to the reference, of [N, K] drawn sentences."""
        rows = prompts[:, None]
        return self.rewards[rows, drawn] - self.beta * (logps - language.reference)[rows, drawn]


def leave_one_out(returns: Tensor) -> Tensor:
    """[N, K] each return less the mean of its prompt's K - 1 others: what it is measured against has no part
    in it, so that the gradient's mean stays the same."""
    others = returns.shape[1] - 1
    return returns - (returns.sum(1, keepdim=True) - returns) / others


def surrogate(scorer: CompletionScorer, prompts: Tensor, drawn: Tensor, advantages: Tensor) -> Tensor:
    """[] whose gradient is the policy gradient's estimate, downhill."""
    groups = [
        PromptGroup((prompt,), tuple(map(tuple, SENTENCES[numbers].tolist())))
        for prompt, numbers in zip(prompts.tolist(), drawn, strict=True)
    ]

    def objective(some: range, sums: CompletionSums) -> Tensor:
        return -(advantages[list(some)].flatten() * sums.logp).sum() / advantages.numel()

    loss, _ = scorer(groups, objective)
    assert loss is not None
    return loss


def unlikelihood(
    language: Language, pairs: Sequence[Pair], *, alpha: float, epochs: int, seed: int
) -> Iterator[PreTrainedModel]:
    """Raise log pi(chosen), lower alpha log pi(rejected), as the DPO paper's baseline; after each step."""
    config = TrainingConfig.model_validate({**TRAINING, "epochs": epochs})
    scorer = make_scorer(language.folder, flat=False)
    optimizer = torch.optim.RMSprop(scorer.parameters(), lr=config.learning_rate)

    def objective(some: range, sums: CompletionSums) -> Tensor:
        chosen, rejected = sums.logp.view(-1, 2).unbind(1)
        return (alpha * rejected - chosen).mean()

    for batch in RoundPlan(pairs, seed=seed).batches(config):
        loss, _ = scorer(pair_groups(batch), objective)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield scorer.model


def learned_rewards(
    language: Language, pairs: Sequence[Pair], held_out: Sequence[Pair], *, seed: int
) -> tuple[Tensor, float]:
    """[P, S] rewards of a model that starts at the reference and learns from the pairs; held-out accuracy."""
    set_verbosity_error()  # That the head is new is known.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _ = load_reward_model(language.folder)
    model.config.pad_token_id = -1  # All rows are of one length, and every letter is one.
    config = RewardModelConfig(
        run_dir=str(language.folder / "reward"),
        pairs="",
        epochs=4,
        batch_size=64,
        learning_rate=3e-3,
        seed=seed,
    )
    train_reward_model(model, _examples(pairs), config, lambda done, total: None)
    rows = [[prompt, *ids] for prompt in range(NUM_PROMPTS) for ids in SENTENCES.tolist()]
    rewards = torch.tensor(score_rows(model, rows, batch_size=2048), dtype=torch.float64)
    right = accuracy(model, _examples(held_out), batch_size=2048)
    return rewards.view(NUM_PROMPTS, -1), right


def _examples(pairs: Sequence[Pair]) -> list[Example]:
    return [
        Example([*pair.prompt_ids, *pair.chosen_ids], [*pair.prompt_ids, *pair.rejected_ids], 0.0, 1.0)
        for pair in pairs
    ]


def best_of(logps: Tensor, rewards: Tensor, n: int) -> Tensor:
    """[P, S] log-probs of the best of n samples by [P, S] rewards; of equal ones the policy's odds decide.

    The best has a reward of at most r where all n do: its distribution is the n-th power of the policy's.
    """
    best = torch.stack([_best_of(*row, n) for row in zip(logps.exp(), rewards, strict=True)])
    return best.clamp(min=torch.finfo(best.dtype).tiny).log()


def _best_of(probabilities: Tensor, rewards: Tensor, n: int) -> Tensor:
    levels, level = rewards.unique(return_inverse=True)
    mass = torch.zeros_like(levels).index_add(0, level, probabilities)
    below = mass.cumsum(0) - mass
    grown = (below + mass) ** n - below**n
    return probabilities * (grown / mass)[level]
