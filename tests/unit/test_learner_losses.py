"""Every kind of loss has the textbook's value and gradient, however its batch is divided into passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learners import first_step, make_learner
from textbook import (
    assert_same_gradient,
    gradient,
    load_plain,
    log_probs,
    make_pairs,
    pair_logps,
    token_logps,
)
from torch import Tensor
from transformers import PreTrainedModel

from dpo_ray.batching import PromptGroup
from dpo_ray.types import Pair

BETA = 0.1
PAIRS = [replace(pair, weight=weight) for pair, weight in zip(make_pairs(5), (1, 2, 0.5, 1, 1), strict=True)]


@dataclass
class Book:
    """A batch under policy and reference, by the textbook; w is the chosen, l the rejected."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    pairs: Sequence[Pair]

    def __post_init__(self) -> None:
        self.groups = [
            PromptGroup(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in self.pairs
        ]
        self.lw, self.ll = pair_logps(self.policy, self.pairs)
        with torch.no_grad():
            self.rw, self.rl = pair_logps(self.reference, self.pairs)
        self.hw, self.hl = self.lw - self.rw, self.ll - self.rl
        self.nw = torch.tensor([len(pair.chosen_ids) for pair in self.pairs])
        self.nl = torch.tensor([len(pair.rejected_ids) for pair in self.pairs])

    def per_token(self, measure: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """[B] and [B] sums over tokens of what is measured of both [n, V] log-probs."""
        with torch.no_grad():
            theirs = log_probs(self.reference, self.groups)
        ours = log_probs(self.policy, self.groups)
        sums = torch.stack([measure(*both).sum() for both in zip(ours, theirs, strict=True)])
        return sums[::2], sums[1::2]

    def kls(self) -> tuple[Tensor, Tensor]:
        """KL(reference || policy) at each token."""
        return self.per_token(lambda ours, theirs: (theirs.exp() * (theirs - ours)).sum(-1))

    def mismatched(self) -> Tensor:
        """[B] log-ratio of each prompt with the next pair's chosen answer, the last with the first's."""
        others = [*self.pairs[1:], self.pairs[0]]
        groups = [
            PromptGroup(pair.prompt_ids, (other.chosen_ids,))
            for pair, other in zip(self.pairs, others, strict=True)
        ]
        ours, theirs = token_logps(self.policy, groups), token_logps(self.reference, groups)
        return torch.stack([a.sum() - b.sum() for a, b in zip(ours, theirs, strict=True)]).detach()


def sigmoid(book: Book) -> Tensor:
    return -F.logsigmoid(BETA * (book.hw - book.hl))


def simpo(book: Book) -> Tensor:
    return -F.logsigmoid(BETA * (book.lw / book.nw - book.ll / book.nl) - 0.5)


def tdpo1(book: Book) -> Tensor:
    kw, kl = book.kls()
    return -F.logsigmoid(BETA * (book.hw - book.hl) - BETA * (kl - kw))


def tdpo2(book: Book) -> Tensor:
    kw, kl = book.kls()
    return -F.logsigmoid(BETA * (book.hw - book.hl) - BETA * 0.5 * (kl - kw.detach()))


def kto(book: Book) -> Tensor:
    z0 = book.mismatched().mean().clamp(min=0)
    desirable = 1 - torch.sigmoid(BETA * (book.hw - z0))
    return (desirable + 1 - torch.sigmoid(BETA * (z0 - book.hl))) / 2


def bco(book: Book) -> Tensor:
    delta = (BETA * torch.cat([book.hw, book.hl])).mean().detach()
    return -F.logsigmoid(BETA * book.hw - delta) - F.logsigmoid(delta - BETA * book.hl)


def aot(book: Book) -> Tensor:
    policy, reference = (book.lw - book.ll).sort().values, (book.rw - book.rl).sort().values
    return -F.logsigmoid(BETA * (policy - reference))


def aot_unpaired(book: Book) -> Tensor:
    return -F.logsigmoid(BETA * (book.hw.sort().values - book.hl.sort().values))


def wpo(book: Book) -> Tensor:
    sw, sl = book.per_token(lambda ours, _: ours.exp().square().sum(-1).log())
    weight = ((book.lw - sw) / book.nw).exp() * ((book.ll - sl) / book.nl).exp()
    return sigmoid(book) * weight.detach()


def ld(book: Book) -> Tensor:
    """Tokens beyond the shorter answer's length count a quarter."""
    ours, theirs = token_logps(book.policy, book.groups), token_logps(book.reference, book.groups)
    shared = torch.minimum(book.nw, book.nl).repeat_interleave(2).tolist()
    h = [
        (a - b.detach())[:n].sum() + 0.25 * (a - b.detach())[n:].sum()
        for a, b, n in zip(ours, theirs, shared, strict=True)
    ]
    return -F.logsigmoid(BETA * (torch.stack(h[::2]) - torch.stack(h[1::2])))


LOSSES: dict[str, tuple[Callable[[Book], Tensor], dict[str, Any]]] = {
    "sigmoid": (sigmoid, {}),
    "simpo": (simpo, {"type": "simpo"}),
    "tdpo1": (tdpo1, {"type": "tdpo1"}),
    "tdpo2": (tdpo2, {"type": "tdpo2"}),
    "kto": (kto, {"type": "kto"}),
    "bco": (bco, {"type": "bco"}),
    "aot": (aot, {"type": "aot"}),
    "aot_unpaired": (aot_unpaired, {"type": "aot_unpaired"}),
    "wpo": (wpo, {"weighting": "wpo"}),
    "ld": (ld, {"ld_alpha": 0.25}),
}
DIVISIONS: list[dict[str, Any]] = [
    {},
    {"tokens_per_pass": 20},
    {"tokens_per_pass": 1},
    {"packing": False, "tokens_per_pass": 40},
    {"activation_checkpointing": True, "tokens_per_pass": 40},
]


@pytest.mark.parametrize("division", DIVISIONS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_the_textbooks(
    tiny_model: Path, near_model: Path, name: str, division: dict[str, Any]
) -> None:
    formula, loss = LOSSES[name]
    policy = load_plain(near_model)
    book = Book(policy, load_plain(tiny_model), PAIRS)
    expected = (formula(book) * torch.tensor([pair.weight for pair in PAIRS])).mean()
    expected.backward()
    metrics, ours = first_step(near_model, tiny_model, PAIRS, loss=loss, **division)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert_same_gradient(ours, gradient(policy))
    assert metrics["grad_norm"] == pytest.approx(gradient(policy).norm().item(), rel=1e-5)


UP, DOWN, BOTH = make_pairs(3, seed=1), make_pairs(2, seed=2), make_pairs(1, seed=3)
ONE_SIDED = [
    *(replace(pair, rejected_ids=()) for pair in UP),
    *(replace(pair, chosen_ids=()) for pair in DOWN),
    *BOTH,
]
"""Three thumbs up, two thumbs down, and a pair."""


@dataclass
class OneSidedBook:
    """The log-ratios of a batch whose rows may lack a side, by row number, and those of all 7 completions."""

    policy: PreTrainedModel
    reference: PreTrainedModel

    def __post_init__(self) -> None:
        rows = list(enumerate(ONE_SIDED))
        self.up = {n: self.ratio(p.prompt_ids, p.chosen_ids) for n, p in rows if p.chosen_ids}
        self.down = {n: self.ratio(p.prompt_ids, p.rejected_ids) for n, p in rows if p.rejected_ids}

    def ratio(self, prompt: tuple[int, ...], ids: tuple[int, ...]) -> Tensor:
        group = [PromptGroup(prompt, (ids,))]
        return token_logps(self.policy, group)[0].sum() - token_logps(self.reference, group)[0].sum().detach()

    def z0(self) -> Tensor:
        others = [pair.chosen_ids or pair.rejected_ids for pair in (*ONE_SIDED[1:], ONE_SIDED[0])]
        ratios = [self.ratio(pair.prompt_ids, ids) for pair, ids in zip(ONE_SIDED, others, strict=True)]
        return torch.stack(ratios).mean().clamp(min=0).detach()


def one_sided_kto(book: OneSidedBook) -> Tensor:
    z0 = book.z0()
    up = {n: 1 - torch.sigmoid(BETA * (h - z0)) for n, h in book.up.items()}
    down = {n: 1 - torch.sigmoid(BETA * (z0 - h)) for n, h in book.down.items()}
    sides = [[each[n] for each in (up, down) if n in each] for n in range(len(ONE_SIDED))]
    return torch.stack([torch.stack(of_row).mean() for of_row in sides]).mean()


def one_sided_bco(book: OneSidedBook) -> Tensor:
    delta = BETA * torch.stack([*book.up.values(), *book.down.values()]).mean().detach()
    up = [-F.logsigmoid(BETA * h - delta) for h in book.up.values()]
    down = [-F.logsigmoid(delta - BETA * h) for h in book.down.values()]
    return torch.stack([*up, *down]).sum() / len(ONE_SIDED)


def mean_nll(book: OneSidedBook) -> Tensor:
    """Per token of all chosen answers together."""
    groups = [PromptGroup(pair.prompt_ids, (pair.chosen_ids,)) for pair in (*UP, *BOTH)]
    return -torch.cat(token_logps(book.policy, groups)).mean()


ONE_SIDED_LOSSES = {"kto": one_sided_kto, "bco": one_sided_bco, "sft": mean_nll}


@pytest.mark.parametrize("tokens_per_pass", [1, 8192])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ONE_SIDED_LOSSES)
def test_a_row_may_lack_a_side(
    tiny_model: Path, near_model: Path, name: str, packing: bool, tokens_per_pass: int
) -> None:
    policy = load_plain(near_model)
    expected = ONE_SIDED_LOSSES[name](OneSidedBook(policy, load_plain(tiny_model)))
    expected.backward()
    settings = {"loss": {"type": name}, "packing": packing, "tokens_per_pass": tokens_per_pass}
    metrics, ours = first_step(near_model, tiny_model, ONE_SIDED, **settings)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert_same_gradient(ours, gradient(policy))


def test_bcos_centre_is_the_mean_of_all_rewards_so_far(tiny_model: Path, near_model: Path) -> None:
    learner = make_learner(near_model, tiny_model, loss={"type": "bco"})
    reference, seen = load_plain(tiny_model), []

    def book(pairs: Sequence[Pair]) -> Book:
        policy = load_plain(near_model)
        policy.load_state_dict(learner.policy.state_dict())
        return Book(policy, reference, pairs)

    def loss(rows: Book, delta: float) -> float:
        losses = -F.logsigmoid(BETA * rows.hw - delta) - F.logsigmoid(delta - BETA * rows.hl)
        return losses.mean().item()

    for batch in (make_pairs(3, seed=1), make_pairs(5, seed=2)):
        rows = book(batch)
        seen += (BETA * torch.cat([rows.hw, rows.hl])).tolist()
        expected = loss(rows, sum(seen) / len(seen))
        assert learner.train_step(batch)["loss"] == pytest.approx(expected, abs=1e-5)
    # What is only evaluated does not move it.
    held_out = make_pairs(2, seed=3)
    expected = loss(book(held_out), sum(seen) / len(seen))
    for _ in range(2):
        assert learner.evaluate(held_out)["loss"] == pytest.approx(expected, abs=1e-5)
