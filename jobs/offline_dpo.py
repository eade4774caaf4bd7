"""Offline DPO: train on preferences that are there already."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from dpo_ray.config import OfflineDPOConfig, parse_config

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from dpo_ray.preference_data import PairSet


def main(config: OfflineDPOConfig) -> None:
    """Read the pairs, bring up the trainers, train epoch by epoch, report."""
    from dpo_ray.offline import run_offline

    run_offline(config, read=lambda model: read_pairs(config, model))


def read_pairs(config: OfflineDPOConfig, model: Path | str) -> Iterable[PairSet]:
    """The pairs of the source, tokenized for `model`; in parts where Ray Data reads it."""
    from dpo_ray.losses import accepts_unpaired
    from dpo_ray.models import load_tokenizer
    from dpo_ray.preference_data import load_pairs

    unpaired_allowed = accepts_unpaired(config.training.loss)
    if config.read_with == "ray_data":
        from dpo_ray.ray_data import load_pairs_with_ray

        return load_pairs_with_ray(
            config.pairs,
            model=str(model),
            max_tokens=config.max_length,
            long_prompts=config.long_prompts,
            unpaired_allowed=unpaired_allowed,
        )
    pair_set = load_pairs(
        config.pairs,
        split=config.pairs_split,
        tokenizer=load_tokenizer(model),
        max_tokens=config.max_length,
        long_prompts=config.long_prompts,
        unpaired_allowed=unpaired_allowed,
    )
    return [pair_set]


if __name__ == "__main__":
    main(parse_config(OfflineDPOConfig, sys.argv[1:]))
