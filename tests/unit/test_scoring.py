"""Every group is computed by one process in one of its passes, and all processes have as many passes."""

from pathlib import Path

import pytest
import torch
from textbook import load_plain, logps, make_groups

from dpo_ray.config import TrainingConfig
from dpo_ray.lm_head import CompletionSums
from dpo_ray.logprobs import Wanted
from dpo_ray.models import make_scorer
from dpo_ray.parallel import Peers
from dpo_ray.scoring import Collected, own_passes, score

GROUPS = make_groups(13)


@pytest.mark.parametrize("tokens_per_pass", [1, 40, 8192])
@pytest.mark.parametrize("world_size", [1, 2, 5, 20])
def test_passes_of_all_processes(world_size: int, tokens_per_pass: int) -> None:
    config = TrainingConfig(tokens_per_pass=tokens_per_pass)
    passes = [own_passes(GROUPS, config, Peers(rank, world_size)) for rank in range(world_size)]
    assert len({len(own) for own in passes}) == 1
    assert sorted(index for own in passes for part in own for index in part) == list(range(len(GROUPS)))
    for own in passes:
        for part in own:
            tokens = sum(GROUPS[index].num_tokens for index in part)
            assert tokens <= tokens_per_pass or len(part) == 1


def test_sums_are_collected_in_the_order_of_the_completions() -> None:
    groups = [group._replace(completions=((3,), (4,))[: n + 1]) for n, group in enumerate(GROUPS[:2])]
    collected = Collected(groups, Peers())
    collected.add([1], CompletionSums(torch.tensor([20.0, 21.0]), kl=torch.tensor([5.0, 6.0])))
    collected.add([0], CompletionSums(torch.tensor([10.0]), kl=torch.tensor([4.0])))
    # A pass that was only there to meet the other processes counts for nothing.
    collected.add([], CompletionSums(torch.tensor([99.0]), kl=torch.tensor([99.0])))
    sums = collected.result()
    assert sums.logp.tolist() == [10, 20, 21]
    assert sums.square is None
    assert sums.kl is not None and sums.kl.tolist() == [4, 5, 6]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("tokens_per_pass", [1, 40, 8192])
def test_scores_are_the_textbooks_and_without_gradient(
    tiny_model: Path, tokens_per_pass: int, packing: bool
) -> None:
    config = TrainingConfig(tokens_per_pass=tokens_per_pass, packing=packing)
    sums = score(make_scorer(tiny_model, flat=packing), GROUPS, config, Peers(), wanted=Wanted())
    with torch.no_grad():
        expected = logps(load_plain(tiny_model), GROUPS)
    torch.testing.assert_close(sums.logp, expected, atol=1e-5, rtol=1e-6)
    assert not sums.logp.requires_grad


def test_in_bfloat16_the_weights_stay_float32(tiny_model: Path) -> None:
    config, scorer = TrainingConfig(precision="bfloat16"), make_scorer(tiny_model)
    ours = score(scorer, GROUPS, config, Peers(), wanted=Wanted()).logp
    exact = score(scorer, GROUPS, TrainingConfig(), Peers(), wanted=Wanted()).logp
    assert 1e-4 < (ours - exact).abs().max() < 0.02 * exact.abs().max()
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.float32}
