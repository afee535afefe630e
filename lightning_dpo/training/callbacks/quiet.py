"""What libraries remark is kept from the terminal of who did not call them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hub_logging

__all__ = ["quiet"]

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's remarks on hardware, data-loader workers and logging, and bars for small files."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    had_bars = hub_logging.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        hub_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if had_bars:
            hub_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
