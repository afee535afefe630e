"""Ray Tune's callbacks that a sweep names by class path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune

from lightning_dpo.tuning.config_paths import class_and_arguments, import_object

__all__ = ["make_callbacks"]


def make_callbacks(choices: Sequence[str | Mapping[str, Any]]) -> list[tune.Callback]:
    """The callbacks.

    Args:
        choices: Each one an import path, or ``{class_path: ..., init_args: {...}}``.

    Raises:
        ValueError: If one cannot be imported, does not take its arguments, or is no callback of Ray Tune.
    """
    made = []
    for choice in choices:
        name, arguments = class_and_arguments(choice)
        cls = import_object(name) if "." in name else None
        if not (isinstance(cls, type) and issubclass(cls, tune.Callback)):
            raise ValueError(
                f"`callbacks` must be callbacks of Ray Tune by class path, such as "
                f"ray.tune.logger.CSVLoggerCallback, got {name!r}; Lightning's belong to "
                "`overrides: {trainer.callbacks: ...}` or to the recipe"
            )
        try:
            made.append(cls(**arguments))
        except TypeError as error:
            raise ValueError(f"`callbacks`: {name} does not take {arguments}: {error}") from error
    return made
