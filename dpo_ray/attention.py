"""Attention over flat rows: a completion sees its prompt and itself, and nothing else.

Registered with transformers, so that any decoder which passes its keyword arguments on to its attention
can run on flat rows; no model code is touched.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from dpo_ray.batching import FlatRow

NAME = "dpo_ray_flat"
"""Of the attention implementation in transformers."""


@dataclass(frozen=True)
class FlatAttention:
    """What every layer needs to know of a flat row; masks are made once per row."""

    row: FlatRow

    @cached_property
    def parts(self) -> list[list[int]]:
        """Of each group, the tokens of prompt and first completion together, and of each other one."""
        return [[prompt + first, *others] for prompt, first, *others in self.row.lengths]

    def masks(self, window: int | None) -> list[list[Tensor | None]]:
        """Of each group, the mask of its first part and of its other completions; True is seen.

        None: plain causal attention.
        """
        if window not in self._masks:
            self._masks[window] = [
                [_causal(0, prompt + first, window), *(_causal(prompt, n, window) for n in others)]
                for prompt, first, *others in self.row.lengths
            ]
        return self._masks[window]

    @cached_property
    def _masks(self) -> dict[int | None, list[list[Tensor | None]]]:
        return {}

    @cached_property
    def _block_masks(self) -> dict[int | None, BlockMask]:
        return {}

    def block_mask(self, window: int | None) -> BlockMask:
        """The same, for FlexAttention."""
        if window not in self._block_masks:
            length = self.row.input_ids.shape[1]
            sees = self.sees(window)
            self._block_masks[window] = create_block_mask(
                sees, None, None, length, length, device=str(self.row.input_ids.device)
            )
        return self._block_masks[window]

    def sees(self, window: int | None) -> Any:
        """FlexAttention's question: does token `query` see token `key`?"""
        group, part = self.row.segments
        position = self.row.position_ids[0]

        def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = (group[query] == group[key]) & ((part[key] == 0) | (part[key] == part[query]))
            near = position[query] - position[key] < (window or len(position) + 1)
            return same & near & (key <= query)

        return mask


def _causal(before: int, length: int, window: int | None) -> Tensor | None:
    """[length, before + length] True where a query sees a key; the queries are the last of the keys."""
    if before == 0 and (window is None or length <= window):
        return None
    mask = torch.ones(length, before + length, dtype=torch.bool).tril(before)
    return mask if window is None else mask.triu(before - window + 1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: int | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    flat: FlatAttention,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, T, heads, size], from [1, heads, T, size] queries and [1, kv_heads, T, size] keys and values.

    ValueError: the layer asks for another window than the one that its mask has.
    """
    window = sliding_window or None
    if window != attention_mask:
        raise ValueError(f"a layer with a window of {window} whose mask has one of {attention_mask}")
    if query.device.type == "cuda":
        out = _flex(query, key, value, flat.block_mask(window), scaling, softcap)
    else:
        out = _by_group(query, key, value, flat, window, scaling, softcap)
    return out.transpose(1, 2), None


def _by_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flat: FlatAttention,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Each group in dense attention calls: prompt with first completion, then each other completion."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # Split once: the gradient of a slice would be as long as the row.
    sizes = [size for parts in flat.parts for size in parts]
    pieces = zip(*(each.split(sizes, dim=2) for each in (query, key, value)), strict=True)
    outputs = []
    for lengths, masks in zip(flat.row.lengths, flat.masks(window), strict=True):
        first_query, first_key, first_value = next(pieces)
        outputs.append(_dense(first_query, first_key, first_value, masks[0], scaling, softcap))
        prompt_key, prompt_value = first_key[:, :, : lengths[0]], first_value[:, :, : lengths[0]]
        for mask in masks[1:]:
            own_query, own_key, own_value = next(pieces)
            if own_query.shape[2]:
                keys = torch.cat([prompt_key, own_key], dim=2)
                values = torch.cat([prompt_value, own_value], dim=2)
                outputs.append(_dense(own_query, keys, values, mask, scaling, softcap))
    return torch.cat(outputs, dim=2)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    if not softcap:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    out = _compiled_flex()(
        query,
        key,
        value,
        score_mod=_cap(softcap) if softcap else None,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


@cache
def _cap(softcap: float) -> Any:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _no_mask(*_: Any, local_size: int | None = None, **__: Any) -> int | None:
    """Flat rows carry their own mask; a layer is handed the window alone, in the mask's place."""
    return local_size


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
