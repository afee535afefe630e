"""Attention for a single row of prompts with their completions that goes completion by completion.

A dense mask over a row computes the scores of all its tokens with one another and throws most away. Here a
row is cut into prompts with their first completion, which is plain causal attention, and further completions
against prompt and themselves: no mask over the row, and nothing computed that nobody sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["PREFIX_ATTENTION", "prefix_attention"]

PREFIX_ATTENTION = "lightning_dpo_prefix"
"""Name under which transformers models find it, as their `attn_implementation`, once it is registered."""


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: The attention layer.
        query: (rows, heads, seq_len, head_dim).
        key: (rows, key_heads, seq_len, head_dim).
        value: (rows, key_heads, seq_len, head_dim).
        attention_mask: In place of a mask the spans of a single row, (1, 1, prompts, 1 + completions),
            integers (see `lightning_dpo.scoring.layout.InputRows.spans`); with an ordinary mask this is SDPA.
        kwargs: For transformers' SDPA.

    Returns:
        Outputs, (rows, seq_len, heads, head_dim), and None for the weights.
    """
    if attention_mask is None or attention_mask.dtype is not torch.long:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    spans: list[list[int]] = attention_mask[0, 0].tolist()
    # Each prompt is one piece with its first completion; lengths of 0 fill up the table.
    groups = [[prompt + first, *filter(None, rest)] for prompt, first, *rest in spans]
    sizes = [size for group in groups for size in group]
    queries, keys, values = (torch.split(states, sizes, dim=2) for states in (query, key, value))
    outputs: list[Tensor] = []

    def attend(piece: int, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        # Causal where there is no mask, whatever the layer says it is.
        options = {**kwargs, "is_causal": True}
        outputs.append(sdpa_attention_forward(module, queries[piece], keys, values, mask, **options)[0])

    piece = 0
    for (prompt, *_), group in zip(spans, groups, strict=True):
        start = piece
        attend(start, keys[start], values[start], None)
        for piece, size in enumerate(group[1:], start=start + 1):
            # A query sees the whole prompt and the completion's tokens up to itself.
            mask = torch.ones(size, prompt + size, dtype=torch.bool, device=query.device).tril(prompt)
            seen_keys, seen_values = (
                torch.cat([states[start][:, :, :prompt], states[piece]], dim=2) for states in (keys, values)
            )
            attend(piece, seen_keys, seen_values, mask[None, None])
        piece = start + len(group)
    return torch.cat(outputs, dim=1), None
