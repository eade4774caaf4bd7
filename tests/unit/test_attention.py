"""A completion sees its prompt and itself, as far as a window reaches, whichever kernel computes it."""

import pytest
import torch
from families import make_model
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from dpo_ray import attention
from dpo_ray.attention import FlatAttention, attend
from dpo_ray.batching import PromptGroup, flatten
from dpo_ray.logprobs import CompletionScorer

GROUPS = [
    PromptGroup((5, 6), ((7,), (8, 9, 10), (11, 12, 13))),
    PromptGroup((1,), ((2, 3, 4), (5, 5))),
    PromptGroup((1, 2, 3, 4), ((7, 8), (9,))),
]
# Rows are queries, columns keys: 5 6 | 8 9 | 11 12 || 1 | 2 3 | 5 || 1 2 3 4 | 7.
WITHOUT_WINDOW = """
    x..............
    xx.............
    xxx............
    xxxx...........
    xx..x..........
    xx..xx.........
    ......x........
    ......xx.......
    ......xxx......
    ......x..x.....
    ..........x....
    ..........xx...
    ..........xxx..
    ..........xxxx.
    ..........xxxxx
"""
IN_A_WINDOW_OF_3 = """
    x..............
    xx.............
    xxx............
    .xxx...........
    xx..x..........
    .x..xx.........
    ......x........
    ......xx.......
    ......xxx......
    ......x..x.....
    ..........x....
    ..........xx...
    ..........xxx..
    ...........xxx.
    ............xxx
"""
SEEN = {
    window: torch.tensor([[mark == "x" for mark in row] for row in drawing.split()])
    for window, drawing in {None: WITHOUT_WINDOW, 3: IN_A_WINDOW_OF_3}.items()
}
WINDOWS = pytest.mark.parametrize("window", SEEN)
SOFTCAPS = pytest.mark.parametrize("softcap", [None, 0.7])


@pytest.fixture
def flat() -> FlatAttention:
    return FlatAttention(flatten(GROUPS, torch.device("cpu")))


def states() -> tuple[Tensor, Tensor, Tensor]:
    """[1, 4, 15, 16] queries, and [1, 2, 15, 16] keys and values: two queries share a key."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 15, 16, generator=generator) for heads in (4, 2, 2))
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, *, scaling: float, softcap: float | None
) -> Tensor:
    """Softmax over what is seen, all pairs of tokens at once."""
    key, value = key[:, [0, 0, 1, 1]], value[:, [0, 0, 1, 1]]
    scores = scaling * torch.einsum("bhqd,bhkd->bhqk", query, key)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return torch.einsum("bhqk,bhkd->bhqd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@WINDOWS
def test_flex_attention_is_told_what_is_drawn(flat: FlatAttention, window: int | None) -> None:
    sees, places, zero = flat.sees(window), torch.arange(15), torch.tensor(0)
    told = [[bool(sees(zero, zero, query, key)) for key in places] for query in places]
    assert told == SEEN[window].tolist()


@WINDOWS
@SOFTCAPS
def test_attention_group_by_group_is_attention_to_what_is_drawn(
    flat: FlatAttention, window: int | None, softcap: float | None
) -> None:
    ours, theirs = states(), states()
    expected = plain_attention(*theirs, SEEN[window], scaling=0.4, softcap=softcap).transpose(1, 2)
    out, _ = attend(
        nn.Module(), *ours, window, scaling=0.4, sliding_window=window, softcap=softcap, flat=flat
    )
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)


@WINDOWS
@SOFTCAPS
@torch.no_grad()
def test_flex_attention_gives_the_same(
    flat: FlatAttention, monkeypatch: pytest.MonkeyPatch, window: int | None, softcap: float | None
) -> None:
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    query, key, value = (each.detach() for each in states())  # On CPU it has no backward pass.
    out = attention._flex(query, key, value, flat.block_mask(window), 0.4, softcap)
    expected = attention._by_group(*states(), flat, window, 0.4, softcap)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_without_a_scale_it_is_one_over_the_root_of_the_size(flat: FlatAttention) -> None:
    for softcap in (None, 0.7):
        expected = plain_attention(*states(), SEEN[None], scaling=0.25, softcap=softcap)
        out, _ = attend(nn.Module(), *states(), None, softcap=softcap, flat=flat)
        torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-6, rtol=1e-5)


def test_masks_are_made_once_and_not_where_plain_causal_attention_will_do(flat: FlatAttention) -> None:
    assert flat.masks(3) is flat.masks(3)
    assert [first is None for first, *_ in flat.masks(None)] == [True, True, True]
    assert [first is None for first, *_ in flat.masks(3)] == [True, True, False]


@pytest.mark.parametrize(("asked", "masked"), [(None, 3), (3, None), (3, 4)])
def test_a_layer_whose_window_is_only_in_its_mask_is_refused(
    flat: FlatAttention, asked: int | None, masked: int | None
) -> None:
    with pytest.raises(ValueError, match=f"a window of {asked} whose mask has one of {masked}"):
        attend(nn.Module(), *states(), masked, sliding_window=asked, flat=flat)


@torch.no_grad()
def test_a_completions_log_prob_does_not_depend_on_the_others() -> None:
    scorer = CompletionScorer(make_model("Qwen3"), flat=True)
    before = scorer(GROUPS)[1].logp
    changed = [GROUPS[0]._replace(completions=((7,), (8, 40, 41), (11, 12, 13))), *GROUPS[1:]]
    after = scorer(changed)[1].logp
    assert [ours == theirs for ours, theirs in zip(before, after, strict=True)] == [True, False] + [True] * 5
