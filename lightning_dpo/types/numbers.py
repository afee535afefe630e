"""Numbers of a batch's examples, which are none of the model's input."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["ExactNumbers"]


class ExactNumbers:
    """A batch in which no number is replaced by its own rounding.

    A trainer's `precision: bf16-true` sets every field of a batch that is a floating-point tensor to its
    values in bfloat16, of which a weight of 0.3 is 0.3008, and the sum of 257 ones is 256.
    """

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, unless it holds the same numbers more precisely."""
        if not _is_rounding(value, of=getattr(self, name, None)):
            object.__setattr__(self, name, value)


def _is_rounding(value: Any, *, of: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(of, Tensor):
        return False
    if not value.is_floating_point() or value.dtype.itemsize >= of.dtype.itemsize:
        return False
    return value.shape == of.shape and value.device == of.device and bool((of.to(value.dtype) == value).all())
