"""A loss of your own: any function of a batch's log-probs, tried on a small model without a job.

python examples/custom_loss.py [--model FOLDER_OR_HUB_NAME] [--pairs FILE_OR_NAME] [--steps 20]

The model runs as in a job, on flat rows and with the fused head. A job takes its losses from the settings:
ARCHITECTURE.md says where to add yours to them.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.batching import pair_groups
from dpo_ray.lm_head import CompletionSums
from dpo_ray.losses import PairLogps
from dpo_ray.models import load_tokenizer, make_scorer
from dpo_ray.pair_batch import PairBatch
from dpo_ray.preference_data import load_pairs
from dpo_ray.starter import make_starter
from dpo_ray.types import Pair


def squared_hinge_loss(logps: PairLogps, *, beta: float) -> Tensor:
    """[B] losses: max(0, 1 - beta margin)^2, which pulls less at a pair that is nearly there."""
    return F.relu(1 - beta * logps.margin) ** 2


def train(
    model: Path | str, pairs: Sequence[Pair], *, steps: int, beta: float = 0.1, learning_rate: float = 1e-4
) -> Iterator[float]:
    """Mean loss before each step on all pairs; the reference is the model as it was."""
    scorer, groups = make_scorer(model), pair_groups(pairs)
    with torch.no_grad():
        reference = scorer(groups)[1].logp.view(-1, 2)
    batch = PairBatch(
        pairs, [(chosen, rejected) for chosen, rejected in reference.tolist()], scorer.model.device
    )

    def objective(some: range, sums: CompletionSums) -> Tensor:
        # Called for as many pairs as the head holds at a time, so that what it gives must add up.
        return squared_hinge_loss(batch.logps(some, sums), beta=beta).sum() / len(pairs)

    optimizer = torch.optim.AdamW(scorer.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        loss, _ = scorer(groups, objective)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the loss before each step."""
    options = _parse_options(arguments)
    model = options.model or make_starter(0, lambda step, total, loss: None)
    pairs = load_pairs(options.pairs, split="train", tokenizer=load_tokenizer(model), max_tokens=512).pairs
    for step, loss in enumerate(train(model, pairs[: options.batch_size], steps=options.steps), start=1):
        print(f"step {step}: loss {loss:.4f}")


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="what to train (unset: the tiny model of film reviews)")
    parser.add_argument("--pairs", default="film_reviews", help="file or data set of pairs (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="pairs, all in each step (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
