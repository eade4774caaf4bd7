"""Scored completions whose tokens are their characters, and the pairs made of them."""

from dpo_ray.config import PairingConfig
from dpo_ray.pairing import make_pairs
from dpo_ray.types import Completion, Judgement, Pair, Prompt, ScoredCompletion, Text


def scored(
    text: str,
    reward: float | None,
    *,
    prompt: Text = "Q",
    token_ids: tuple[int, ...] | None = None,
    version: int = 3,
    judge: str = "taste",
    end: str = "stop",
    cost: float = 0.0,
) -> ScoredCompletion:
    ids = tuple(map(ord, text)) if token_ids is None else token_ids
    asked = Prompt(prompt, tuple(map(ord, str(prompt))))
    completion = Completion(asked, text, ids, logp=-len(text), policy_version=version, finish_reason=end)
    return ScoredCompletion(completion, Judgement(reward, cost=cost), judge)


def config(rule: str = "best_vs_worst", **settings: object) -> PairingConfig:
    return PairingConfig.model_validate({"rule": rule, **settings})


def pairs_of(candidates: list[ScoredCompletion], pairing: PairingConfig, *, round_: int = 0) -> list[Pair]:
    return make_pairs(candidates, pairing, round_=round_, seed=0).pairs


def texts(pairs: list[Pair]) -> list[tuple[Text, Text]]:
    return [(pair.chosen, pair.rejected) for pair in pairs]
