"""Where a model runs outside of a trainer."""

from __future__ import annotations

import torch

__all__ = ["pick_device"]


def pick_device(name: str | None) -> torch.device:
    """The device of a name, or a GPU if there is one.

    Args:
        name: Such as "cpu" or "cuda:1"; None and "auto" take a GPU if there is one.

    Raises:
        ValueError: If torch knows no such device, or has none here.
    """
    name = "auto" if name is None else name
    found = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(found if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`device` must be one that torch has here, such as cpu or cuda, or auto, got {name!r}: {reason}"
        ) from error
    return device
