"""One copy of a frozen base model's weights for several adapted models in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

__all__ = ["SharedBases", "base_model", "sharing_bases"]

Model = TypeVar("Model", bound=nn.Module)


class SharedBases:
    """The base models of a process, each loaded once.

    Every model that is made of one is a tree of modules of its own, with its own hooks, modes and config,
    and adapters in places of its own. Only the parameters are the same objects: where one tree moves them to
    another device or type, all see it. That suits models which run on one device in one type.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._bases: dict[Hashable, nn.Module] = {}
        self._versions: dict[Hashable, list[int]] = {}

    @property
    def loads(self) -> int:
        """Models that were loaded."""
        return len(self._bases)

    def model(self, key: Hashable, load: Callable[[], Model]) -> Model:
        """A new tree over a base's weights, which are loaded the first time.

        Args:
            key: Tells the base from others.
            load: Loads it.

        Raises:
            RuntimeError: If something has written to the weights since they were loaded.
        """
        if key not in self._bases:
            loaded = load()
            self._bases[key] = loaded.requires_grad_(False)
            self._versions[key] = _versions(loaded)
        base = self._bases[key]
        if _versions(base) != self._versions[key]:
            raise RuntimeError(
                f"the weights of {key} are shared by several models and must not change, but one of them has "
                "written to them: train an adapter, or do without sharing"
            )
        # What the memo knows is not copied.
        made = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        assert isinstance(made, type(base))
        return made  # type: ignore[return-value]


_shared: SharedBases | None = None


@contextmanager
def sharing_bases() -> Iterator[SharedBases]:
    """Let the models that are adapted in this process meanwhile share their base weights."""
    global _shared
    before, _shared = _shared, SharedBases()
    try:
        yield _shared
    finally:
        _shared = before


def base_model(key: Hashable, load: Callable[[], Model]) -> Model:
    """A model whose weights stay as they are: with shared weights where the process shares them, else loaded.

    Args:
        key: Tells it from others.
        load: Loads it.
    """
    return load() if _shared is None else _shared.model(key, load)


def _versions(model: nn.Module) -> list[int]:
    """How often each parameter was written to; moves to other devices do not count."""
    return [parameter._version for parameter in model.parameters() if not parameter.is_inference()]
