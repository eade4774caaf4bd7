"""A reward model from preference pairs, on one device: a judge that has learned what people prefer."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from dpo_ray.config import RewardModelConfig, exit_with, parse_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from dpo_ray.judges.reward_training import Example
    from dpo_ray.terminal import Terminal


def main(config: RewardModelConfig) -> None:
    """Read the pairs, train, measure on pairs that were kept apart, save."""
    from dpo_ray.terminal import Terminal

    try:
        accuracy = train(config, Terminal())
    except (ValueError, FileNotFoundError) as error:
        exit_with(str(error))
    print(f"held-out accuracy {accuracy:.3f} · --judge.kind reward_model --judge.model {config.run_dir}")


def train(config: RewardModelConfig, terminal: Terminal) -> float:
    """Accuracy on held-out pairs; the model is in `config.run_dir`. ValueError: a setting cannot be used."""
    import torch
    from transformers.utils.logging import set_verbosity_error

    from dpo_ray.judges.reward_model import load_reward_model
    from dpo_ray.judges.reward_training import accuracy, train_reward_model
    from dpo_ray.storage import Storage

    folder = Storage(config.run_dir).local_root
    if folder is None:
        raise ValueError(f"run_dir={config.run_dir} is a URL, and the model is saved as files: give a path")
    torch.manual_seed(config.seed)
    set_verbosity_error()  # That the head is new is known.
    model, tokenizer = load_reward_model(starting_model(config, terminal))
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    examples, held_out = read_examples(config, tokenizer, terminal)
    with terminal.phase("train", f"train on {len(examples)} pairs") as on_progress:
        train_reward_model(model, examples, config, on_progress)
    measured = accuracy(model, held_out, batch_size=config.batch_size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {"held_out_accuracy": measured, "pairs": len(examples), "held_out_pairs": len(held_out)}
    (folder / "training.json").write_text(json.dumps(facts | config.model_dump(mode="json"), indent=2))
    return measured


def starting_model(config: RewardModelConfig, terminal: Terminal) -> Path | str:
    """The folder or hub name that training starts from."""
    from dpo_ray.starter import make_starter

    if config.model != "film_reviews":
        return config.model
    with terminal.phase("start", "make the tiny starting model (once, then cached)") as on_progress:
        return make_starter(config.seed, lambda step, total, loss: on_progress(step, total))


def read_examples(
    config: RewardModelConfig, tokenizer: PreTrainedTokenizerBase, terminal: Terminal
) -> tuple[Sequence[Example], Sequence[Example]]:
    """What to train on, and what is held out."""
    import random

    from dpo_ray.judges.reward_training import make_example
    from dpo_ray.preference_data import load_pairs

    pair_set = load_pairs(
        config.pairs, split=config.pairs_split, tokenizer=tokenizer, max_tokens=config.max_length
    )
    terminal.say(f"{len(pair_set.pairs)} pairs, left out {pair_set.dropped or 0}")
    examples = [make_example(pair, tokenizer, margin=config.margin) for pair in pair_set.pairs]
    random.Random(config.seed).shuffle(examples)
    if len(examples) <= config.held_out_pairs:
        raise ValueError(
            f"{len(examples)} pairs are too few to hold {config.held_out_pairs} out: lower held_out_pairs"
        )
    return examples[config.held_out_pairs :], examples[: config.held_out_pairs]


if __name__ == "__main__":
    main(parse_config(RewardModelConfig, sys.argv[1:]))
