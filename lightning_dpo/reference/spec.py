"""What the argument `reference` says, read once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import nn

__all__ = ["ReferenceKind", "ReferenceSpec"]

ReferenceKind: TypeAlias = Literal["frozen", "adapter", "none", "model"]

_CACHED = "cached"


@dataclass(frozen=True, slots=True)
class ReferenceSpec:
    """A reference as a user names it.

    Attributes:
        kind: "frozen" (the policy at the start), "adapter" (the policy with its adapter off), "none", or
            "model" (another one).
        model: The other model: a source like those of a policy, or a module; None for the other kinds.
        is_cached: Whether its log-probabilities are kept from run to run.
    """

    kind: ReferenceKind
    model: str | nn.Module | None = None
    is_cached: bool = False

    @classmethod
    def parse(cls, reference: Any) -> ReferenceSpec:
        """Read the argument.

        Args:
            reference: "frozen", "adapter", "cached", "cached:SOURCE", "none", a model's source, or a module.

        Raises:
            ValueError: If nothing follows "cached:", or it is of another type.
        """
        if isinstance(reference, cls):
            return reference
        if isinstance(reference, nn.Module):
            return cls("model", reference)
        if not isinstance(reference, str):
            raise ValueError(
                '`reference` must be "frozen", "adapter", "cached", "none", a model\'s source or a module, '
                f"got {type(reference).__name__}"
            )
        if reference in ("frozen", "adapter", "none"):
            return cls(reference)  # type: ignore[arg-type]
        word, colon, source = reference.partition(":")
        if word != _CACHED:
            return cls("model", reference)
        if colon and not source:
            raise ValueError(
                '`reference="cached:SOURCE"` must name a model, got no name; "cached" takes the policy'
            )
        return cls("model", source, is_cached=True) if source else cls("frozen", is_cached=True)

    @property
    def is_start(self) -> bool:
        """Whether it is the policy at the start: its copy, its adapter switched off, or its kept values."""
        return self.kind in ("frozen", "adapter")

    def cached(self) -> ReferenceSpec:
        """The same reference with its log-probabilities kept.

        Raises:
            ValueError: If there is no reference, or it has no name to be found again by.
        """
        if self.kind == "none" or isinstance(self.model, nn.Module):
            raise ValueError(
                "`reference` must be the policy at the start or a model by name for its log-probabilities to "
                f'be computed ahead, got {self}; set `reference: cached` or `reference: "cached:SOURCE"`'
            )
        return replace(self, kind="frozen" if self.is_start else "model", is_cached=True)

    def __str__(self) -> str:
        """The argument that `parse` reads; a module by its class."""
        if isinstance(self.model, nn.Module):
            return type(self.model).__name__
        name = "" if self.model is None else self.model
        if self.is_cached:
            return f"{_CACHED}:{name}" if name else _CACHED
        return name or self.kind
