"""Scored completions to pairs: rules, filters, and what came of all completions."""

from dpo_ray.pairing.answers import Answer, AnswerReader
from dpo_ray.pairing.making import make_pairs
from dpo_ray.pairing.rules import PairingError, PairRule, load_rule
from dpo_ray.pairing.yields import MadePairs, PairYield

__all__ = [
    "Answer",
    "AnswerReader",
    "MadePairs",
    "PairRule",
    "PairYield",
    "PairingError",
    "load_rule",
    "make_pairs",
]
