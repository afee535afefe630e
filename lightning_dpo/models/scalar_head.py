"""A scalar for each hidden state of a language model, in place of logits: rewards or values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_dpo.models.unwrap import causal_lm

__all__ = ["ScalarHead", "freeze_head"]

_STANDARD_DEVIATION = 0.02
"""Of a new head's weights, where the model's configuration does not say how its own were drawn."""


class ScalarHead(nn.Module):
    """A linear map from hidden states to one number, without bias, computed in float32 or wider.

    Attributes:
        weight: (1, hidden).
    """

    def __init__(self, hidden_size: int, *, standard_deviation: float = _STANDARD_DEVIATION) -> None:
        """Draw the weight at random.

        Args:
            hidden_size: Of the model.
            standard_deviation: Of the normal distribution that it is drawn from.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))
        nn.init.normal_(self.weight, std=standard_deviation)

    @classmethod
    def of(cls, model: nn.Module, *, output_head: nn.Module) -> ScalarHead:
        """A new head for a model, drawn as transformers draws those of its sequence classification models.

        Args:
            model: A language model.
            output_head: The module that maps its last hidden states to logits.
        """
        width: Any = output_head.weight
        config: Any = getattr(causal_lm(model), "config", None)
        deviation = getattr(config, "initializer_range", None)
        return cls(width.shape[-1], standard_deviation=deviation or _STANDARD_DEVIATION)

    def forward(self, states: Tensor) -> Tensor:
        """One number for each state, (states, hidden) -> (states,)."""
        # Not a matrix product, which autocast would compute in half precision.
        wide = torch.promote_types(torch.float32, states.dtype)
        return (states.to(wide) * self.weight.to(wide)).sum(-1)


def freeze_head(model: nn.Module, *, output_head: nn.Module) -> None:
    """Leave a head that nothing is computed with out of training, but not an embedding that it shares.

    Args:
        model: A language model of which only hidden states are used.
        output_head: The module that maps them to logits.
    """
    inside = {id(part) for part in output_head.modules()}
    elsewhere = {
        id(parameter)
        for part in model.modules()
        if id(part) not in inside
        for parameter in part.parameters(recurse=False)
    }
    for parameter in output_head.parameters():
        if id(parameter) not in elsewhere:
            parameter.requires_grad_(False)
