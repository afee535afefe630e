"""Attention for a single row of prompts with their completions that computes nothing that nobody sees.

A dense mask over a row computes the scores of all its tokens with one another and throws most away. Here a
row is cut into prompts with their first completion, which is plain causal attention, and further completions
against prompt and themselves: no mask over the row. Where these pieces are small, a call costs more than
what it computes, so that all go in one, padded (`lightning_dpo.scoring.padded_pieces`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_dpo.scoring.graphs import outside_of_graphs
from lightning_dpo.scoring.padded_pieces import PaddedPieces

__all__ = ["PREFIX_ATTENTION", "prefix_attention"]

PREFIX_ATTENTION = "lightning_dpo_prefix"
"""Name under which transformers models find it, as their `attn_implementation`, once it is registered."""

_Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, None]]
"""Of queries, keys, values and a mask, as transformers calls it."""

_SLOW = (torch.bfloat16, torch.float16)
"""Types in which the CPU's attention is slower than in float32: twice for SmolLM2, forwards and back."""


@outside_of_graphs
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
    # Causal where there is no mask, whatever the layer says it is.
    attend = partial(sdpa_attention_forward, module, **{**kwargs, "is_causal": True})
    if query.device.type != "cpu":
        return _piece_by_piece(attend, query, key, value, attention_mask[0, 0].tolist()), None
    dtype = value.dtype
    pieces = PaddedPieces.of(attention_mask, width=query.shape[1] * query.shape[3])
    with torch.autocast("cpu", enabled=False):
        if any(states.dtype in _SLOW for states in (query, key, value)):
            query, key, value = query.float(), key.float(), value.float()
        if pieces is None:
            output = _piece_by_piece(attend, query, key, value, attention_mask[0, 0].tolist())
        else:
            output = _at_once(attend, query, key, value, pieces)
    return output.to(dtype), None


def _at_once(attend: _Attend, query: Tensor, key: Tensor, value: Tensor, pieces: PaddedPieces) -> Tensor:
    """Outputs, (1, seq_len, heads, head_dim), of pieces that are padded."""

    def padded(states: Tensor) -> Tensor:
        heads, _, size = states.shape[1:]
        rows = states[0].index_select(1, pieces.columns)
        return rows.view(heads, *pieces.shape, size).transpose(0, 1)

    output, _ = attend(padded(query), padded(key), padded(value), None)
    return output.flatten(0, 1).index_select(0, pieces.places)[None]


def _piece_by_piece(
    attend: _Attend, query: Tensor, key: Tensor, value: Tensor, spans: list[list[int]]
) -> Tensor:
    """Outputs, (1, seq_len, heads, head_dim), with a call for each piece."""
    # Each prompt is one piece with its first completion; lengths of 0 fill up the table.
    groups = [[prompt + first, *filter(None, rest)] for prompt, first, *rest in spans]
    sizes = [size for group in groups for size in group]
    queries, keys, values = (torch.split(states, sizes, dim=2) for states in (query, key, value))
    outputs: list[Tensor] = []
    piece = 0
    for (prompt, *_), group in zip(spans, groups, strict=True):
        start = piece
        outputs.append(attend(queries[start], keys[start], values[start], None)[0])
        for piece, size in enumerate(group[1:], start=start + 1):
            # A query sees the whole prompt and the completion's tokens up to itself.
            mask = torch.ones(size, prompt + size, dtype=torch.bool, device=query.device).tril(prompt)
            seen_keys, seen_values = (
                torch.cat([states[start][:, :, :prompt], states[piece]], dim=2) for states in (keys, values)
            )
            outputs.append(attend(queries[piece], seen_keys, seen_values, mask[None, None])[0])
        piece = start + len(group)
    return torch.cat(outputs, dim=1)
