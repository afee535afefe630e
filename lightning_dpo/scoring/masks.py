"""Attention masks of shared-prompt rows, in the form that a model's attention takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from lightning_dpo.scoring.layout import InputRows, visible

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["FLEX_BLOCK", "AttentionMask", "block_mask", "dense_mask", "row_masks"]

AttentionMask: TypeAlias = "Tensor | BlockMask | dict[str, Tensor | BlockMask]"

FLEX_BLOCK = 128
"""FlexAttention's block size; rows of a multiple of this waste nothing and recompile seldom."""

_FULL, _SLIDING = "full_attention", "sliding_attention"


def row_masks(rows: InputRows, *, config: Any, dtype: torch.dtype) -> AttentionMask:
    """The masks a transformers model takes in place of those it would build itself; made once for a batch.

    Models of one kind of layer take one mask; hybrid models (Gemma 2 and 3, gpt-oss) take a dict of one
    mask for each kind, and the window of a sliding layer is part of its mask.

    Args:
        rows: The layout.
        config: The model's text config.
        dtype: Type of the attention scores, for implementations that add the mask to them.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        kinds = {_FULL if window is None else _SLIDING}
    implementation = config._attn_implementation
    key = (implementation, dtype, window, *sorted(kinds))
    if key not in rows.masks:
        rows.masks[key] = _build_masks(rows, kinds, window, implementation, dtype)
    masks: AttentionMask = rows.masks[key]
    return masks


def _build_masks(
    rows: InputRows, kinds: set[str], window: int | None, implementation: str, dtype: torch.dtype
) -> AttentionMask:
    if rows.spans is not None:
        spans = rows.spans[None, None]  # one object, which attention for ragged rows keeps its cuts in
        return dict.fromkeys(sorted(kinds), spans) if len(kinds) > 1 else spans

    def build(span: int | None) -> Tensor | BlockMask:
        if implementation == "flex_attention":
            return block_mask(rows, window=span)
        mask = dense_mask(rows, window=span)
        return mask if implementation != "eager" else _additive(mask, dtype)

    masks = {kind: build(window if kind == _SLIDING else None) for kind in sorted(kinds)}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def dense_mask(rows: InputRows, *, window: int | None = None) -> Tensor:
    """True where a query sees a key, (rows, 1, seq_len, seq_len)."""
    height, width = rows.input_ids.shape
    index = torch.arange(max(height, width), device=rows.input_ids.device)
    return visible(
        rows, index[:height, None, None], index[None, :width, None], index[None, None, :width], window=window
    ).unsqueeze(1)


def block_mask(rows: InputRows, *, window: int | None = None) -> BlockMask:
    """The mask of `dense_mask` for FlexAttention: blocks that nobody sees are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(rows, row, query, key, window=window)

    height, width = rows.input_ids.shape
    return create_block_mask(
        mask_mod,
        B=height,
        H=None,
        Q_LEN=width,
        KV_LEN=width,
        device=rows.input_ids.device,
        BLOCK_SIZE=FLEX_BLOCK,
    )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )
