"""Whether rows fit into the positions that a model has or was made for."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from lightning_dpo.models.unwrap import causal_lm

__all__ = ["check_positions", "has_learned_positions", "own_mask_width"]

_OFFSETS = (0, 2)
"""Rows that a table of learned positions has beside those of the positions: OPT's and BART's have two."""


def check_positions(model: nn.Module, *, longest: int) -> None:
    """Refuse rows that a model has no positions for; warn of those that are longer than it was made for.

    A model of the user's own, and one whose configuration names no `max_position_embeddings`, is not checked.

    Args:
        model: A causal language model, or an adapter around one.
        longest: Tokens of the longest row, a prompt with one completion.

    Raises:
        ValueError: If a row is longer than the model's table of learned positions.
    """
    inner: Any = causal_lm(model)
    text_config = getattr(getattr(inner, "config", None), "get_text_config", None)
    limit = None if text_config is None else getattr(text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or not 0 < limit < longest:
        return
    found = f"the policy's {limit} positions (max_position_embeddings)"
    fix = f"`max_length={limit}` of the data (--data.max_length {limit}) shortens longer rows"
    if has_learned_positions(inner, limit):
        raise ValueError(f"rows must fit into {found}, got one of {longest} tokens; {fix}")
    rank_zero_warn(
        f"the longest row has {longest} tokens, more than {found}: it was not made for so many, and what it "
        f"says of them may mean little; {fix}"
    )


def has_learned_positions(model: Any, limit: int) -> bool:
    """Whether a causal language model looks its positions up in a table, of as many rows as its limit."""
    tokens = model.get_input_embeddings()
    return any(
        isinstance(part, nn.Embedding) and part is not tokens and part.num_embeddings - limit in _OFFSETS
        for part in model.modules()
    )


def own_mask_width(model: Any) -> int | None:
    """Columns of the causal mask that attention layers hold as a buffer, beside the one they are given.

    GPT-Neo's layers do, and raise where a row is longer; None where no layer has one.

    Args:
        model: A causal language model, without an adapter around it.
    """
    text_config = getattr(getattr(model, "config", None), "get_text_config", None)
    limit = None if text_config is None else getattr(text_config(), "max_position_embeddings", None)
    held = (
        buffer
        for part in model.modules()
        if not isinstance(part, PreTrainedModel)  # GPTBigCode holds one that nothing reads any more
        for buffer in part.buffers(recurse=False)
    )
    return limit if any(buffer.shape[-2:] == (limit, limit) for buffer in held) else None
