"""A network of the user's own: how it is called, and what it may offer so that it is computed as cheaply."""

from __future__ import annotations

import inspect
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lightning_dpo.models.unwrap import causal_lm

__all__ = ["HiddenStateNetwork", "computes_last_logits", "model_logits"]

_IDS_AND_MASK = ("input_ids", "attention_mask")


@runtime_checkable
class HiddenStateNetwork(Protocol):
    """What a network offers to share prompts between completions and to run its head in chunks.

    Both are only used where log-probabilities come out as they do from the network's own logits.
    """

    def hidden_states(self, input_ids: Tensor, *, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head maps to logits.

        Args:
            input_ids: Token ids, (rows, seq_len).
            position_ids: Position of each token in its own sequence, (rows, seq_len). A row may hold several
                sequences, so positions restart within it.
            attention_mask: True where a query sees a key, (rows, 1, seq_len, seq_len), as
                `scaled_dot_product_attention` takes it; nothing else is visible.

        Returns:
            Last hidden states, after the final norm, (rows, seq_len, hidden).
        """

    def output_head(self) -> nn.Module:
        """The module that maps hidden states, (tokens, hidden), to logits, (tokens, vocab)."""


def model_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, last: int | None = None
) -> Tensor:
    """Call a model for its logits, (rows, seq_len, vocab).

    A Hugging Face model is called as its library says. Any other module is called by the names of its
    `forward` where it has `input_ids`, else by position; the mask is left out where there is no place for
    it, which changes nothing for a causal network, since rows are padded on the right.

    Args:
        model: The model.
        input_ids: Token ids, (rows, seq_len).
        attention_mask: 1 for tokens and 0 for padding, (rows, seq_len).
        last: How many positions at the end of a row to give logits of; None gives all. The others are not
            computed where `computes_last_logits`.
    """
    if hasattr(causal_lm(model), "get_output_embeddings"):
        options = {"logits_to_keep": last} if last is not None and computes_last_logits(model) else {}
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options)
    else:
        args, kwargs = _arguments(model, input_ids, attention_mask)
        output = model(*args, **kwargs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits if last is None else logits[:, -last:]


def computes_last_logits(model: nn.Module) -> bool:
    """Whether a model can be called for the logits of its last positions alone."""
    lm = causal_lm(model)
    parameters = inspect.signature(lm.forward).parameters
    return hasattr(lm, "get_output_embeddings") and "logits_to_keep" in parameters


def _arguments(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    parameters = inspect.signature(model.forward).parameters
    values: dict[str, Any] = dict(zip(_IDS_AND_MASK, (input_ids, attention_mask), strict=True))
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "input_ids" in parameters:
        return (), {name: value for name, value in values.items() if takes_any or name in parameters}
    if "attention_mask" in parameters:
        return (input_ids,), {"attention_mask": attention_mask}
    required = [p for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return ((input_ids, attention_mask) if len(required) > 1 else (input_ids,)), {}
