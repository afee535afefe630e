"""What reaches the user's terminal while a command runs."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["naming", "quiet_libraries"]

_LIBRARIES = (
    "accelerate|datasets|huggingface_hub|jsonargparse|lightning|lightning_utilities|omegaconf|optuna|peft|ray|"
    "tokenizers|torch|torchmetrics|transformers"
)
"""Whose deprecations are for whoever maintains this package; those of a user's own code are shown."""

_ADVICE = (
    r"The `srun` command is available on your system but is not used",
    r"The '\w+' does not have many workers",
    r"Checkpoint directory .* exists and is not empty",
    r"Precision \S+ is not supported by the model summary",
)
"""Warnings of Lightning about nothing that is left for a user of this package to do."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide deprecation warnings and tips of libraries; ``python -W`` and PYTHONWARNINGS win over it."""
    log = logging.getLogger("lightning.pytorch")
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    streams = [h for h in log.handlers if isinstance(h, logging.StreamHandler) and h.stream is sys.stderr]
    before = sys.stderr
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=rf"({_LIBRARIES})(\.|$)")
            for message in _ADVICE:
                warnings.filterwarnings("ignore", message=message, module=r"lightning\.")
        tips.addFilter(_is_no_tip)
        for handler in streams:
            handler.setStream(_CurrentStderr())
        try:
            yield
        finally:
            tips.removeFilter(_is_no_tip)
            for handler in streams:
                handler.setStream(before)


@contextmanager
def naming(argument: str, shown: str) -> Iterator[None]:
    """Errors about an argument of what a command calls speak of the command's own."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(f"`{argument}`", f"`{shown}`")) from error


class _CurrentStderr:
    """Whatever is stderr at the moment: a progress bar takes its place to print messages above itself."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡 Tip:")
