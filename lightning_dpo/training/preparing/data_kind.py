"""Whether the data module gives what a training method learns from."""

from __future__ import annotations

from typing import Any

__all__ = ["checked_data"]


def checked_data(module: Any) -> Any:
    """The trainer's data module, unless it gives the other kind of feedback.

    Args:
        module: A `PolicyModule` with a trainer.

    Returns:
        The data module; None where there is none. One that does not say what it gives is not checked.

    Raises:
        ValueError: If its batches are not of the module's `batch_type`.
    """
    data = getattr(module.trainer, "datamodule", None)
    wanted, given = module.batch_type, getattr(data, "batch_type", None)
    if wanted is not None and given is not None and not issubclass(given, wanted):
        raise ValueError(
            f"`datamodule` must give {wanted.__name__} for {type(module).__name__}, got "
            f"{type(data).__name__}, which gives {given.__name__}. DPOModule learns from pairs, which "
            "PreferenceDataModule reads; KTOModule from judged completions, from FeedbackDataModule"
        )
    return data
