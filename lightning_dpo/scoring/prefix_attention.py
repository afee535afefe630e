"""Attention for rows of pairs that goes branch by branch: no mask, and nothing computed that nobody sees.

A dense mask over a row computes the scores of all its tokens with one another and throws most away. Here a
row is cut into its pairs, and each pair into prompt with chosen, which is plain causal attention, and
rejected against prompt and itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = ["BRANCH_ATTENTION", "branch_attention"]

BRANCH_ATTENTION = "lightning_dpo_branches"
"""Name under which transformers models find it, as their `attn_implementation`."""


def branch_attention(
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
        value: Likewise.
        attention_mask: In place of a mask the spans of a single row, (1, 1, pairs, 3), integers (see
            `lightning_dpo.scoring.layout.Rows.spans`); with an ordinary mask this is SDPA.
        kwargs: For transformers' SDPA.

    Returns:
        Outputs, (rows, seq_len, heads, head_dim), and None for the weights.
    """
    if attention_mask is None or attention_mask.dtype is not torch.long:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    spans = attention_mask[0, 0].tolist()
    sizes = [size for prompt, chosen, rejected in spans for size in (prompt + chosen, rejected)]
    queries, keys, values = (torch.split(states, sizes, dim=2) for states in (query, key, value))
    outputs: list[Tensor] = []

    def attend(piece: int, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        # Causal where there is no mask, whatever the layer says it is.
        options = {**kwargs, "is_causal": True}
        outputs.append(sdpa_attention_forward(module, queries[piece], keys, values, mask, **options)[0])

    for pair, (prompt, _, rejected) in enumerate(spans):
        first, second = 2 * pair, 2 * pair + 1
        attend(first, keys[first], values[first], None)
        # A query sees the whole prompt and the rejected tokens up to itself.
        mask = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=query.device).tril(prompt)
        seen_keys, seen_values = (
            torch.cat([s[first][:, :, :prompt], s[second]], dim=2) for s in (keys, values)
        )
        attend(second, seen_keys, seen_values, mask[None, None])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(BRANCH_ATTENTION, branch_attention)
AttentionMaskInterface.register(BRANCH_ATTENTION, sdpa_mask)
