"""Settings of models that take one of a few values."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = ["DtypeName", "Recomputation"]

DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""The type that weights are loaded in."""

Recomputation: TypeAlias = bool | Literal["selective"]
"""What the backward pass computes anew. False: nothing. True: blocks, of which inputs are kept. "selective":
what costs little within them, norms, activations and casts; what products and attention gave is kept."""
