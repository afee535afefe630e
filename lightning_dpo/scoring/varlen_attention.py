"""Attention for a single row of prompts with their completions, in one call of a kernel for ragged sequences.

A row is cut into pieces: each prompt with its first completion, then each further completion alone. A further
completion's keys are those of its prompt and its own, so keys and values are gathered once, and queries stay
where they are. Every piece is causal, aligned at its end; there is no mask, no padding and no compilation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_dpo.models.precision import autocast_dtype
from lightning_dpo.scoring.graphs import outside_of_graphs
from lightning_dpo.scoring.prefix_attention import prefix_attention
from lightning_dpo.types.devices import send

__all__ = ["VARLEN_ATTENTION", "Pieces", "has_kernel", "varlen_attention"]

VARLEN_ATTENTION = "lightning_dpo_varlen"
"""Name under which transformers models find it, as their `attn_implementation`, once it is registered."""

_PIECES = "lightning_dpo_pieces"
"""Attribute of the spans that stand in for a mask: where their pieces are kept, for all layers and models."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """How a single row is cut.

    Attributes:
        keys: Column of each piece's keys, piece after piece, (keys,).
        query_ends: Where each piece's queries begin, and where the last ends, (pieces + 1,), int32.
        key_ends: Where each piece's keys begin in `keys`, and where the last ends, (pieces + 1,), int32.
        most_queries: Queries of the longest piece.
        most_keys: Keys of the piece that has most.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, spans: Tensor, *, device: torch.device) -> Pieces:
        """Cut a row, on the CPU, and send the cuts to a device without waiting for it.

        Args:
            spans: See `lightning_dpo.scoring.layout.InputRows.spans`.
            device: Where attention runs.
        """
        queries: list[int] = []
        keys: list[int] = []
        columns: list[Tensor] = []
        start = 0
        for prompt, first, *rest in spans.tolist():
            head = torch.arange(start, start + prompt)
            start += prompt
            for number, size in enumerate([first, *filter(None, rest)]):
                columns += [head, torch.arange(start, start + size)]
                queries.append(size if number else prompt + size)
                keys.append(prompt + size)
                start += size
        return cls(
            keys=send(torch.cat(columns), device),
            query_ends=send(_ends(queries), device),
            key_ends=send(_ends(keys), device),
            most_queries=max(queries),
            most_keys=max(keys),
        )


def has_kernel() -> bool:
    """Whether this torch has attention for ragged sequences."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


@outside_of_graphs
def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: The attention layer.
        query: (rows, heads, seq_len, head_dim).
        key: (rows, key_heads, seq_len, head_dim).
        value: (rows, key_heads, seq_len, head_dim).
        attention_mask: In place of a mask the spans of a single row, (1, 1, prompts, 1 + completions), as for
            `lightning_dpo.scoring.prefix_attention`; with an ordinary mask this is SDPA.
        scaling: Factor on the scores; by default 1 / sqrt(head_dim).
        dropout: With dropout this is `prefix_attention`, which has it.
        sliding_window: Keys this many positions back, or more, are out of sight.
        softcap: Not computed here.
        s_aux: Not computed here.
        kwargs: For transformers' SDPA.

    Returns:
        Outputs, (rows, seq_len, heads, head_dim), and None for the weights.

    Raises:
        ValueError: If scores are capped or have sinks, for which another attention has to be taken.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError("a cap on scores and sinks need another attention than that for ragged sequences")
    spans = attention_mask
    if spans is None or spans.dtype is not torch.long:
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        return sdpa_attention_forward(module, query, key, value, spans, **options)[0], None
    if dropout > 0:
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        return prefix_attention(module, query, key, value, spans, **options)
    pieces = getattr(spans, _PIECES, None)
    if pieces is None:
        pieces = Pieces.of(spans[0, 0].cpu(), device=query.device)
        setattr(spans, _PIECES, pieces)
    # Under autocast the three may differ in type: rotary embeddings leave queries and keys in float32.
    dtype = autocast_dtype(query.device) or query.dtype
    queries, keys, values = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    output = _kernel(
        queries,
        keys.index_select(0, pieces.keys),
        values.index_select(0, pieces.keys),
        pieces.query_ends,
        pieces.key_ends,
        pieces.most_queries,
        pieces.most_keys,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None], None


def _kernel(*args: Any, **kwargs: Any) -> Tensor:
    """The kernel of torch, imported where it is first called."""
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(*args, **kwargs)
    assert isinstance(output, Tensor), "nothing but the output is asked for"
    return output


def _ends(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
