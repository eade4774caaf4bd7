"""Supervised fine-tuning: DPO is only as good as the policy that it starts from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from dpo_ray.config import SFTConfig, parse_config

if TYPE_CHECKING:
    from pathlib import Path

    from dpo_ray.preference_data import PairSet


def main(config: SFTConfig) -> None:
    """Read the texts, bring up the trainers, train epoch by epoch, report."""
    from dpo_ray.offline import run_offline

    run_offline(config, read=lambda model: [read_texts(config, model)])


def read_texts(config: SFTConfig, model: Path | str) -> PairSet:
    """What there is to imitate, tokenized for `model`."""
    from dpo_ray.models import load_tokenizer
    from dpo_ray.sft_data import load_texts

    return load_texts(
        config.texts,
        split=config.texts_split,
        tokenizer=load_tokenizer(model),
        max_tokens=config.max_length,
        long_prompts=config.long_prompts,
    )


if __name__ == "__main__":
    main(parse_config(SFTConfig, sys.argv[1:]))
