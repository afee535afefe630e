"""The trained weights as they were at an earlier step, to run the model with them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_dpo.parallel.sharding import local, reshard

__all__ = ["WeightSnapshot"]


class WeightSnapshot(nn.Module):
    """A copy of a model's trained weights, whole or this rank's part: of an adapter, the adapter alone.

    It is a module so that checkpoints of every kind hold it.
    """

    def __init__(self, model: nn.Module) -> None:
        """Copy the weights that a model has now.

        Args:
            model: Its parameters that take a gradient are copied, on its device and split as it is.
        """
        super().__init__()
        for name, parameter in _trained(model):
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            self.register_parameter(_key(name), copy)

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Become a copy of the weights that the model has now."""
        for ours, theirs in self._both(model):
            ours.copy_(theirs)

    @contextmanager
    def lent_to(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the earlier weights for a while; it gets its own back, bit for bit.

        Weights are exchanged in place, one by one, so that no third copy is needed. There must be no graph
        that waits for its backward pass.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for ours, theirs in self._both(model):
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)

    def _both(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        reshard(model)
        for name, parameter in _trained(model):
            yield local(self.get_parameter(_key(name))), local(parameter)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _key(name: str) -> str:
    """A parameter's name without the dots, which part modules."""
    return name.replace(".", "/")
