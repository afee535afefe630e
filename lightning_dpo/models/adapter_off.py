"""The base of an adapted model as a model of its own, without a copy of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AdapterOff"]


class AdapterOff(nn.Module):
    """An adapted model with its adapter switched off while it is called; takes no gradient.

    Attributes:
        adapted: The model with the adapter, such as peft's.
    """

    def __init__(self, adapted: nn.Module) -> None:
        """Show the base of a model.

        Raises:
            ValueError: If the model has no adapter to switch off.
        """
        super().__init__()
        if not hasattr(adapted, "disable_adapter"):
            raise ValueError(
                f"`adapted` must be a model with an adapter to switch off, got {type(adapted).__name__}"
            )
        self.adapted = adapted

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        """What the base model gives: an object with `logits`, (rows, seq_len, vocab).

        Args:
            input_ids: Token ids, (rows, seq_len).
            attention_mask: 1 for tokens and 0 for padding, (rows, seq_len).
            kwargs: More of what the model takes.
        """
        kwargs.setdefault("use_cache", False)
        with self.switched_off(), torch.no_grad():
            return self.adapted(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    @contextmanager
    def switched_off(self) -> Iterator[nn.Module]:
        """The adapted model, for a while without its adapter."""
        adapted: Any = self.adapted
        with adapted.disable_adapter():
            yield self.adapted
